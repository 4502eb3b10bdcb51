"""Predicted twins against a walk through their loop, in the order of the loop's own code."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import balanced
from disag_jax.config import Overlap, PlacementKind, Recompute, SplitConfig
from disag_jax.planner import hardware, twin
from disag_jax.planner.costs import Costs, expert_work
from disag_jax.planner.prediction import predict, simulate_step
from disag_jax.planner.simulator import make_table
from disag_jax.planner.sizes import Sizes, expert_parameters, half_full_tiles
from disag_jax.schedule import IDLE, Column, make_schedule
from mesh.roles import Role

H100 = hardware.load("h100")
DEGREES = (1, 2, 4, 8)
CHUNKED = [pair for pair in itertools.product(DEGREES, DEGREES) if pair != (1, 1)]
OVERLAPS = [dict(overlap=Overlap.NONE), dict(overlap=Overlap.INTERLEAVED)] + [
    dict(overlap=Overlap.CHUNKED, forward_chunks=f, backward_chunks=b) for f, b in CHUNKED
]


def a_twin(overlap, workers=2, **batch):
    config = balanced.get_config()
    config.split = SplitConfig(
        attention_workers=workers, expert_workers=workers, placement=PlacementKind.COLOCATED,
        **overlap,
    )  # fmt: skip
    config.batch = dataclasses.replace(config.batch, **batch)
    config.run = dataclasses.replace(config.run, recompute=Recompute.SELECTIVE)
    return config.validate()


def costs_of(config, scale=1.0, **changes):
    device = dataclasses.replace(H100, intra_node=H100.intra_node.scaled(scale), **changes)
    return Costs(Sizes.of(config, 1.0), device)


def exchanged(costs, unit, has_unit):
    """A phase's chunks through the experts: what is under way beside which chunk, one by one."""
    sizes, count = costs.sizes, costs.chunks[unit]
    words = sizes.message_bytes if unit == "expert_forward" else sizes.cotangent_bytes
    link = costs.hardware.intra_node.all_to_all
    others = costs.config.split.expert_workers - 1

    def exchange(num_chunks):
        return link.seconds(others * num_chunks * words / count) if num_chunks else 0.0

    clock, waiting, made = exchange(1), count - 1, 0
    for _ in range(count):
        sent = min(waiting, 1) + made
        waiting, made = waiting - min(waiting, 1), 1
        clock += max(has_unit * costs.unit_seconds[unit] / count, exchange(sent))
    return clock + exchange(1), exchange(1)


def walked(costs) -> float:
    """Seconds of the loop of a twin with one stage (disag_jax/pipeline.py), period by period."""
    config, units = costs.config, costs.unit_seconds
    overlap = config.split.overlap
    schedule = make_schedule(
        config.model.num_layers, 1, config.batch.micro_batches, 1, colocated=True
    )

    def has_unit(table, t):
        return table[t, 0, Role.ATTENTION, Column.MICRO_BATCH] != IDLE

    seconds = 0.0
    for segment in schedule.segments:
        for t in range(segment.begin, segment.end):
            forward, backward = has_unit(schedule.forward, t), has_unit(schedule.backward, t)
            there, sent = exchanged(costs, "expert_forward", forward)
            back, returned = exchanged(costs, "expert_backward", backward)
            if segment.has_forward and segment.has_backward and overlap is Overlap.INTERLEAVED:
                beside = (
                    (returned, forward * units["attention_forward"]),
                    (sent, backward * units["expert_backward"]),
                    (returned, forward * units["expert_forward"]),
                    (sent, backward * units["attention_backward"]),
                )
                seconds += sum(max(pair) for pair in beside)
            else:
                if segment.has_forward:
                    dealt = costs.regroup_seconds(*costs.chunks.values())
                    seconds += forward * units["attention_forward"] + there
                    seconds += forward * max(0.0, dealt - sent)
                if segment.has_backward:
                    attention = backward * units["attention_backward"]
                    reduced = 0.0
                    if not segment.has_forward and overlap is not Overlap.NONE:
                        reduced = costs.reduce_layer
                    seconds += back + max(attention, reduced)
            if schedule.loss[t] != IDLE:
                seconds += units["loss"]
    return seconds


@settings(max_examples=30)
@given(
    st.sampled_from(OVERLAPS), st.sampled_from((2, 4)), st.integers(2, 9),
    st.sampled_from((1.0, 0.1, 0.02)),
)  # fmt: skip
def test_a_prediction_is_a_walk_through_the_loop(overlap, workers, micro_batches, scale):
    costs = costs_of(a_twin(overlap, workers, micro_batches=micro_batches), scale)
    for shorten in (True, False):
        found = simulate_step(costs, shorten=shorten).seconds
        assert found == pytest.approx(walked(costs), rel=1e-9)


@pytest.mark.parametrize("overlap", OVERLAPS[1:4], ids=str)
def test_a_layers_gradients_are_summed_in_the_loop_or_behind_it(overlap):
    blocking, twin_costs = (costs_of(a_twin(one), 0.01) for one in (OVERLAPS[0], overlap))
    layers = blocking.config.model.num_layers
    link = blocking.hardware.intra_node.all_reduce
    # A ring of two moves the array once.
    num_bytes = 4 * blocking.sizes.layer_parameters[Role.ATTENTION]
    behind = blocking.reduce_gradients - twin_costs.reduce_gradients
    assert behind == pytest.approx(link.seconds(layers * num_bytes) - link.seconds(num_bytes))
    phases = twin.alone(twin_costs), twin.cool_down(twin_costs)
    assert phases[1].idle_backward - phases[0].idle_backward == twin_costs.reduce_layer
    assert twin.cool_down(blocking) == twin.alone(blocking)


@pytest.mark.parametrize("chunks", DEGREES)
def test_each_chunk_pads_its_tiles_and_reads_the_weights_again(chunks):
    config = a_twin(OVERLAPS[0])
    sizes = Sizes.of(config)
    part, whole = expert_work(sizes.in_chunks(chunks)), expert_work(sizes)
    more = chunks - 1
    padding = half_full_tiles(config) * 2 * expert_parameters(config.model)
    weights = 32 * expert_parameters(config.model)
    assert chunks * part["expert_forward"].products == pytest.approx(
        whole["expert_forward"].products + more * padding
    )
    for unit, bytes_per_weight in (("expert_forward", 2), ("expert_backward", 2 + 4 + 4)):
        extra = chunks * part[unit].num_bytes - whole[unit].num_bytes
        # The room for sorted rows grows too, by what the worst case pads.
        assert extra >= more * weights * bytes_per_weight
        assert extra <= more * weights * bytes_per_weight * 1.2
    overhead = dataclasses.replace(H100, unit_overhead_microseconds=1000.0)
    config = a_twin(dict(overlap=Overlap.CHUNKED, forward_chunks=8, backward_chunks=1))
    long, short = (Costs(Sizes.of(config), one).unit_seconds for one in (overhead, H100))
    launch = 1e-6 * (1000.0 - H100.unit_overhead_microseconds)
    assert long["expert_forward"] - short["expert_forward"] == pytest.approx(8 * launch)
    assert long["expert_backward"] - short["expert_backward"] == pytest.approx(launch)


@settings(max_examples=30)
@given(
    st.sampled_from((1.0, 0.1, 0.02, 0.005)), st.booleans(),
    st.sets(st.sampled_from(DEGREES), min_size=1),
)  # fmt: skip
def test_the_best_degrees_are_those_of_trying_every_pair(scale, alike, candidates):
    costs = costs_of(a_twin(OVERLAPS[0]), scale)
    chosen = twin.best_degrees(costs, sorted(candidates), alike=alike)

    def seconds(pair):
        forward, backward = (twin.alone(costs_of(config_of(pair), scale))[i] for i in range(2))
        return forward + backward

    def config_of(pair):
        if pair == (1, 1):
            return a_twin(OVERLAPS[0])
        return a_twin(
            dict(overlap=Overlap.CHUNKED, forward_chunks=pair[0], backward_chunks=pair[1])
        )

    pairs = [
        pair for pair in itertools.product(candidates, candidates)
        if not alike or pair[0] == pair[1]
    ]  # fmt: skip
    assert chosen in pairs
    # Dealing rows again may be hidden more or less by the last exchange of another forward degree.
    slack = costs.regroup_seconds(1, 2) * (not alike)
    assert seconds(chosen) <= min(map(seconds, pairs)) + slack + 1e-12


def test_two_phases_in_turns_hold_both_phases_messages():
    blocking, in_turns = (predict(a_twin(one), H100).memory["worker"] for one in OVERLAPS[:2])
    sizes = Sizes.of(a_twin(OVERLAPS[0]), 1.0)
    messages = 2 * (sizes.message_bytes + sizes.cotangent_bytes)
    assert in_turns.transport - blocking.transport == pytest.approx(messages)
    assert in_turns.stash == blocking.stash
    apart = predict(a_twin(OVERLAPS[2]), H100).memory["worker"]
    assert apart.stash > blocking.stash and apart.workspace < blocking.workspace


def test_only_units_with_a_transfer_beside_them_are_slower():
    lost = {f"{role}_{phase}": 0.1 for role in ("attention", "expert")
              for phase in ("forward", "backward")}  # fmt: skip
    for overlap, expected in (
        (OVERLAPS[0], set()),
        (OVERLAPS[1], set(lost)),
        (dict(overlap=Overlap.CHUNKED, forward_chunks=2), {"expert_forward"}),
    ):
        costs = costs_of(a_twin(overlap), lost_beside_transfers=lost)
        base = costs_of(a_twin(overlap)).unit_seconds
        sizes, chunks = costs.sizes, costs.chunks
        hidden = {"forward": sizes.cotangent_bytes, "backward": sizes.message_bytes}
        if overlap["overlap"] is Overlap.CHUNKED:
            hidden = {"forward": sizes.message_bytes}
        for name in base:
            seconds = 0.0
            if name in expected:
                degree = chunks.get(name, 1)
                exchange = costs.exchange(hidden[name.split("_")[1]], degree)
                seconds = 0.1 * degree * min(exchange.of_chunk(degree), base[name] / degree)
            assert costs.unit_seconds[name] - base[name] == pytest.approx(seconds, abs=1e-12)


def test_hidden_states_between_stages_are_exposed_by_phases_in_turns():
    config = a_twin(OVERLAPS[1], micro_batches=8)
    config.split = dataclasses.replace(config.split, stages=2)
    costs = costs_of(config, 0.05)
    run = simulate_step(costs, shorten=False)
    table = make_table(6, 2, 8, 1, True)
    full = table.forward.all(axis=1) & table.backward.all(axis=1) & ~table.loss
    seconds = (run.end - run.begin)[full]
    phases = twin.interleaved(costs)
    both = costs.forward_transfer + costs.backward_transfer
    assert both > 0 and len(seconds) > 5
    assert seconds == pytest.approx(phases.forward + phases.backward + both, rel=1e-6)
