"""Properties of the AF-Pipe schedule, and proof that its checker sees broken tables."""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from disag_jax import schedule as schedule_lib
from disag_jax.config import Config
from disag_jax.schedule import IDLE, Column, make_forward_schedule, make_schedule
from disag_jax.schedule_check import check
from mesh.roles import Role

MAX_STAGES, MAX_LAYERS = 8, 24


@st.composite
def sizes(draw, max_stages=MAX_STAGES, max_layers=MAX_LAYERS):
    """(num_layers, stages, micro_batches, hop)"""
    stages = draw(st.integers(1, max_stages))
    num_layers = draw(st.integers(stages, max_layers))
    micro_batches = draw(st.integers(1, 6 * stages + 3))
    return num_layers, stages, micro_batches, draw(st.sampled_from([1, 2]))


def exhaustive_sizes():
    for stages in range(1, 5):
        for num_layers in range(stages, 2 * stages + 2):
            for micro_batches in range(1, 4 * stages + 2):
                for hop in (1, 2):
                    yield num_layers, stages, micro_batches, hop


def busy(table):
    return table[..., Column.MICRO_BATCH] != IDLE


def held_inputs(schedule):
    """Unit inputs held in each period, [periods, stages, 2], counted without looking at slots."""
    begun = np.cumsum(busy(schedule.forward), axis=0)
    ended_before = np.cumsum(busy(schedule.backward), axis=0) - busy(schedule.backward)
    return begun - ended_before


@settings(max_examples=200, deadline=None)
@given(sizes(), st.booleans())
def test_every_schedule_passes_the_check(size, colocated):
    check(make_schedule(*size, colocated=colocated))
    check(make_forward_schedule(*size, colocated=colocated))


@pytest.mark.parametrize("colocated", [False, True])
def test_every_small_schedule_passes_the_check(colocated):
    for size in exhaustive_sizes():
        check(make_schedule(*size, colocated=colocated))


def test_one_colocated_stage_never_waits_but_at_the_first_loss():
    """Plain training: layer after layer, one micro-batch's backward beside the next's forward."""
    schedule = make_schedule(3, 1, 4, colocated=True)
    forward, backward = (busy(table)[:, 0, 0] for table in (schedule.forward, schedule.backward))
    assert forward.tolist() == [True] * 12 + [False] * 4
    assert backward.tolist() == [False] * 4 + [True] * 12
    assert schedule.stash_slots == (5, 5)


@settings(max_examples=200, deadline=None)
@given(sizes())
def test_no_slot_is_wasted_and_the_stash_is_bounded(size):
    num_layers, stages, _, hop = size
    schedule = make_schedule(*size)
    most = held_inputs(schedule).max(axis=0)  # [stages, 2]
    assert schedule.stash_slots == tuple(most.max(axis=0))
    rounded_up = -(-num_layers // stages) * stages
    bound = hop * (2 * rounded_up + 2 * stages - 4 * np.arange(stages)) + 1
    assert (most[:, Role.ATTENTION] <= bound).all()
    assert (most[:, Role.EXPERT] <= bound - 2 * hop).all()
    first_bound = hop * (2 * num_layers + 2 * stages) + 1
    assert schedule.stash_slots[Role.ATTENTION] <= first_bound
    assert schedule.stash_slots[Role.EXPERT] <= first_bound - 2 * hop


@pytest.mark.parametrize("hop", [1, 2])
@pytest.mark.parametrize(("num_layers", "stages"), [(1, 1), (3, 1), (4, 2), (8, 4), (4, 4)])
def test_many_micro_batches_reach_the_bounds(num_layers, stages, hop):
    schedule = make_schedule(num_layers, stages, 6 * hop * stages, hop)
    most = held_inputs(schedule).max(axis=0)
    bound = hop * (2 * num_layers + 2 * stages - 4 * np.arange(stages)) + 1
    np.testing.assert_array_equal(most, np.stack([bound, bound - 2 * hop], axis=1))
    assert schedule.in_flight == 4 * hop * stages + 1


@pytest.mark.parametrize("hop", [1, 2])
@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("waves", [1, 2, 4])
def test_idle_share_of_whole_waves(waves, rows, stages, hop):
    schedule = make_schedule(rows * stages, stages, waves * 2 * hop * stages, hop)
    exact = (4 * stages - 1) / (4 * stages * (1 + waves * rows) - 1)
    assert schedule.idle_share == pytest.approx(exact, rel=1e-12)
    assert 0.75 / (1 + waves * rows) < schedule.idle_share < 1 / (1 + waves * rows)


def test_a_full_pipeline_has_no_bubble_inside():
    """Between the first and the last unit of its own, a worker of an evaluation never waits."""
    table = busy(make_forward_schedule(8, 4, 24).forward)
    for stage, role in np.ndindex(table.shape[1:]):
        periods = np.flatnonzero(table[:, stage, role])
        assert len(periods) == periods[-1] - periods[0] + 1


@settings(max_examples=200, deadline=None)
@given(sizes(), st.booleans())
def test_segments_partition_the_periods_and_leave_no_work_out(size, forward_only):
    schedule = (make_forward_schedule if forward_only else make_schedule)(*size)
    forward = busy(schedule.forward).any(axis=(1, 2))
    backward = busy(schedule.backward).any(axis=(1, 2)) | (schedule.loss != IDLE)
    segments = schedule.segments
    assert [s.begin for s in segments] + [schedule.num_periods] == [0] + [s.end for s in segments]
    for segment in segments:
        assert segment.begin < segment.end
        assert forward[segment.begin : segment.end].any() == segment.has_forward
        assert backward[segment.begin : segment.end].any() == segment.has_backward
    assert schedule.first_backward == np.flatnonzero(backward)[0]
    assert schedule.end_forward == np.flatnonzero(forward)[-1] + 1


def test_one_micro_batch_has_no_steady_state():
    for hop in (1, 2):
        segments = make_schedule(4, 2, 1, hop).segments
        assert [tuple(s) for s in segments] == [
            (0, 8 * hop, True, False),
            (8 * hop, 16 * hop + 1, False, True),
        ]


@settings(max_examples=30, deadline=None)
@given(sizes())
def test_forward_only_table_is_the_forward_part(size):
    schedule, evaluation = make_schedule(*size), make_forward_schedule(*size)
    periods = evaluation.num_periods
    columns = [Column.MICRO_BATCH, Column.ROW]
    np.testing.assert_array_equal(
        evaluation.forward[..., columns], schedule.forward[:periods, ..., columns]
    )
    np.testing.assert_array_equal(evaluation.loss, schedule.loss[:periods])
    assert not busy(schedule.forward[periods:]).any()
    assert (schedule.loss[periods:] == IDLE).all()
    assert evaluation.forward_only
    assert evaluation.stash_slots == (0, 0)
    assert not evaluation.forward[..., Column.SLOT].any()


def with_copies(schedule):
    """The same schedule with tables that a test may break."""
    tables = {name: getattr(schedule, name).copy() for name in ("forward", "backward", "loss")}
    return dataclasses.replace(schedule, **tables)


@st.composite
def broken_schedules(draw):
    """A schedule to break, the table to break it in, and a unit's place in that table."""
    schedule = with_copies(make_schedule(*draw(sizes(max_stages=4, max_layers=8))))
    table = draw(st.sampled_from([schedule.forward, schedule.backward]))
    period, stage, role = draw(st.sampled_from(np.argwhere(busy(table)).tolist()))
    return schedule, table, (period, stage, role)


@settings(max_examples=50, deadline=None)
@given(broken_schedules())
def test_check_catches_a_moved_unit(broken):
    schedule, table, (period, stage, role) = broken
    other = period + 1 if period + 1 < len(table) else period - 1
    table[[period, other], stage, role] = table[[other, period], stage, role]
    with pytest.raises(AssertionError, match=r"period \d+, stage"):
        check(schedule)


@settings(max_examples=50, deadline=None)
@given(broken_schedules())
def test_check_catches_a_dropped_unit(broken):
    schedule, table, place = broken
    table[place] = IDLE, 0, 0
    with pytest.raises(AssertionError, match="never runs"):
        check(schedule)


@settings(max_examples=50, deadline=None)
@given(broken_schedules(), st.data())
def test_check_catches_a_duplicated_unit(broken, data):
    schedule, table, (period, stage, role) = broken
    idle = np.flatnonzero(~busy(table)[:, stage, role]).tolist()
    table[data.draw(st.sampled_from(idle)), stage, role] = table[period, stage, role]
    with pytest.raises(AssertionError, match="has run before"):
        check(schedule)


@settings(max_examples=50, deadline=None)
@given(broken_schedules(), st.data())
def test_check_catches_a_wrong_slot(broken, data):
    schedule, table, (period, stage, role) = broken
    slots = table[:, stage, role, Column.SLOT]
    others = np.flatnonzero(busy(table)[:, stage, role] & (slots != slots[period])).tolist()
    assume(others)
    other = data.draw(st.sampled_from(others))
    slots[[period, other]] = slots[[other, period]]
    with pytest.raises(AssertionError, match="slot"):
        check(schedule)


@settings(max_examples=20, deadline=None)
@given(sizes(max_stages=4, max_layers=8), st.sampled_from(Role))
def test_check_catches_a_stash_that_is_too_small(size, role):
    schedule = make_schedule(*size)
    slots = list(schedule.stash_slots)
    slots[role] -= 1
    with pytest.raises(AssertionError, match="is none of the"):
        check(dataclasses.replace(schedule, stash_slots=tuple(slots)))


def test_check_catches_losses_that_are_missing_doubled_or_late():
    missing, doubled, late = (with_copies(make_schedule(4, 2, 4)) for _ in range(3))
    due = np.flatnonzero(missing.loss == 0)[0]
    missing.loss[due] = IDLE
    with pytest.raises(AssertionError, match="micro-batch 0 is never due"):
        check(missing)
    doubled.loss[-1] = 0
    with pytest.raises(AssertionError, match="was due before"):
        check(doubled)
    late.loss[due], late.loss[due + 9] = IDLE, 0
    with pytest.raises(AssertionError, match="makes a message"):
        check(late)


def test_check_catches_a_loss_that_must_share_its_stage_with_a_message():
    schedule = with_copies(make_schedule(4, 2, 4))
    layer_two = (0, 1)  # micro-batch and row of a backward unit on stage 0, which owns the losses
    cells = schedule.backward[:, 0, Role.ATTENTION, :2]
    period = np.flatnonzero((cells == layer_two).all(axis=1))[0]
    schedule.loss[[period, np.flatnonzero(schedule.loss == 3)[0]]] = 3, IDLE
    with pytest.raises(AssertionError, match="layer 2 sends a message"):
        check(schedule)


def test_check_catches_a_training_table_without_backward():
    schedule = make_schedule(2, 2, 4)
    backward = make_forward_schedule(2, 2, 4).backward
    idle = np.resize(backward[0], schedule.backward.shape)
    with pytest.raises(AssertionError, match="stashes nothing"):
        check(dataclasses.replace(schedule, backward=idle))


def test_render_shows_every_unit_in_its_column():
    schedule = make_schedule(4, 2, 8)
    header, periods, *lines = schedule_lib.render(schedule).splitlines()
    assert header.split() == ["warm-up", "steady", "cool-down"]
    assert periods.split() == ["period", "0", "5", "10", "15", "20", "25"]
    assert [line[:11] for line in lines[:4]] == [
        "attention 0", "expert 0   ", "attention 1", "expert 1   ",
    ]  # fmt: skip
    for line, (stage, role) in zip(lines[:4], np.ndindex(2, 2), strict=True):
        for period in range(schedule.num_periods):
            cell = line.ljust(200)[14 + 3 * period :]
            for table, letter, first in ((schedule.forward, cell[0], "A"),
                                         (schedule.backward, cell[1], "a")):  # fmt: skip
                micro_batch = table[period, stage, role, Column.MICRO_BATCH]
                assert letter == chr(ord(first) + micro_batch) or micro_batch == IDLE
    assert lines[4].replace("|", " ").split() == ["loss", *"abcdefgh"]


def test_render_cuts_long_schedules():
    picture = schedule_lib.render(make_schedule(8, 2, 40), max_periods=10)
    assert max(len(line) for line in picture.splitlines()[:7]) < 50
    assert "more periods" in picture


def test_main_prints_the_schedule_of_a_config(capsys):
    config = Config()
    config.model.num_layers, config.split.stages, config.batch.micro_batches = 4, 2, 8
    schedule_lib.main(config, max_periods=0)
    printed = capsys.readouterr().out
    assert "periods                  28 (warm-up 8, steady 11, cool-down 9)" in printed
    assert "stash slots              attention 13, expert 11" in printed
