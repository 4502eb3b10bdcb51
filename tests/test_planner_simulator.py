"""The simulator against an event loop over single workers, and properties of step times."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disag_jax.planner import mixed_hop, simulator
from disag_jax.planner.lower_bound import lower_bound
from disag_jax.planner.simulator import PhaseSeconds, Timing
from disag_jax.schedule import IDLE, Column, make_schedule
from mesh.m2n import forward_pairs
from mesh.placement import Placement
from mesh.roles import Role


@st.composite
def sizes(draw, max_waves=5):
    """(layers, stages, micro-batches, hop, colocated)."""
    colocated = draw(st.booleans())
    stages = draw(st.integers(1, 4))
    layers = draw(st.integers(stages, 9))
    micro_batches = draw(st.integers(1, max_waves * 2 * stages))
    return (
        layers,
        stages,
        micro_batches,
        1 if colocated else draw(st.sampled_from((1, 2))),
        colocated,
    )


def make_timing(rng, num_classes, rounds, colocated=False) -> Timing:
    """Random seconds; a twin overlaps in one of the ways that it can."""

    def phases():
        idle = rng.uniform(0, 0.5, (2, num_classes)) if colocated else np.zeros((2, num_classes))
        return PhaseSeconds(*rng.uniform(1, 3, (2, num_classes)), *idle)

    f, b, loss_transfer = rng.uniform(0, 2, 3)
    loss = rng.uniform(0, 2, num_classes)
    owner = rng.choice([None, *range(num_classes)])
    in_turns, cool_down = (phases() if colocated and rng.random() < 0.5 else None for _ in range(2))
    return Timing(*phases(), f, b, rounds, loss, owner, loss_transfer, in_turns, cool_down)


@settings(max_examples=60)
@given(sizes())
def test_table_is_the_schedules(size):
    layers, stages, micro_batches, hop, colocated = size
    schedule = make_schedule(layers, stages, micro_batches, hop, colocated=colocated)
    table = simulator.make_table(*size)
    roles = [Role.ATTENTION] if colocated else list(Role)
    for mine, theirs in ((table.forward, schedule.forward), (table.backward, schedule.backward)):
        busy = theirs[:, :, roles, Column.MICRO_BATCH] != IDLE
        assert (mine == busy.reshape(mine.shape)).all()
    assert (table.loss == (schedule.loss != IDLE)).all()
    assert list(table.segments) == schedule.segments
    assert simulator.stash_slots(*size) == schedule.stash_slots


def after_loss(computed: dict, now: dict, timing: Timing, class_of) -> dict:
    """The workers' clocks after a loss; computed: before it, without transfers."""
    parts = {worker: timing.loss[class_of(worker)] for worker in now}
    if timing.loss_owner is None:
        return {worker: max(now[worker], computed[worker] + parts[worker]) for worker in now}
    owners = [worker for worker in now if class_of(worker) == timing.loss_owner]
    ends = []
    for worker in now:
        begun = now[worker]
        if worker not in owners:
            begun = max(begun, *(now[owner] + timing.loss_transfer for owner in owners))
        ends.append(begun + parts[worker])
    return dict.fromkeys(now, max(ends) + timing.loss_transfer)


def event_loop(schedule, timing: Timing, placement: Placement, backward_hop=None) -> float:
    """Seconds of a schedule, worker by worker and round by round, from the pipeline's own pairs.

    backward_hop: where it is not the schedule's.
    """
    workers = range(placement.workers)
    units = 1 if placement.colocated else 2

    def class_of(worker):
        is_expert = placement.rank_of(worker, Role.ATTENTION) is None
        return units * placement.stage_of(worker) + is_expert

    def runs(table, t, worker):
        role = Role.EXPERT if placement.rank_of(worker, Role.ATTENTION) is None else Role.ATTENTION
        return table[t, placement.stage_of(worker), role, Column.MICRO_BATCH] != IDLE

    if placement.colocated:
        size = placement.stage_workers
        rounds = [[(w, (w + size) % placement.workers) for w in workers]]
    else:
        rounds = forward_pairs(placement)

    def transfer(starts, seconds):
        clocks = dict(starts)
        for pairs in rounds:
            ends = dict(clocks)
            for source, target in pairs:
                end = max(clocks[source], clocks[target]) + seconds / len(rounds)
                ends[source], ends[target] = max(ends[source], end), max(ends[target], end)
            clocks = ends
        return clocks

    now = dict.fromkeys(workers, 0.0)
    for segment in schedule.segments:
        for t in range(segment.begin, segment.end):
            forward, backward = dict.fromkeys(workers, 0.0), dict.fromkeys(workers, 0.0)
            phases, in_turns = timing, False
            if segment.has_forward and segment.has_backward and timing.interleaved:
                phases, in_turns = timing.interleaved, True
            if not segment.has_forward and timing.cool_down:
                phases = timing.cool_down
            for w in workers:
                c = class_of(w)
                if segment.has_forward:
                    has_unit = runs(schedule.forward, t, w)
                    forward[w] = (phases.forward if has_unit else phases.idle_forward)[c]
                if segment.has_backward:
                    has_unit = runs(schedule.backward, t, w)
                    backward[w] = (phases.backward if has_unit else phases.idle_backward)[c]
            if in_turns:
                arrived = transfer(now, timing.backward_transfer)
                ended = {w: arrived[w] + forward[w] + backward[w] for w in workers}
                computed, now = ended, transfer(ended, timing.forward_transfer)
            elif backward_hop == 2:
                arrived = now
                if segment.has_backward:
                    arrived = transfer(now, timing.backward_transfer)
                made = {w: max(now[w] + forward[w], arrived[w]) for w in workers}
                sent = arrived
                if segment.has_forward:
                    sent = transfer(made, timing.forward_transfer)
                # Nothing of this period needs what is under way in it.
                computed = {w: now[w] + forward[w] + backward[w] for w in workers}
                now = {w: max(computed[w], sent[w]) for w in workers}
            elif schedule.hop == 1:
                arrived = now
                if segment.has_backward:
                    arrived = transfer(now, timing.backward_transfer)
                begun = {w: max(now[w] + forward[w], arrived[w]) for w in workers}
                sent = begun
                if segment.has_forward:
                    sent = transfer(begun, timing.forward_transfer)
                computed = {w: begun[w] + backward[w] for w in workers}
                now = {w: max(computed[w], sent[w]) for w in workers}
            else:
                sent = transfer(now, timing.forward_transfer)
                if segment.has_backward:
                    sent = transfer(sent, timing.backward_transfer)
                computed = {w: now[w] + forward[w] + backward[w] for w in workers}
                now = {w: max(computed[w], sent[w]) for w in workers}
            if schedule.loss[t] != IDLE:
                now = after_loss(computed, now, timing, class_of)
    return max(now.values())


@settings(max_examples=60)
@given(sizes(max_waves=3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_simulator_equals_an_event_loop(size, group, seed):
    layers, stages, micro_batches, hop, colocated = size
    placement = Placement(1, stages, group, group, colocated)
    rounds = 1 if colocated else placement.rounds
    timing = make_timing(np.random.default_rng(seed), (2 - colocated) * stages, rounds, colocated)
    schedule = make_schedule(layers, stages, micro_batches, hop, colocated=colocated)
    slow = event_loop(schedule, timing, placement)
    fast = simulator.simulate(timing, *size[:4], colocated=colocated, shorten=False).seconds
    assert fast == pytest.approx(slow, rel=1e-12)


@settings(max_examples=30)
@given(sizes(max_waves=3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_mixed_hops_equal_an_event_loop(size, group, seed):
    layers, stages, micro_batches, *_ = size
    placement = Placement(1, stages, group, group)
    timing = make_timing(np.random.default_rng(seed), 2 * stages, placement.rounds)
    schedule = mixed_hop.make_mixed_schedule(layers, stages, micro_batches)
    slow = event_loop(schedule, timing, placement, backward_hop=2)
    run = simulator.execute(mixed_hop.table_of(schedule, (1, 2)), timing)
    assert run.seconds == pytest.approx(slow, rel=1e-12)


@settings(max_examples=30)
@given(
    sizes(max_waves=2), st.permutations([1, 2, 4]), st.sampled_from((1, 2)),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_unequal_workers_wait_at_most_as_long_as_predicted(size, workers, hop, seed):
    layers, stages, micro_batches, *_ = size
    placement = Placement(1, stages, workers[0], workers[1])
    timing = make_timing(np.random.default_rng(seed), 2 * stages, placement.rounds)
    slow = event_loop(make_schedule(layers, stages, micro_batches, hop), timing, placement)
    run = simulator.simulate(timing, layers, stages, micro_batches, hop, colocated=False)
    # A worker without a partner in a round goes on; its class is predicted to wait.
    assert slow * (1 - 1e-12) <= run.seconds <= 1.35 * slow


@settings(max_examples=60)
@given(sizes(max_waves=14), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_waves_that_repeat_can_be_left_out(size, rounds, seed):
    stages, colocated = size[1], size[-1]
    timing = make_timing(np.random.default_rng(seed), (2 - colocated) * stages, rounds, colocated)
    options = dict(colocated=colocated)
    short = simulator.simulate(timing, *size[:4], **options)
    full = simulator.simulate(timing, *size[:4], **options, shorten=False)
    assert short.seconds == pytest.approx(full.seconds, rel=1e-12)
    assert lower_bound(timing, *size) <= full.seconds * (1 + 1e-12)


@settings(max_examples=40)
@given(sizes(), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_slower_parts_never_make_a_faster_step(size, rounds, seed):
    colocated = size[-1]
    rng = np.random.default_rng(seed)
    timing = make_timing(rng, (2 - colocated) * size[1], rounds, colocated)
    base = simulator.simulate(timing, *size[:4], colocated=colocated).seconds
    for name in ("forward", "backward", "forward_transfer", "backward_transfer", "loss"):
        slower = dataclasses.replace(timing, **{name: 1.5 * getattr(timing, name)})
        seconds = simulator.simulate(slower, *size[:4], colocated=colocated).seconds
        assert seconds >= base * (1 - 1e-12), name


def test_a_hand_made_step():
    # One stage, one layer, one micro-batch: attention 2, transfer 1, experts 3, transfer 1, loss 5,
    # transfer, experts' backward 4, transfer, attention's backward 6.
    timing = Timing(
        np.array([2.0, 3.0]), np.array([6.0, 4.0]), np.zeros(2), np.zeros(2),
        forward_transfer=1.0, backward_transfer=0.5, rounds=1, loss=np.array([5.0, 4.0]),
        loss_owner=0, loss_transfer=2.0,
    )  # fmt: skip
    run = simulator.simulate(timing, 1, 1, 1, 1, colocated=False)
    # The loss's period also has both transfers, which nothing needs but the loop waits for. The
    # experts get tokens after 2, have their gradients after 4, and those arrive after 2.
    loss = 2 + 4 + 2
    assert run.seconds == pytest.approx(2 + 1 + 3 + 1 + (0.5 + loss) + 0.5 + 4 + 0.5 + 6)


def test_both_transfers_of_phases_in_turns_wait_for_the_neighbours():
    # Five stages, the middle one late: a transfer before the phases and one behind carry that on.
    now, ring = np.array([0.0, 0.0, 5.0, 0.0, 0.0]), simulator._Ring(5, rounds=1)
    ends = simulator._in_turns(now, 2.0, 3.0, (0.25, 0.5), ring)
    forward_end, backward_begin, backward_end, end = ends
    assert forward_end.tolist() == [2.5, 7.5, 7.5, 7.5, 2.5]
    assert (backward_begin == forward_end).all() and (backward_end == forward_end + 3).all()
    assert end.tolist() == [10.75] * 5
