"""Eight simulated CPU devices and float64, set before JAX starts its CPU client.

Programs of tests run for milliseconds and compile for seconds: LLVM may leave them slow. That takes
off two thirds of the CPU time of compiling a training step.

Tests marked `gpu` run on the machine's GPUs: `JAX_PLATFORMS=cuda python -m pytest -m gpu`.
"""

import dataclasses
import os

import hypothesis
import jax
import pytest

from disag_jax.config import PlacementKind, SplitConfig
from mesh import runtime

QUICK_COMPILES = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    # Later versions end a process that sets it.
    QUICK_COMPILES += " --xla_cpu_use_fusion_emitters=false"

if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    # Commands that tests start inherit it.
    os.environ["XLA_FLAGS"] = f"{QUICK_COMPILES} {os.environ.get('XLA_FLAGS', '')}"
    runtime.simulate_cpu_devices(8)
jax.config.update("jax_enable_x64", True)

# Examples that compile take seconds on a busy machine.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """(config, workdir) of a run of six steps with checkpoints of the steps 4 and 6.

    Shared by tests that only read it.
    """
    from disag_jax import training
    from disag_jax.config import SplitConfig
    from tests import support

    directory = tmp_path_factory.mktemp("trained")
    (directory / "text.txt").write_text("".join(f"line {n}, {n * n}\n" for n in range(500)))
    config = support.small_config(
        SplitConfig(stages=2, attention_workers=1, expert_workers=3, bucket_factors=()), 4,
        vocab_size=256, num_experts=7, num_shared_experts=1, bias_update_rate=0.01,
        capacity_factor=1.5,
    )  # fmt: skip
    config.data.paths = (str(directory / "text.txt"),)
    config.run = dataclasses.replace(
        config.run, num_steps=6, eval_batches=1,
        checkpoint_every=2, keep_checkpoints=2, keep_checkpoint_every=4,
    )  # fmt: skip
    training.train(config, str(directory / "run"))
    return config, str(directory / "run")


@pytest.fixture
def small_run(tmp_path):
    """A config that trains in seconds on text written for the test, and a fresh workdir."""
    from disag_jax.config import SplitConfig
    from tests import support

    text = tmp_path / "text"
    text.mkdir()
    for number in range(4):
        lines = (f"line {n} of file {number}, {n * n}\n" for n in range(200))
        (text / f"{number}.txt").write_text("".join(lines))
    config = support.small_config(
        SplitConfig(stages=2, attention_workers=1, expert_workers=3), 4, vocab_size=256
    )
    config.data.paths = (str(text),)
    config.run = dataclasses.replace(
        config.run, num_steps=6, log_every=1, eval_batches=1, eval_every=3, checkpoint_every=2
    )
    return config, str(tmp_path / "run")


PLANNED_SPLITS = {
    "disaggregated": SplitConfig(stages=2, attention_workers=1, expert_workers=2),
    "two hops": SplitConfig(stages=2, attention_workers=1, expert_workers=2, hop=2),
    "colocated": SplitConfig(
        stages=2, attention_workers=2, expert_workers=2, placement=PlacementKind.COLOCATED
    ),
}


@pytest.fixture(params=PLANNED_SPLITS)
def prediction(request):
    """The predicted step of a split of the balanced shape."""
    from configs import balanced
    from disag_jax.planner import hardware
    from disag_jax.planner.prediction import predict

    config = balanced.get_config()
    config.split, config.batch.micro_batches = PLANNED_SPLITS[request.param], 30
    return predict(config.validate(), hardware.load("h100"))
