"""The model of chunked layers against the paper's table, a simulated pipeline and all degrees."""

import dataclasses
import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from disag_jax.chunk_model import (
    Bound,
    LayerTimes,
    Operation,
    Reduction,
    best_chunks,
    fill_idle_links,
    idle_link_seconds,
    in_step_seconds,
    layer_seconds,
    partition_gradients,
    reduced_layer_seconds,
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


def simulated_in_step(times: LayerTimes, r: int) -> float:
    """The loop of `ColocatedPhases._through_experts`, chunk by chunk, with a list of what is made.

    At a barrier compute and link wait for each other.
    """
    latency, seconds = times.all_to_all.latency, times.all_to_all.seconds / r
    clock, waiting, made = latency + seconds, list(range(1, r)), []
    for chunk in range(r):
        sent = waiting[:1] + made
        waiting, made = waiting[1:], [chunk]
        exchange = latency + len(sent) * seconds if sent else 0.0
        clock += max(times.experts.of_chunk(r), exchange)
    return clock + latency + seconds


@given(OPERATIONS, OPERATIONS, st.sampled_from(DEGREES))
def test_chunks_in_step_take_what_the_loop_takes(all_to_all, experts, r):
    times = LayerTimes(all_to_all, experts)
    assert in_step_seconds(times, r) == pytest.approx(simulated_in_step(times, r), rel=1e-12)


@given(OPERATIONS, OPERATIONS, st.sampled_from(DEGREES))
def test_going_in_step_costs_what_the_papers_free_running_pipeline_does_not(all_to_all, experts, r):
    # One exchange of two chunks has one latency, which the paper's bounds count twice.
    times = LayerTimes(dataclasses.replace(all_to_all, latency=0.0), experts)
    paper, _ = layer_seconds(times, r)
    assert in_step_seconds(times, r) >= paper * (1 - 1e-12)
    work, exchange = experts.of_chunk(r), times.all_to_all.of_chunk(r)
    if r < 3 or not exchange < work < 2 * exchange:
        assert in_step_seconds(times, r) == pytest.approx(paper, rel=1e-9)


@given(OPERATIONS, OPERATIONS, OPERATIONS, st.sets(st.sampled_from(DEGREES), min_size=1))
def test_the_best_degree_is_that_of_brute_force(all_to_all, experts, backward, candidates):
    both = [LayerTimes(all_to_all, experts), LayerTimes(all_to_all, backward)]
    for times in (both[:1], both):
        chosen = best_chunks(lambda _, times=times: times, candidates)
        assert chosen in candidates
        least = min(sum(simulated_in_step(one, r) for one in times) for r in candidates)
        found = sum(simulated_in_step(one, chosen) for one in times)
        assert found == pytest.approx(least, rel=1e-9)


def test_times_may_depend_on_the_degree():
    # Padding to whole tiles: a chunk of few rows takes as long as one of many.
    def times(r):
        return [LayerTimes(Operation(0.01, 1.0), Operation(latency=max(0.5, 2.0 / r)))]

    assert best_chunks(times, DEGREES) == 4


def test_forward_and_backward_degrees_differ():
    """Backward, experts work longer and cost more a chunk."""
    forward = LayerTimes(Operation(0.05, 1.0), Operation(0.1, 2.0))
    backward = dataclasses.replace(forward, experts=Operation(0.4, 4.0))
    assert best_chunks(lambda r: [forward], DEGREES) == 4
    assert best_chunks(lambda r: [backward], DEGREES) == 2


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


LINK = Reduction(latency=0.5, bytes_per_second=2.0)


def divisions(total: int, places: int):
    """Every way to put `total` equal parts in so many places."""
    for cuts in itertools.combinations(range(total + places - 1), places - 1):
        edges = (-1, *cuts, total + places - 1)
        yield [b - a - 1 for a, b in itertools.pairwise(edges)]


def is_there(pieces, sizes) -> bool:
    """Whether no layer reduces gradients that are not made yet."""
    return all(
        sum(pieces[: i + 1]) <= sum(sizes[:i]) * (1 + 1e-9) + 1e-9 for i in range(len(sizes))
    )


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=4))
def test_no_division_hides_more_than_the_greedy_one(layers):
    # Whole bytes: half a second each, behind the latency.
    sizes = [made for made, _ in layers]
    room = [capacity for _, capacity in layers]
    found = fill_idle_links([0.5 + capacity / 2 for capacity in room], sizes, LINK)
    assert sum(found) == sum(sizes) and is_there(found[:-1], sizes)
    hidden = [
        sum(pieces[:-1])
        for pieces in divisions(sum(sizes), len(sizes) + 1)
        if is_there(pieces[:-1], sizes) and all(p <= c for p, c in zip(pieces, room, strict=False))
    ]
    assert sum(found[:-1]) == max(hidden)


def test_a_layer_without_time_for_the_latency_reduces_nothing():
    assert fill_idle_links([9.0, 0.4, 1.5, 9.0], [3.0, 1.0, 1.0, 2.0], LINK) == [0, 0, 2, 3, 2]


LAYERS = st.builds(
    LayerTimes,
    st.builds(Operation, latency=st.floats(0.01, 1.0), seconds=st.floats(0.1, 4.0)),
    st.builds(Operation, latency=st.floats(0.01, 1.0), seconds=st.floats(0.1, 8.0)),
)


@given(
    st.lists(st.tuples(LAYERS, st.sampled_from((0.0, 0.5, 2.0, 6.0))), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_the_rest_goes_where_it_costs_least(made, parts):
    layers, sizes = [times for times, _ in made], [size for _, size in made]
    degrees = (1, 2, 4)

    def seconds(pieces):
        in_layers = sum(
            min(
                layer_seconds(
                    dataclasses.replace(times, gradient_reduction=LINK.seconds(piece)), r
                )[0]
                for r in degrees
            )
            for times, piece in zip(layers, pieces, strict=False)
        )
        return in_layers + LINK.seconds(pieces[-1])

    found = partition_gradients(layers, sizes, LINK, degrees, parts)
    assert sum(found) == pytest.approx(sum(sizes)) and min(found) >= -1e-9
    assert is_there(found[:-1], sizes)
    idle = [idle_link_seconds(t, min(degrees, key=lambda r: layer_seconds(t, r)[0]))
            for t in layers]  # fmt: skip
    *first, rest = fill_idle_links(idle, sizes, LINK)
    tried = []
    for counts in divisions(parts, len(layers) + 1):
        pieces = [piece + n * rest / parts for piece, n in zip((*first, 0), counts, strict=True)]
        if is_there(pieces[:-1], sizes):
            tried.append(seconds(pieces))
    assert seconds(found) <= min(tried) + 1e-6
    # And no worse than all of it behind the last layer.
    assert seconds(found) <= seconds([0.0] * len(layers) + [sum(sizes)]) + 1e-6


def test_a_layer_takes_more_than_its_idle_link_for_fewer_chunks():
    """With a long reduction one chunk is best: it has fewer latencies on the same link."""
    chunky = LayerTimes(Operation(0.4, 0.4), Operation(0.0, 8.0))
    assert reduced_layer_seconds(chunky, 0, LINK, (1, 4)) == layer_seconds(chunky, 4)[0]
    assert reduced_layer_seconds(chunky, 99, LINK, (1, 4)) == pytest.approx(
        2 * 0.8 + LINK.seconds(99)
    )
