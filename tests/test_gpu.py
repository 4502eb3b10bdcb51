"""On one or two GPUs: exact in float64, as close as a plain model in bfloat16, learning, in place.

JAX_PLATFORMS=cuda python -m pytest -m gpu tests/test_gpu.py
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disag_jax.config import BatchConfig, Dtype, ModelConfig, SplitConfig
from tests import reference, support
from tests.test_compiled import COPY, loop_buffers

pytestmark = pytest.mark.gpu

PAIR = SplitConfig(stages=1, attention_workers=1, expert_workers=1, bucket_factors=())


@pytest.fixture(autouse=True)
def needs_two_gpus():
    if jax.default_backend() != "gpu" or len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")


def gradients(config, params, sequences):
    stepper = support.make_stepper(config)
    state = support.place_state(stepper, params, reference.init_router_bias(config))
    metrics, grads, _ = support.run_pipeline(stepper, state, sequences)
    return metrics, grads


def oracle_gradients(config, params, sequences):
    oracle = jax.jit(functools.partial(reference.loss_and_grads, config))
    (total, _), grads = oracle(params, reference.init_router_bias(config), sequences)
    return float(total), jax.device_get(grads)


@pytest.mark.parametrize("hop", [1, 2])
def test_float64_equals_the_oracle(hop):
    split = dataclasses.replace(PAIR, hop=hop)
    config = support.small_config(split, 5, num_layers=3, num_shared_experts=1)
    params, sequences = support.oracle_params(config), support.random_sequences(config)
    metrics, grads = gradients(config, params, sequences)
    total, expected = oracle_gradients(config, params, sequences)
    assert support.relative_error(metrics["total_loss"], total) < 1e-10
    errors = jax.tree.map(support.relative_error, grads, expected)
    assert max(jax.tree.leaves(errors)) < 1e-10, errors


def bfloat16_config():
    """Large enough for cuDNN attention with grouped queries and for whole tiles."""
    config = support.small_config(PAIR, 2)
    config.model = ModelConfig(
        vocab_size=512, num_layers=4, d_model=256, num_heads=8, num_kv_heads=2, head_dim=64,
        num_experts=8, top_k=2, expert_width=256, balance_loss_weight=0.01, z_loss_weight=1e-3,
    )  # fmt: skip
    config.batch = BatchConfig(sequence_length=256, tokens_per_worker=1024, micro_batches=2)
    config.run = dataclasses.replace(config.run, compute_dtype=Dtype.BFLOAT16, loss_chunk=256)
    return config.validate()


def distance(grads, expected):
    """Norm of the difference of two trees over the norm of the second."""
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    difference = sum(np.sum((a - b) ** 2) for a, b in pairs)
    return np.sqrt(difference / sum(np.sum(b**2) for _, b in pairs))


def test_bfloat16_is_as_close_as_a_plain_model():
    config = bfloat16_config()
    params, sequences = support.oracle_params(config), support.random_sequences(config)
    cast = lambda dtype: jax.tree.map(lambda x: jnp.asarray(x, dtype), params)  # noqa: E731
    _, expected = oracle_gradients(config, cast(jnp.float32), sequences)
    _, plain = oracle_gradients(config, cast(jnp.bfloat16), sequences)
    _, ours = gradients(config, cast(jnp.float32), sequences)
    print(f"\nours {distance(ours, expected):.4f}, plain {distance(plain, expected):.4f}")
    assert distance(ours, expected) <= 1.5 * distance(plain, expected)


def test_twenty_steps_learn_and_two_runs_agree():
    config = bfloat16_config()
    config.optimizer = dataclasses.replace(config.optimizer, peak_learning_rate=1e-3)
    stepper = support.make_stepper(config)
    sequences = np.tile(np.arange(257, dtype=np.int32) % 97, (config.sequences_per_step, 1))
    state, losses = stepper.init(0), []
    for _ in range(config.run.num_steps):
        state, metrics = stepper.train_step(state, sequences)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5, losses


def test_loop_updates_in_place_and_transfers_run_beside_units():
    config = bfloat16_config()
    config.batch = dataclasses.replace(config.batch, micro_batches=6)
    stepper = support.make_stepper(config)
    state = stepper.init(0)
    program = stepper.gradient_program(stepper.chooser.current)
    batch = stepper.place_batch(support.random_sequences(config))
    compiled = program.lower(state.rows, state.vocabulary, state.router_bias, batch).compile()
    text = compiled.as_text()
    copies = [found.group(1) for found in COPY.finditer(text)]
    for name, shape in loop_buffers(stepper).items():
        print(f"\n{name} {shape}: {copies.count(shape)} copies in the whole program")
    starts = re.findall(r"collective-permute-start[^\n]*", text)
    assert starts, "permutes must be asynchronous"
