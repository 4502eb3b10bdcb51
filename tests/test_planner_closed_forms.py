"""Closed forms against an event simulation, and one of them against our own schedule."""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from disag_jax.planner.closed_forms import (
    LayerTimes,
    fills_the_pipeline,
    findep_seconds,
    megascale_infer_seconds,
    simulate_seconds,
)
from disag_jax.planner.simulator import Timing, execute, make_table
from disag_jax.schedule import Segment

times = st.floats(0.01, 10)


@settings(max_examples=300)
@given(
    times, st.floats(0, 10), times, times, st.integers(1, 4), st.integers(1, 5), st.integers(1, 12)
)
def test_findeps_form_is_exact_with_the_chunks_counted_once(a, s, c, e, chunks, r1, layers):
    layer = LayerTimes(a, s, c, e, chunks)
    assert findep_seconds(layer, r1, layers) == pytest.approx(simulate_seconds(layer, r1, layers))


def test_findeps_form_as_printed_counts_chunks_twice():
    layer = LayerTimes(1.0, 0.0, 2.0, 3.0, chunks=3)
    as_printed = findep_seconds(layer, 2, 2) + (layer.chunks - 1) * 3.0
    assert as_printed > 1.1 * simulate_seconds(layer, 2, 2)


@settings(max_examples=200)
@given(times, times, st.integers(1, 8), st.integers(1, 12))
def test_megascale_infers_form_is_exact_where_its_conditions_hold(equal, c, m, layers):
    assume(fills_the_pipeline(equal, equal, c, m))
    formula = megascale_infer_seconds(equal, equal, c, m, layers)
    layer = LayerTimes(equal, 0.0, c, equal)
    assert simulate_seconds(layer, m, layers) == pytest.approx(formula)


@settings(max_examples=200)
@given(times, times, times, st.integers(1, 8), st.integers(1, 12))
def test_megascale_infers_form_is_an_upper_bound_for_unequal_roles(a, e, c, m, layers):
    assume(fills_the_pipeline(a, e, c, m))
    formula = megascale_infer_seconds(a, e, c, m, layers)
    assert simulate_seconds(LayerTimes(a, 0.0, c, e), m, layers) <= formula * (1 + 1e-9)


def test_too_few_micro_batches_leave_the_pipeline_empty():
    assert not fills_the_pipeline(1.0, 1.0, 0.4, 2)
    assert fills_the_pipeline(1.0, 1.0, 0.4, 3)  # m >= 3 where T_c < T_f / 2
    assert not fills_the_pipeline(1.0, 1.0, 0.9, 3)
    assert fills_the_pipeline(1.0, 1.0, 0.9, 4)
    formula = megascale_infer_seconds(1.0, 1.0, 0.4, 2, 10)
    assert simulate_seconds(LayerTimes(1.0, 0.0, 0.4, 1.0), 2, 10) > 1.2 * formula


@settings(max_examples=60)
@given(times, st.floats(0, 1), st.integers(1, 12))
def test_our_own_table_run_forward_takes_what_megascale_infer_says(equal, share, num_layers):
    # One stage, hop 2: four micro-batches in flight, and transfers beside the units.
    transfer, m = share * equal, 4
    assume(fills_the_pipeline(equal, equal, transfer, m))
    table = make_table(num_layers, 1, m, 2, False)
    periods = 4 * num_layers + 2
    forward = dataclasses.replace(
        table, forward=table.forward[:periods], backward=table.backward[:periods] & False,
        loss=table.loss[:periods] & False, segments=(Segment(0, periods, True, False),),
    )  # fmt: skip
    assert forward.forward.sum() == table.forward.sum()
    unit, none = np.full(2, equal), np.zeros(2)
    timing = Timing(unit, unit, none, none, transfer, transfer, 1, none, None, 0.0)
    formula = megascale_infer_seconds(equal, equal, transfer, m, num_layers)
    # The table ends with the last unit, the formula with its message's way back.
    assert execute(forward, timing).seconds == pytest.approx(formula - transfer)
