"""The Hopper kernels compute the right thing in Pallas' interpreter, which needs no GPU.

It knows neither transposed operands nor kernels that work in place: tests/test_gpu.py runs those.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import grouped_matmul_hopper, hopper, softmax_hopper, target

# Not among JAX's public names.
interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")

EXPERTS, HALF, INNER, OUTER = 2, 64, 128, 512
# The first tile is unused, and half of two others: of the last blocks none may be missing.
HALF_EXPERT = np.array([EXPERTS, EXPERTS, 0, 0, 0, EXPERTS, 1, EXPERTS, 1, 1], np.int32)
NUM_ROWS = HALF * len(HALF_EXPERT)
USED = np.repeat(HALF_EXPERT < EXPERTS, HALF)
FIRST_2 = np.array([3, 1], np.int32)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    # Four shares, some with more blocks than others.
    monkeypatch.setattr(target, "num_processors", lambda: 2)
    monkeypatch.setattr(hopper, "SHARES", 2)
    with interpreter.force_gpu_interpret_mode():
        yield


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def product(x, stack, first):
    """Row by row of the used half tiles, in float32."""
    x, stack = np.asarray(x, np.float32), np.asarray(stack, np.float32)
    halves = zip(np.split(x, len(HALF_EXPERT)), HALF_EXPERT, strict=True)
    return np.concatenate(
        [rows @ stack[first + expert] for rows, expert in halves if expert < EXPERTS]
    )


def assert_close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, rtol=1e-2, atol=0.2)


def test_products_of_several_sources_are_summed():
    x, stack = draw(0, 2, NUM_ROWS, INNER), draw(1, 2 * EXPERTS + 1, INNER, OUTER)
    y = grouped_matmul_hopper.rows_times_weights(
        tuple(x), stack, FIRST_2, HALF_EXPERT, num_experts=EXPERTS, transpose=False
    )
    expected = [product(x_PA, stack, first) for x_PA, first in zip(x, FIRST_2, strict=True)]
    assert_close(y[USED], expected[0] + expected[1])


def test_both_products_of_a_pair():
    x, stack = draw(0, NUM_ROWS, INNER), draw(1, 2 * EXPERTS + 1, INNER, OUTER)
    y = grouped_matmul_hopper.rows_times_pair(x, stack, FIRST_2, HALF_EXPERT, num_experts=EXPERTS)
    assert_close(y[:, USED], np.stack([product(x, stack, first) for first in FIRST_2]))


@pytest.mark.parametrize(("pieces", "slots"), [(1, 2), (3, 3), (3, 4), (3, 6)])
def test_softmax_gradients_of_more_rows_than_shares(pieces, slots, monkeypatch):
    """Shared memory holds a row, a part of the next one or all of it."""
    vocab_size = pieces * 512
    monkeypatch.setattr(softmax_hopper, "LARGEST_PIECE", 512)
    monkeypatch.setattr(softmax_hopper, "SHARED_BYTES", slots * 512 * 4)
    assert softmax_hopper.piece_words(vocab_size) == 512
    logits = 5 * jax.random.normal(jax.random.key(0), (11, vocab_size), jnp.float32)
    label = np.array([0, vocab_size - 1, 255, 256, 300, 511, 1, 2, 3, 4, 5], np.int32)
    weight = np.array([1, 0.5, 0, 2, 1e-3, 1, 1, 1, 1, 3, 1], np.float32)
    softmax_hopper.nll_and_gradient.clear_cache()
    nll, gradient = softmax_hopper.nll_and_gradient(logits, label, weight, jnp.dtype("bfloat16"))

    wide = np.asarray(logits, np.float64)
    log_probability = wide - np.log(np.sum(np.exp(wide), axis=1, keepdims=True))
    np.testing.assert_allclose(nll, -log_probability[np.arange(11), label], rtol=1e-6)
    expected = np.exp(log_probability)
    expected[np.arange(11), label] -= 1
    # Rounded once, also at the label, where a sum would have lost digits.
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64), expected * weight[:, None], rtol=2**-8, atol=1e-30
    )
