"""Times optimizer steps of the balanced shape on two GPUs, one attention and one expert worker.

  XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python -m benchmarks.step

Random tokens, routed by a fresh router, dropless; the optimizer is included. Steps after the two
that compile; prints tokens per second and model TFLOP/s per GPU.
"""

import statistics
import time

import jax
import numpy as np

from disag_jax.batches import Batch
from disag_jax.config import BatchConfig, Config, Dtype, ModelConfig, RunConfig, SplitConfig
from disag_jax.flops import model_flops
from disag_jax.geometry import placement_of
from disag_jax.step import Stepper
from mesh.placement import Meshes

STEPS = 8


def balanced() -> Config:
    """A shape whose attention and experts take about the same time."""
    return Config(
        name="balanced",
        model=ModelConfig(
            vocab_size=32_000,
            num_layers=6,
            d_model=2048,
            num_heads=16,
            num_kv_heads=16,
            head_dim=128,
            num_experts=64,
            top_k=4,
            expert_width=1408,
        ),
        split=SplitConfig(stages=1, attention_workers=1, expert_workers=1),
        batch=BatchConfig(sequence_length=8192, tokens_per_worker=16_384, micro_batches=16),
        run=RunConfig(compute_dtype=Dtype.BFLOAT16, loss_chunk=2048),
    ).validate()


def main():
    config = balanced()
    placement = placement_of(config)
    stepper = Stepper(config, Meshes.make(placement, jax.devices()[: placement.num_devices]))
    state = stepper.init(0)
    shape = (config.sequences_per_step, config.batch.sequence_length + 1)
    rng = np.random.default_rng(0)
    batch = Batch.of(rng.integers(0, config.model.vocab_size, shape, dtype=np.int32))
    times = []
    for step in range(STEPS):
        began = time.perf_counter()
        state, metrics = stepper.train_step(state, batch)
        times.append(time.perf_counter() - began)
        print(f"step {step}: {times[-1]:.3f} s, loss {metrics['loss']:.4f}", flush=True)
    median = statistics.median(times[2:])
    rate = config.tokens_per_step / median
    work = model_flops(config).total * rate / placement.num_devices
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {median:.3f} s a step, "
        f"{rate:,.0f} tokens/s, {work / 1e12:.0f} model TFLOP/s a GPU"
    )
    for device in jax.devices()[: placement.num_devices]:
        print(f"{device}: peak {device.memory_stats()['peak_bytes_in_use'] / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
