"""Sorting rows by expert, grouped products and experts, each against loops over single rows."""

import functools
import types

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layers.experts import Experts
from layers.grouped_matmul import (
    GroupWeights,
    PairWeights,
    WeightGradient,
    grouped_matmul,
    multiply_by_group,
    multiply_by_pair,
    order_by_expert,
    sorted_rows,
)
from tests.test_layers import assert_close, assert_trees_close, normal, random_module

# Order by expert

NUM_ROWS, NUM_CHOICES, NUM_EXPERTS, TILE = 12, 2, 4, 4
HALF = TILE // 2
WORST_ROWS = sorted_rows(NUM_ROWS * NUM_CHOICES, NUM_EXPERTS, TILE)
ORDER = jax.jit(order_by_expert, static_argnums=(1, 2, 3))

expert_ids = hnp.arrays(
    np.int32, (NUM_ROWS, NUM_CHOICES), elements=st.integers(-1, NUM_EXPERTS - 1)
)


def plan(ids, num_sorted=WORST_ROWS):
    order, needed = ORDER(ids, NUM_EXPERTS, num_sorted, TILE)
    return types.SimpleNamespace(**jax.tree.map(np.asarray, order)._asdict()), int(needed)


def ids_of_sizes(sizes, seed=0):
    """Ids [12, 2] in which expert e occurs sizes[e] times, in random places."""
    flat = np.concatenate([np.full(size, e) for e, size in enumerate(sizes)])
    flat = np.pad(flat, (0, NUM_ROWS * NUM_CHOICES - len(flat)), constant_values=-1)
    flat = np.random.default_rng(seed).permutation(flat)
    return flat.reshape(NUM_ROWS, NUM_CHOICES).astype(np.int32)


SIZES = [
    (6, 6, 6, 6), (24, 0, 0, 0), (0, 0, 0, 24), (0, 0, 0, 0), (1, 0, 17, 2), (5, 5, 5, 9),
    (0, 1, 0, 0),
]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(expert_ids)
@example(ids_of_sizes((24, 0, 0, 0)))
@example(ids_of_sizes((0, 0, 0, 0)))
@example(ids_of_sizes((5, 5, 5, 9)))
def test_every_pair_is_sorted_to_one_row_of_its_experts_tiles(ids):
    order, needed = plan(ids)
    flat, position = ids.reshape(-1), order.position.reshape(-1)
    np.testing.assert_array_equal(position >= 0, flat >= 0)
    pairs = np.flatnonzero(flat >= 0)
    np.testing.assert_array_equal(np.sort(order.pair[order.pair >= 0]), pairs)
    np.testing.assert_array_equal(order.pair[position[pairs]], pairs)
    np.testing.assert_array_equal(order.half_expert[position[pairs] // HALF], flat[pairs])
    # Stable, experts in order.
    np.testing.assert_array_equal(
        order.pair[order.pair >= 0], pairs[np.argsort(flat[pairs], kind="stable")]
    )
    halves = []
    for expert in range(NUM_EXPERTS):
        used = -(-np.sum(flat == expert) // HALF)
        halves += [expert] * used + [NUM_EXPERTS] * (used % 2)
    expected = np.array(halves, int)
    np.testing.assert_array_equal(order.half_expert[: len(expected)], expected)
    assert (order.half_expert[len(expected) :] == NUM_EXPERTS).all()
    assert needed == len(expected) * HALF <= WORST_ROWS


@settings(max_examples=50, deadline=None)
@given(expert_ids)
@example(ids_of_sizes((5, 5, 5, 9)))
def test_overflow_is_reported_and_leaves_out_the_pairs_past_the_end(ids):
    short = 2 * TILE
    order, needed = plan(ids, short)
    whole, whole_needed = plan(ids)
    assert needed == whole_needed
    np.testing.assert_array_equal(order.pair, whole.pair[:short])
    np.testing.assert_array_equal(
        order.position, np.where(whole.position < short, whole.position, -1)
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 9), st.randoms())
def test_sorted_rows_is_the_worst_case_and_is_reached(sizes, tile, rng):
    num_pairs, num_experts = sum(sizes), len(sizes)
    padded = lambda sizes: sum(-(-size // tile) * tile for size in sizes)  # noqa: E731
    rows = sorted_rows(num_pairs, num_experts, tile)
    assert padded(sizes) <= rows
    spilling = [1] * min(num_experts, num_pairs)
    if spilling:
        spilling[rng.randrange(len(spilling))] += num_pairs - len(spilling)
    assert padded(spilling) == rows


# Grouped products


def ragged_product(x, w, order, num_sorted):
    """Row by row, from the plan's pairs alone."""
    out = np.zeros((num_sorted, w.shape[2]))
    for row in range(num_sorted):
        if order.pair[row] >= 0:
            out[row] = x[row] @ w[order.half_expert[row // HALF]]
    return out


@jax.jit
def grouped_matmul_and_vjp(x, w, half_expert, dy):
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, half_expert), x, w)
    return y, *vjp(dy)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_grouped_matmul_and_its_gradients_are_a_loop_over_rows(sizes):
    order, _ = plan(ids_of_sizes(sizes))
    real = (order.pair >= 0)[:, None]
    used = np.repeat(order.half_expert < NUM_EXPERTS, HALF)
    # What is in unused rows must not matter.
    x, dy = (
        np.where(used[:, None], normal(WORST_ROWS, width, seed=seed) * real, np.nan)
        for seed, width in enumerate((3, 5))
    )
    w = normal(NUM_EXPERTS, 3, 5, seed=2)
    y, dx, dw = grouped_matmul_and_vjp(x, w, order.half_expert, dy)
    assert_close(y[used], ragged_product(x, w, order, WORST_ROWS)[used])
    assert_close(dx[used], ragged_product(dy, w.swapaxes(1, 2), order, WORST_ROWS)[used])
    expected = np.zeros_like(w)
    for row in np.flatnonzero(real):
        expected[order.half_expert[row // HALF]] += np.outer(x[row], dy[row])
    assert_close(dw, expected)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_weights_may_lie_in_a_stack(sizes):
    """Read where they lie, and the gradient's factors make the gradient."""
    order, _ = plan(ids_of_sizes(sizes))
    real = (order.pair >= 0)[:, None]
    x, dy = normal(WORST_ROWS, 3) * real, normal(WORST_ROWS, 5, seed=1) * real
    stack = normal(NUM_EXPERTS + 5, 3, 5, seed=2)

    @jax.jit
    def in_stack(x, dy, first):
        weights = GroupWeights(stack, first, NUM_EXPERTS)
        y, vjp = jax.vjp(lambda x: multiply_by_group(x, weights, order.half_expert), x)
        gradient = WeightGradient(x, dy, order.half_expert, NUM_EXPERTS)
        return y, vjp(dy)[0], gradient.dense(jnp.float64)

    found = in_stack(x, dy, jnp.int32(2))
    expected = grouped_matmul_and_vjp(x, stack[2 : 2 + NUM_EXPERTS], order.half_expert, dy)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("in_a_stack", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_pair_is_two_products_and_its_gradient_their_sum(sizes, in_a_stack):
    order, _ = plan(ids_of_sizes(sizes))
    real = (order.pair >= 0)[:, None]
    x, dy = normal(WORST_ROWS, 3) * real, normal(2, WORST_ROWS, 5, seed=1) * real
    stack = normal(2 * NUM_EXPERTS + 3, 3, 5, seed=2)
    # The second weights of the pair lie before the first, with others between.
    firsts = (NUM_EXPERTS + 2, 1)
    weights = [stack[first : first + NUM_EXPERTS] for first in firsts]

    @jax.jit
    def pair(x, dy, stack, firsts, weights):
        views = [GroupWeights(stack, first, NUM_EXPERTS) for first in firsts]
        both = PairWeights.of(*(views if in_a_stack else weights))
        y, vjp = jax.vjp(lambda x: multiply_by_pair(x, both, order.half_expert), x)
        gradients = [
            WeightGradient(x, dy_PB, order.half_expert, NUM_EXPERTS).dense(jnp.float64)
            for dy_PB in dy
        ]
        return y, vjp(tuple(dy))[0], gradients

    y, dx, gradients = pair(x, dy, stack, firsts, weights)
    (one, *expected), (other, *others) = (
        grouped_matmul_and_vjp(x, w, order.half_expert, dy_PB)
        for w, dy_PB in zip(weights, dy, strict=True)
    )
    assert_close(np.stack(y), np.stack([one, other]))
    assert_close(dx, expected[0] + others[0])
    assert_trees_close(gradients, [expected[1], others[1]])


# Experts


def make_experts(ids=range(NUM_EXPERTS)):
    return Experts(
        jnp.asarray(ids), d_model=6, expert_width=5, init_std=0.5, out_init_std=0.5,
        dtype=jnp.float64, rngs=nnx.Rngs(0),
    )  # fmt: skip


def experts_by_loop(weights, x, gate, ids):
    """[n, D]: for every expert all rows, weighted by the gates that chose it."""
    y = jnp.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        hidden = jax.nn.silu(x @ weights["gate"][expert]) * (x @ weights["up"][expert])
        weight = jnp.sum(jnp.where(ids == expert, gate, 0), axis=1, keepdims=True)
        y += weight * (hidden @ weights["down"][expert])
    return y


@functools.cache
def compiled_experts():
    graphdef, params = random_module(make_experts)

    @jax.jit
    def run(weights, x, gate, ids, dy):
        order, _ = order_by_expert(ids, NUM_EXPERTS, WORST_ROWS, TILE)
        y, vjp = jax.vjp(lambda w, x, g: nnx.merge(graphdef, w)(x, g, order), weights, x, gate)
        return y, *vjp(dy)

    @jax.jit
    def loop(weights, x, gate, ids, dy):
        y, vjp = jax.vjp(lambda *args: experts_by_loop(*args, ids), weights, x, gate)
        return y, *vjp(dy)

    return params, run, loop


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_experts_and_their_gradients_are_a_loop_over_experts(sizes):
    weights, run, loop = compiled_experts()
    ids = ids_of_sizes(sizes, seed=3)
    x, gate = normal(NUM_ROWS, 6), normal(NUM_ROWS, NUM_CHOICES, seed=1)
    dy = normal(NUM_ROWS, 6, seed=2)
    assert_trees_close(run(weights, x, gate, ids, dy), loop(weights, x, gate, ids, dy))


def test_an_expert_is_initialised_from_its_id_whoever_holds_it():
    def draw():
        modules = make_experts(), make_experts([2, 0])
        return [nnx.to_pure_dict(nnx.split(module)[1]) for module in modules]

    every, some = jax.jit(draw, compiler_options={"xla_backend_optimization_level": 0})()
    jax.tree.map(lambda e, s: np.testing.assert_array_equal(s, e[jnp.array([2, 0])]), every, some)
    numbers = np.concatenate([np.ravel(w) for w in jax.tree.leaves(every)])
    assert len(np.unique(numbers)) == len(numbers)
