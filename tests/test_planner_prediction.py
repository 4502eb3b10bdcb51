"""Predictions against what was measured, and properties that any hardware must have."""

import copy
import dataclasses
import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import balanced
from disag_jax.compare import twin_of
from disag_jax.config import Overlap, PlacementKind, Recompute, SplitConfig
from disag_jax.planner import hardware
from disag_jax.planner.costs import Costs
from disag_jax.planner.prediction import (
    expected_load_factor,
    least_seconds,
    predict,
    simulate_step,
    step_seconds,
    total_seconds,
)
from disag_jax.planner.sizes import Sizes

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
H100 = hardware.load("h100")
COLOCATED = PlacementKind.COLOCATED

# Two H100, configs/balanced.py: the compiler's count that check_memory made (docs/design.md, "On
# GPUs"), and the units of benchmarks/README.md.
MEASURED_GIB = {"attention worker": 24.66, "expert worker": 60.65}
MEASURED_MS = {
    "attention_forward": 2.253, "attention_backward": 7.017, "expert_forward": 2.623,
    "expert_backward": 7.464, "loss": 6.092,
}  # fmt: skip


def as_measured():
    """The balanced shape as those measurements had it, before anything was kept."""
    config = balanced.get_config()
    config.run.recompute = Recompute.FULL
    return config


def test_memory_is_what_was_measured():
    memory = predict(as_measured(), H100).memory
    for kind, measured in MEASURED_GIB.items():
        assert memory[kind].total / 2**30 == pytest.approx(measured, rel=0.05)


def test_data_sheet_units_are_near_the_measured_ones():
    units = predict(as_measured(), H100).unit_seconds
    for name, measured in MEASURED_MS.items():
        assert 1e3 * units[name] == pytest.approx(measured, rel=0.25), name


def measured_cases():
    """What `compare` measured over NVLink (benchmarks/results): (config, result) of each run."""
    kept = json.loads((RESULTS / "compare_nvlink.json").read_text())
    assert len(kept["candidates"]) == 4
    for found in kept["candidates"]:
        config = balanced.get_config()
        tokens = config.batch.tokens_per_worker * config.batch.micro_batches
        config.batch.tokens_per_worker = found["tokens_per_worker"]
        config.batch.micro_batches = tokens // found["tokens_per_worker"]
        config.validate()
        yield twin_of(config) if found["placement"] == COLOCATED.value else config, found


def test_the_measured_profile_predicts_the_measured_steps():
    for config, measured in measured_cases():
        found = predict(config, hardware.load("h100x2_nvlink"))
        assert found.step_seconds == pytest.approx(measured["step_seconds"], rel=0.05)
        peaks = measured["peak_memory_gib"]
        for kind, memory in found.memory.items():
            role = kind.removesuffix(" worker")
            (peak,) = {round(gib, 2) for name, gib in peaks.items() if role in name}
            assert memory.total / 2**30 == pytest.approx(peak, rel=0.05), kind
        sheet = predict(config, H100)
        assert sheet.step_seconds == pytest.approx(measured["step_seconds"], rel=0.11)


@st.composite
def configs(draw):
    config = balanced.get_config()
    colocated = draw(st.booleans())
    stages = draw(st.sampled_from((1, 2, 3)))
    config.split = SplitConfig(
        replicas=draw(st.sampled_from((1, 2))),
        stages=stages,
        attention_workers=4 if colocated else draw(st.sampled_from((1, 2, 5))),
        expert_workers=draw(st.sampled_from((1, 2, 4))),
        hop=1 if colocated else draw(st.sampled_from((1, 2))),
        placement=COLOCATED if colocated else PlacementKind.DISAGGREGATED,
    )
    config.model.top_k = draw(st.sampled_from((2, 6)))
    config.batch.micro_batches = draw(st.integers(1, 20))
    config.run.recompute = draw(st.sampled_from(list(Recompute)))
    if colocated and config.split.expert_workers > 1:
        is_alike = config.run.recompute is Recompute.NONE
        degrees = (4, 4) if is_alike else draw(st.sampled_from(((1, 2), (4, 2), (4, 4))))
        ways = [(Overlap.NONE, 1, 1), (Overlap.CHUNKED, *degrees)]
        if config.batch.micro_batches > 1:
            ways.append((Overlap.INTERLEAVED, 1, 1))
        overlap, forward, backward = draw(st.sampled_from(ways))
        config.split = dataclasses.replace(
            config.split, overlap=overlap, forward_chunks=forward, backward_chunks=backward
        )
    return config.validate()


@settings(max_examples=60)
@given(configs(), st.data())
def test_better_hardware_never_makes_a_slower_step(config, data):
    base = step_seconds(config, H100)
    rate = data.draw(st.sampled_from(("product_tflops", "memory_gigabytes_per_second")))
    faster = dataclasses.replace(H100, **{rate: 1.5 * getattr(H100, rate)})
    assert step_seconds(config, faster) <= base * (1 + 1e-12)
    for name in ("intra_node", "inter_node"):
        better = dataclasses.replace(H100, **{name: getattr(H100, name).scaled(1.5)})
        assert step_seconds(config, better) <= base * (1 + 1e-12)


@settings(max_examples=60)
@given(configs(), st.floats(1, 3))
def test_skew_never_makes_a_faster_step(config, load_factor):
    even = step_seconds(config, H100, 1.0)
    assert step_seconds(config, H100, load_factor) >= even * (1 - 1e-12)


@settings(max_examples=60)
@given(configs())
def test_a_prediction_adds_up_and_respects_its_bound(config):
    found = predict(config, H100)
    for worker in found.workers:
        total = worker.busy + worker.exposed + worker.idle
        assert total == pytest.approx(found.step_seconds)
        assert worker.idle >= -1e-9 and worker.busy > 0 and worker.exposed >= 0
    costs = Costs(Sizes.of(config, found.load_factor), H100)
    assert least_seconds(costs) <= found.step_seconds * (1 + 1e-12)
    assert total_seconds(costs, simulate_step(costs)) == found.step_seconds
    assert 0 < found.mfu < 1


def test_more_nodes_need_the_network():
    config = balanced.get_config()
    config.split = SplitConfig(stages=2, attention_workers=2, expert_workers=2)
    near = predict(config, H100)
    config.split = SplitConfig(stages=3, attention_workers=2, expert_workers=2)
    far = predict(config, H100)
    assert far.transfers["many-to-many forward"] > 5 * near.transfers["many-to-many forward"]


def test_the_busiest_worker_is_busier_with_fewer_tokens():
    config = balanced.get_config()
    assert expected_load_factor(config) == 1  # one expert worker has everything
    config.split.expert_workers = 8
    few = copy.deepcopy(config)
    few.batch.tokens_per_worker //= 2
    assert 1 < expected_load_factor(config) < expected_load_factor(few) < 1.1
