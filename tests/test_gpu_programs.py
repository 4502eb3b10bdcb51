"""What the GPU's compiler makes of the training pipeline; it needs JAX's CUDA plugin, and no GPU.

In an environment with requirements.txt and Python 3.12: python -m pytest -m gpu_program. With jax
0.10, which Python 3.11 has, 14 of 15 fail: that compiler copies what the loop changes in place.
"""

import collections
import dataclasses
import importlib
import math
import re

import jax
import pytest

from configs import balanced
from disag_jax import dry_run, overlap
from disag_jax.config import SplitConfig
from disag_jax.pipeline import make_phases
from disag_jax.planner.hardware import load
from layers import target
from mesh import absent
from tests.test_compiled import COPY, loop_buffers
from tests.test_gpu import CHUNKED, INTERLEAVED, PAIR, TWIN, bfloat16_config

pytestmark = [
    pytest.mark.gpu_program,
    pytest.mark.skipif(absent.cuda_plugin() is None, reason="needs JAX's CUDA plugin"),
]

SPLITS = {
    "1 + 1": PAIR,
    "1 + 1, hop 2": dataclasses.replace(PAIR, hop=2),
    "1 + 1, the loss not shared": dataclasses.replace(PAIR, loss_share=1.0),
    "1 + 1, hop 2, the loss not shared": dataclasses.replace(PAIR, hop=2, loss_share=1.0),
    "2 + 2": dataclasses.replace(PAIR, attention_workers=2, expert_workers=2),
    "3 + 1, hop 2": dataclasses.replace(PAIR, attention_workers=3, hop=2),
    "1 + 3": dataclasses.replace(PAIR, expert_workers=3),
    "two stages": dataclasses.replace(PAIR, stages=2),
    "twin in chunks": CHUNKED,
    "interleaved twin": INTERLEAVED,
}


@pytest.fixture(autouse=True)
def no_traces_for_the_cpu():
    jax.clear_caches()
    yield
    jax.clear_caches()


def compiled(split: SplitConfig):
    """(program in text form, stepper) on absent H100s."""
    config = bfloat16_config(split)
    config.batch = dataclasses.replace(config.batch, micro_batches=6)
    program, stepper = dry_run.compile_for_gpus(config, absent.H100)
    return program.as_text(), stepper


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_loop_updates_in_place_and_hides_its_transfers(split):
    text, stepper = compiled(split)
    # The kernels are those of the GPU, not of this machine.
    assert "mosaic_gpu" in text and "cudnn" in text
    # What XLA decided to compute again has this in its name.
    assert ".remat" not in text
    buffers = loop_buffers(stepper)
    rows = buffers["expert row gradients" if split.colocated else "row gradients"]
    assert rows in text and buffers["stash"] in text

    def size(shape):
        return math.prod(int(n) for n in re.search(r"\[([\d,]+)\]", shape).group(1).split(","))

    # Rows are seen in several shapes: no copy may be as large as they, whatever its shape.
    least = min(size(rows), size(buffers["stash"]))
    copied = [found.group(1) for found in COPY.finditer(text) if "," in found.group(1)]
    assert not [shape for shape in copied if size(shape) >= least]
    if not split.colocated and split.hop == 1:
        # The loss may still need what arrived; nothing else of a message's size is copied.
        boxes = jax.eval_shape(make_phases(stepper.manager.geometry, stepper.schedule).empty_boxes)
        inbox, cotangents = (f"u16[{box.shape[0]},{box.shape[1]}]" for box in boxes)
        assert copied.count(cotangents) == 0 and copied.count(inbox) <= 2
    steady = overlap.check_program(text, split)
    if not split.colocated:
        # In each loop, forward and backward, one permute for each round.
        loops = collections.Counter(transfer.computation for transfer in steady)
        assert set(loops.values()) == {2 * stepper.meshes.placement.rounds}
    if split.loss_share == 1.0:
        # A loss without permutes is one more conditional that hides transfers.
        counts = {transfer.conditionals for transfer in steady}
        assert max(counts) == {1: 3, 2: 5}[split.hop]


def test_a_blocking_twin_hides_nothing():
    """The check can fail."""
    with pytest.raises(overlap.RunError, match="must span a conditional"):
        overlap.check_program(compiled(TWIN)[0], TWIN)


def test_memory_is_what_a_gpu_had_in_use():
    """Of the balanced shape on two H100, the most that was in use (benchmarks/README.md)."""
    found = dry_run.dry_run(balanced.get_config(), load("h100x2_nvlink"))
    assert found.compiler == "GPU" and not target.is_gpu()
    gib = {kind: size / 2**30 for kind, size in found.needed.items()}
    measured = {"attention worker": 28.7, "expert worker": 64.7}
    assert gib == pytest.approx(measured, rel=0.05)
    assert planned(found) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("name", ["deepseek_moe_16b", "gpt_oss_120b", "qwen3_235b"])
def test_the_planner_counts_the_memory_that_the_compiler_does(name):
    """Of 16, 64 and 128 GPUs; DeepSeek's shared experts are summed and counted apart."""
    config = importlib.import_module(f"configs.{name}").get_config()
    found = dry_run.dry_run(config, load("h800"))
    counted = {kind: size / 2**30 for kind, size in found.needed.items()}
    assert planned(found) == pytest.approx(counted, rel=0.05)


def planned(found: dry_run.DryRun) -> dict[str, float]:
    """GiB of each kind of worker by the planner's count."""
    return {kind: memory.total / 2**30 for kind, memory in found.prediction.memory.items()}
