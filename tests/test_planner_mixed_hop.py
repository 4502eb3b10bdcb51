"""Hop 1 forward and 2 backward: the table can be executed, and no faster one exists."""

import copy
import itertools
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import qwen3_235b
from disag_jax.config import SplitConfig
from disag_jax.planner import hardware, mixed_hop
from disag_jax.planner.costs import Costs
from disag_jax.planner.mixed_hop import make_mixed_schedule
from disag_jax.planner.prediction import predict, simulate_step, total_seconds
from disag_jax.planner.sizes import Sizes
from disag_jax.schedule import make_schedule
from disag_jax.schedule_check import check


@settings(max_examples=80)
@given(st.integers(1, 4), st.integers(0, 8), st.integers(1, 40))
def test_every_table_can_be_executed(stages, more_layers, micro_batches):
    schedule = make_mixed_schedule(stages + more_layers, stages, micro_batches)
    check(schedule, backward_hop=2)
    with pytest.raises(AssertionError, match="makes a message that is used in period"):
        check(schedule)


def cells(num_layers: int, stages: int) -> tuple[set, set]:
    """(what a micro-batch that starts in period 0 takes, what of it a message is sent from).

    A cell is a phase of a worker, or sending backward from an attention stage, in a period.
    """
    taken, sends = set(), set()
    last = 6 * num_layers
    for layer, role in itertools.product(range(num_layers), range(2)):
        stage, unit = layer % stages, 2 * layer + role
        taken.add(("forward", stage, role, unit))
        taken.add(("backward", stage, role, last - 2 * unit))
        if role == 0 and layer > 0:
            sends.add((stage, last - 2 * unit))
    sends.add((num_layers % stages, 2 * num_layers))  # the loss
    return taken, sends


def collides(num_layers: int, stages: int, distance: int) -> bool:
    """Whether two micro-batches that start so many periods apart want the same cell."""
    return any(
        {(*where, period + distance) for *where, period in part}
        & {(*where, period) for *where, period in part}
        for part in cells(num_layers, stages)
    )


def fewest_periods(allowed, count: int, limit: int) -> int:
    """Least last start of so many micro-batches whose distances are all allowed; tries all."""

    def extend(starts, last):
        if len(starts) == count:
            return starts[-1]
        best = last
        for start in range(starts[-1] + 1, last):
            if all(allowed[start - other] for other in starts):
                best = min(best, extend([*starts, start], best))
        return best

    return extend([0], limit)


SMALL = [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5), (2, 6), (3, 3), (3, 5)]


@pytest.mark.parametrize("stages, num_layers", SMALL)
def test_no_table_starts_micro_batches_faster(stages, num_layers):
    """Over all sets of starts, by trying them; distances as the module's docstring has them."""
    rows = -(-num_layers // stages)
    limit = 8 * stages * (rows + 2)
    allowed = [not collides(num_layers, stages, distance) for distance in range(limit)]
    forbidden = {2 * stages * j for j in range(1, rows)} | {4 * stages * j for j in range(1, rows)}
    assert {d for d in range(1, limit) if not allowed[d]} == forbidden
    for count in range(1, 4 * stages + 2):
        schedule = make_mixed_schedule(num_layers, stages, count)
        last = schedule.num_periods - 1 - 6 * num_layers
        assert last == fewest_periods(allowed, count, last + 1)


def test_even_rows_cost_one_row_a_wave_and_odd_ones_nothing():
    def periods_of_a_wave(make, num_layers):
        ends = [make(num_layers, 2, 4 * waves).num_periods for waves in (3, 4)]
        return ends[1] - ends[0]

    for num_layers in range(2, 13):
        rows = -(-num_layers // 2)
        assert periods_of_a_wave(make_schedule, num_layers) == 4 * rows
        expected = 4 * (rows + 1 - rows % 2)
        assert periods_of_a_wave(make_mixed_schedule, num_layers) == expected


@given(st.integers(1, 4), st.integers(0, 8))
def test_the_stash_is_between_the_hops(stages, more_layers):
    num_layers = stages + more_layers
    count = 16 * stages * num_layers
    slots = [
        np.array(schedule.stash_slots)
        for schedule in (
            make_schedule(num_layers, stages, count),
            make_mixed_schedule(num_layers, stages, count),
            make_schedule(num_layers, stages, count, 2),
        )
    ]
    assert (slots[0] <= slots[1]).all() and (slots[1] <= slots[2]).all()


def test_equal_hops_are_priced_as_the_planner_predicts_them():
    config = qwen3_235b.get_config()
    config.split = SplitConfig(stages=4, attention_workers=4, expert_workers=4)
    config.batch.micro_batches = 24
    h800 = hardware.load("h800")
    found = mixed_hop.prices(config.validate(), h800)
    for hop in (1, 2):
        alike = copy.deepcopy(config)
        alike.split.hop = hop
        # Messages without padding have the same size as the planner's at an even load.
        predicted = predict(alike, h800, 1.0)
        costs = Costs(Sizes.of(alike, 1.0), h800, copies_boxes=False)
        seconds = total_seconds(costs, simulate_step(costs))
        assert found[hop, hop].seconds == pytest.approx(seconds)
        assert found[hop, hop].stash_bytes == predicted.memory["expert worker"].stash


def test_docs_have_the_figures():
    written = (pathlib.Path(__file__).parents[1] / "docs" / "planner.md").read_text()
    for row in mixed_hop.rows():
        assert f"| {' | '.join(row)} |" in written
