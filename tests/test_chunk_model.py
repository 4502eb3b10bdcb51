"""The model of chunked layers against the paper's table, a simulated pipeline and all degrees."""

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from disag_jax.chunk_model import (
    Bound,
    LayerTimes,
    Operation,
    best_chunks,
    idle_link_seconds,
    layer_seconds,
)

DEGREES = [1, 2, 3, 4, 6, 8, 12, 24]
SECONDS = st.floats(0.0, 10.0)
OPERATIONS = st.builds(Operation, latency=st.floats(0.01, 2.0), seconds=SECONDS)
GRADIENTS = st.one_of(st.just(0.0), SECONDS)


def published_case(times: LayerTimes, r: int) -> tuple[float, Bound]:
    """FSMoE's table as it is printed: conditions Q1 to Q7 and the times of four cases."""
    a2a, exp, ag, rs = (
        operation.of_chunk(r)
        for operation in (times.all_to_all, times.experts, times.all_gather, times.reduce_scatter)
    )
    gar = times.gradient_reduction
    q1, q2, q3 = a2a > ag, r * exp > 2 * (r - 1) * a2a, r * exp > (r - 1) * (ag + rs)
    q4, q5 = gar > ag + rs, gar > r * exp - 2 * (r - 1) * a2a + ag + rs
    q6 = gar > r * ag + r * rs - 2 * (r - 1) * a2a
    q7 = gar > ag + rs + r * exp - 2 * (r - 1) * a2a
    if (q1 and not q2 and q4) or (q1 and q2 and q5):
        return 2 * r * a2a + gar, Bound.INTER_NODE
    if (not q1 and not q3 and q6) or (not q1 and q3 and q7):
        return 2 * r * a2a + gar, Bound.INTER_NODE
    if (q1 and q2 and not q5) or (not q1 and q3 and not q7):
        return 2 * a2a + ag + rs + r * exp, Bound.EXPERTS
    if q1:
        return 2 * r * a2a + ag + rs, Bound.ALL_TO_ALL
    return 2 * a2a + r * ag + r * rs, Bound.INTRA_NODE


def simulated(times: LayerTimes, r: int) -> float:
    """Chunks of whole experts on one link and one device: every dispatch, gradients, combines."""
    a2a, exp = times.all_to_all.of_chunk(r), times.experts.of_chunk(r)
    link, compute, finished = 0.0, 0.0, []
    for _ in range(r):
        link += a2a
        compute = max(compute, link) + exp
        finished.append(compute)
    link += times.gradient_reduction
    for ready in finished:
        link = max(link, ready) + a2a
    return link


@given(OPERATIONS, OPERATIONS, OPERATIONS, GRADIENTS, st.sampled_from(DEGREES))
def test_the_largest_bound_is_the_published_case(all_to_all, experts, gather, gradients, r):
    times = LayerTimes(all_to_all, experts, gather, gather, gradients)
    seconds, bound = published_case(times, r)
    found, found_bound = layer_seconds(times, r)
    assert found == pytest.approx(seconds, rel=1e-9)
    # Equal bounds are told apart by rounding.
    assert found_bound is bound or published_case(times, r)[0] == pytest.approx(found)


@pytest.mark.parametrize(
    "times, bound",
    [
        (LayerTimes(Operation(0, 4), Operation(0, 1), gradient_reduction=9), Bound.INTER_NODE),
        (LayerTimes(Operation(0, 1), Operation(0, 9)), Bound.EXPERTS),
        (
            LayerTimes(Operation(0, 8), Operation(0, 1), Operation(0, 1), Operation(0, 1)),
            Bound.ALL_TO_ALL,
        ),
        (
            LayerTimes(Operation(0, 1), Operation(0, 1), Operation(0, 8), Operation(0, 8)),
            Bound.INTRA_NODE,
        ),
    ],
    ids=[bound.name for bound in Bound],
)
def test_each_case_is_reached(times, bound):
    assert layer_seconds(times, 4)[1] is bound == published_case(times, 4)[1]


@given(OPERATIONS, OPERATIONS, GRADIENTS, st.sampled_from(DEGREES))
def test_without_sharded_experts_the_model_is_the_pipeline(all_to_all, experts, gradients, r):
    times = LayerTimes(all_to_all, experts, gradient_reduction=gradients)
    assert layer_seconds(times, r)[0] == pytest.approx(simulated(times, r), rel=1e-9)


@given(OPERATIONS, OPERATIONS, GRADIENTS, st.sets(st.sampled_from(DEGREES), min_size=1))
def test_the_best_degree_is_that_of_brute_force(all_to_all, experts, gradients, candidates):
    times = LayerTimes(all_to_all, experts, gradient_reduction=gradients)
    chosen = best_chunks(times, candidates)
    assert chosen in candidates
    least = min(simulated(times, r) for r in candidates)
    assert simulated(times, chosen) == pytest.approx(least, rel=1e-9)


def test_forward_and_backward_degrees_differ():
    """Backward, experts work longer, and more chunks hide the same all-to-all no better."""
    forward = LayerTimes(Operation(0.05, 1.0), Operation(0.2, 2.0))
    backward = dataclasses.replace(forward, experts=Operation(0.4, 4.0), gradient_reduction=2.0)
    assert best_chunks(forward, DEGREES) == 3
    assert best_chunks(backward, DEGREES) == 2


@given(OPERATIONS, OPERATIONS, OPERATIONS, OPERATIONS, st.sampled_from(DEGREES))
def test_a_gradient_reduction_as_long_as_the_idle_link_is_free(
    all_to_all, experts, gather, scatter, r
):
    times = LayerTimes(all_to_all, experts, gather, scatter)
    idle = idle_link_seconds(times, r)
    assume(idle > 0)
    for seconds, grows in ((0.99 * idle, 0.0), (idle + 0.5, 0.5)):
        reduced = dataclasses.replace(times, gradient_reduction=seconds)
        growth = layer_seconds(reduced, r)[0] - layer_seconds(times, r)[0]
        assert growth == pytest.approx(grows, abs=1e-9)
