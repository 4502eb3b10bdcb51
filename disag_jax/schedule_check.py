"""Proves a schedule right from its tables alone, sharing no code with what made them."""

import numpy as np

from disag_jax.schedule import IDLE, Schedule
from mesh.roles import Role


def check(schedule: Schedule, backward_hop: int | None = None):
    """Raises AssertionError, with a sentence that says where, unless the schedule can be executed.

    Every unit runs exactly once, on the worker that holds its layer. Every message is used `hop`
    periods after it was made. The stage that owns a loss sends nothing else that is read
    backward in that period. Every unit input stays in its stash slot from the forward to the
    backward unit.

    backward_hop: of messages after the loss, where it is not the schedule's.
    """
    _check_shapes(schedule)
    if schedule.colocated:
        _check_roles_together(schedule)
    chain = [_unit_periods(schedule, schedule.forward, "forward"), _loss_periods(schedule)]
    if not schedule.forward_only:
        backward = _unit_periods(schedule, schedule.backward, "backward")
        chain.append(backward[:, ::-1])
        _check_loss_sends_alone(schedule)
    _check_hops(schedule, np.concatenate(chain, axis=1), backward_hop or schedule.hop)
    _check_stash(schedule)


def _check_shapes(schedule):
    periods, stages = len(schedule.loss), schedule.stages
    for name, table in (("forward", schedule.forward), ("backward", schedule.backward)):
        expected = (periods, stages, 2, 3)
        assert table.shape == expected, f"{name} table: shape {table.shape}, not {expected}"


def _check_roles_together(schedule):
    """Co-located roles are the same workers, which run a layer's two units in one phase."""
    for name, table in (("forward", schedule.forward), ("backward", schedule.backward)):
        for period, stage in np.argwhere((table[:, :, 0] != table[:, :, 1]).any(-1)).tolist():
            raise AssertionError(f"period {period}, stage {stage}: the roles differ in {name}")


def _unit_periods(schedule, table, direction) -> np.ndarray:
    """Returns the period of each unit, [micro-batch, 2 layer + role]; each must be there once."""
    periods = np.full([schedule.micro_batches, 2 * schedule.num_layers], IDLE)
    for period, stage, role in np.ndindex(table.shape[:3]):
        micro_batch, row, _ = table[period, stage, role].tolist()
        if micro_batch == IDLE:
            continue
        where = _where(period, stage, role, micro_batch)
        assert 0 <= micro_batch < schedule.micro_batches, f"{where}: no such micro-batch"
        layer = row * schedule.stages + stage
        assert 0 <= layer < schedule.num_layers, f"{where}: row {row} holds no layer"
        before = periods[micro_batch, 2 * layer + role]
        unit = f"the {direction} unit of layer {layer}"
        assert before == IDLE, f"{where}: {unit} has run before, in period {before}"
        periods[micro_batch, 2 * layer + role] = period
    for micro_batch, unit in np.argwhere(periods == IDLE).tolist():
        layer, role = divmod(unit, 2)
        name = f"{_role_name(role)} {direction} unit of layer {layer}"
        raise AssertionError(
            f"stage {layer % schedule.stages}: micro-batch {micro_batch} never runs the {name}"
        )
    return periods


def _loss_periods(schedule) -> np.ndarray:
    """Returns the period of each micro-batch's loss, [micro-batch, 1]; each must be due once."""
    periods = np.full([schedule.micro_batches, 1], IDLE)
    for period, micro_batch in enumerate(schedule.loss.tolist()):
        if micro_batch == IDLE:
            continue
        where = f"period {period}, loss of micro-batch {micro_batch}"
        assert 0 <= micro_batch < schedule.micro_batches, f"{where}: no such micro-batch"
        before = periods[micro_batch, 0]
        assert before == IDLE, f"{where}: was due before, in period {before}"
        periods[micro_batch] = period
    for micro_batch in np.flatnonzero(periods == IDLE).tolist():
        raise AssertionError(f"the loss of micro-batch {micro_batch} is never due")
    return periods


def _check_loss_sends_alone(schedule):
    """On the stage whose loss is due only layer 0, whose message nobody reads, may run backward."""
    owner = schedule.num_layers % schedule.stages
    for period in np.flatnonzero(schedule.loss != IDLE).tolist():
        micro_batch, row, _ = schedule.backward[period, owner, Role.ATTENTION].tolist()
        layer = row * schedule.stages + owner
        assert micro_batch == IDLE or layer == 0, (
            f"{_where(period, owner, Role.ATTENTION, micro_batch)}: layer {layer} sends a message "
            f"backward while the stage sends that of the loss of micro-batch "
            f"{schedule.loss[period]}"
        )


def _check_hops(schedule, periods_KC, backward_hop):
    """Checks that each step of a micro-batch's chain [K, C] runs one hop after the one before.

    Co-located, what A(l) makes is used at once by F(l), forward and, from F(l) to A(l), backward.
    """
    waits = np.diff(periods_KC)
    loss = 2 * schedule.num_layers
    expected = np.full(waits.shape[1], schedule.hop)
    expected[loss:] = backward_hop
    if schedule.colocated:
        expected[0:loss:2] = 0
        expected[loss + 1 :: 2] = 0
    for micro_batch, step in np.argwhere(waits != expected).tolist():
        made, used = periods_KC[micro_batch, step : step + 2].tolist()
        stage, role = _sender(schedule, step)
        raise AssertionError(
            f"{_where(made, stage, role, micro_batch)}: step {step} of the chain makes a message "
            f"that is used in period {used}, not {expected[step]} later"
        )


def _sender(schedule, step) -> tuple[int, int]:
    """Returns the stage and role of a step of the chain, forward, loss and backward."""
    loss = 2 * schedule.num_layers
    unit = step if step <= loss else 2 * loss - step
    return unit // 2 % schedule.stages, unit % 2


def _check_stash(schedule):
    """Plays each worker's stash: a full slot is never written, a unit finds its own input."""
    if schedule.forward_only:
        slots = schedule.stash_slots
        assert slots == (0, 0), f"a forward-only schedule stashes nothing, but has {slots} slots"
        return
    for stage, role in np.ndindex(schedule.forward.shape[1:3]):
        stash = [None] * schedule.stash_slots[role]
        for period in range(len(schedule.loss)):
            micro_batch, row, slot = schedule.forward[period, stage, role].tolist()
            if micro_batch != IDLE:
                where = f"{_where(period, stage, role, micro_batch)}, row {row}: slot {slot}"
                assert 0 <= slot < len(stash), f"{where} is none of the {len(stash)} slots"
                assert stash[slot] is None, f"{where} still holds {_owner(stash[slot])}"
                stash[slot] = micro_batch, row
            micro_batch, row, slot = schedule.backward[period, stage, role].tolist()
            if micro_batch != IDLE:
                where = f"{_where(period, stage, role, micro_batch)}, row {row}: slot {slot}"
                assert 0 <= slot < len(stash), f"{where} is none of the {len(stash)} slots"
                found = stash[slot]
                assert found == (micro_batch, row), f"{where} holds {_owner(found)} instead"
                stash[slot] = None


def _owner(held) -> str:
    return "nothing" if held is None else f"micro-batch {held[0]}, row {held[1]}"


def _where(period, stage, role, micro_batch) -> str:
    return f"period {period}, stage {stage}, {_role_name(role)}, micro-batch {micro_batch}"


def _role_name(role) -> str:
    return Role(role).name.lower()
