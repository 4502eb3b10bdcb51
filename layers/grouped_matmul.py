"""Matrix products of expert-sorted rows with their experts' weights.

Rows are sorted by expert and every expert's group is padded to whole tiles, so that a tile of rows
belongs to one expert: a fast kernel is then the dense kernel with an indexed weight operand. Of a
group that ends in the first half of a tile the second half is unused, and weight gradients leave it
out.

Legend: n rows, K choices per row, P sorted rows (a multiple of the tile), E experts, A and B inner
and outer width of their weights, N matrices of a stack, J = 1 or 2 weights of each expert.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layers import target
from layers.dtypes import accumulation_dtype


class ExpertOrder(NamedTuple):
    """Where each (row, choice) pair sits among the expert-sorted rows.

    Attributes:
      pair: int32 [P], flat pair index n*K + k in each sorted row, -1 = padding.
      position: int32 [n, K], sorted row of each pair, -1 = none.
      half_expert: int32 [2 P / tile], expert of each half tile, E = unused half.
    """

    pair: jax.Array
    position: jax.Array
    half_expert: jax.Array


def tile_rows() -> int:
    """Rows of a tile: what a GPU's matrix units want, few elsewhere."""
    return 128 if target.is_gpu() else 32


def sorted_rows(num_pairs: int, num_experts: int, tile: int) -> int:
    """The fewest sorted rows that hold `num_pairs` pairs however they fall on the experts."""
    used_experts = min(num_experts, num_pairs)
    # At worst each expert's last tile holds one row.
    return (num_pairs + used_experts * (tile - 1)) // tile * tile


def order_by_expert(ids_nK, num_experts: int, num_sorted: int, tile: int):
    """Plans the sort of pairs by expert id (-1 = no pair), stable in the row.

    Returns (ExpertOrder for P = num_sorted, rows needed). If more rows are needed than there are,
    pairs past the end are left out: the caller must check and not use the result.
    """
    assert num_sorted % tile == 0 and tile % 2 == 0, (num_sorted, tile)
    ids = ids_nK.reshape(-1)
    one_hot = (ids[:, None] == jnp.arange(num_experts)).astype(jnp.int32)
    rank = jnp.sum((jnp.cumsum(one_hot, axis=0) - one_hot) * one_hot, axis=1)
    count_E = jnp.sum(one_hot, axis=0)
    tiles_E = -(-count_E // tile)
    end_tile_E = jnp.cumsum(tiles_E)
    begin_E = (end_tile_E - tiles_E) * tile
    position = jnp.sum(begin_E * one_hot, axis=1) + rank
    position = jnp.where((ids >= 0) & (position < num_sorted), position, -1)
    pair = jnp.full((num_sorted,), -1, jnp.int32)
    target = jnp.where(position >= 0, position, num_sorted)
    pair = pair.at[target].set(jnp.arange(ids.size, dtype=jnp.int32), mode="drop")
    first_row = jnp.arange(0, num_sorted, tile // 2)[:, None]
    holds = (begin_E <= first_row) & (first_row < begin_E + count_E)
    half_expert = jnp.min(jnp.where(holds, jnp.arange(num_experts), num_experts), axis=1)
    order = ExpertOrder(
        pair, position.astype(jnp.int32).reshape(ids_nK.shape), half_expert.astype(jnp.int32)
    )
    return order, end_tile_E[-1] * tile


class GroupWeights(NamedTuple):
    """Weights [A, B] of each expert of a group, which follow each other among other matrices.

    Attributes:
      stack: [N, A, B].
      first: int32, place of the first expert's in the stack (may be traced).
      num_experts: E.
    """

    stack: jax.Array
    first: jax.Array
    num_experts: int

    @classmethod
    def of(cls, weights) -> "GroupWeights":
        """Itself, or the view of an array [E, A, B]."""
        if isinstance(weights, cls):
            return weights
        return cls(weights, jnp.int32(0), weights.shape[0])

    def dense(self):
        """A copy as an array [E, A, B]."""
        return lax.dynamic_slice_in_dim(self.stack, self.first, self.num_experts)


class PairWeights(NamedTuple):
    """Two weights [A, B] of each expert of a group, that the same rows are multiplied with.

    Attributes:
      stack: [N, A, B], of both.
      first_2: int32 [2], place of the first expert's of each.
      num_experts: E.
    """

    stack: jax.Array
    first_2: jax.Array
    num_experts: int

    @classmethod
    def of(cls, one, other) -> "PairWeights":
        """Of two GroupWeights in one stack, or of two arrays [E, A, B], which are copied to one."""
        if isinstance(one, GroupWeights):
            assert one.stack is other.stack, "a kernel reads both from one array"
            return cls(one.stack, jnp.stack([one.first, other.first]), one.num_experts)
        num_experts = one.shape[0]
        first_2 = jnp.array([0, num_experts], jnp.int32)
        return cls(jnp.concatenate([one, other]), first_2, num_experts)


class PairProduct(NamedTuple):
    """The products [2, P, B] of rows with a pair of weights, not yet made.

    They are as large as what a unit receives and are kept in a buffer: a kernel writes them there.
    """

    x_PA: jax.Array
    weights: PairWeights
    half_expert: jax.Array

    def writes_in_place(self, word_dtype) -> bool:
        """Whether `write_to` can be used, for words of this type; else there is `dense`."""
        width = word_dtype.itemsize
        return _hopper_runs(self.x_PA, self.weights.stack) and width == self.x_PA.dtype.itemsize

    def write_to(self, words_RB, first):
        """The buffer with the products, by bits, in the 2 P rows from `first` on, in place."""
        stack, first_2, num_experts = self.weights
        with jax.named_scope("gate_up"):
            return _hopper().write_rows_times_pair(
                words_RB, first, self.x_PA, stack, first_2, self.half_expert,
                num_experts=num_experts,
            )  # fmt: skip

    def dense(self):
        """The products as an array."""
        x_PA, weights, half_expert = self
        with jax.named_scope("gate_up"):
            return _products(weights.num_experts, x_PA, weights.stack, weights.first_2, half_expert)


class WeightGradient(NamedTuple):
    """The gradient of a group's weights as its factors: the sum of x^T dy over each expert's rows.

    The product is as large as the weights, and all that is wanted of it is to be added to a sum.

    Attributes:
      x_PA: the rows.
      dy_PB: of the rows' products.
      half_expert: as in ExpertOrder.
      num_experts: E.
    """

    x_PA: jax.Array
    dy_PB: jax.Array
    half_expert: jax.Array
    num_experts: int

    def adds_in_place(self, dtype) -> bool:
        """Whether `add_to` can be used, for sums of `dtype`; else there is `dense`."""
        return _hopper_runs(self.x_PA, self.dy_PB) and dtype == jnp.float32

    def add_to(self, sums_NAB, first):
        """The stack with the experts' products added from place `first` on, in place."""
        return _hopper().add_weight_gradient(sums_NAB, first, *self)

    def dense(self, dtype):
        """The product as an array [E, A, B] of `dtype`; slow on GPUs but in bfloat16 on Hopper."""
        if dtype == jnp.bfloat16 and _hopper_runs(self.x_PA, self.dy_PB):
            return _hopper().weight_gradient(*self, dtype)
        return _portable_weight_gradient(*self, accumulation_dtype(dtype)).astype(dtype)


def multiply_by_group(x_PA, weights: GroupWeights, half_expert):
    """Returns [P, B]: each tile of rows times the weights of its expert.

    Padding rows must be zero; rows of unused halves are unspecified. Differentiable in x alone: the
    weights are constants here, and `WeightGradient` is their gradient.
    """
    stack = lax.stop_gradient(weights.stack)
    return _multiply(weights.num_experts, x_PA, stack, weights.first[None], half_expert)[0]


def multiply_by_pair(x_PA, weights: PairWeights, half_expert):
    """Returns two arrays [P, B]: as `multiply_by_group` with each of both weights.

    Its gradient takes two as well: made as one array, what makes them would be read twice.
    """
    stack = lax.stop_gradient(weights.stack)
    return _multiply(weights.num_experts, x_PA, stack, weights.first_2, half_expert)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(num_experts, x_PA, stack_NAB, first_J, half_expert):
    """The products [P, B] with each of J weights."""
    return tuple(_products(num_experts, x_PA, stack_NAB, first_J, half_expert))


def _products(num_experts, x_PA, stack_NAB, first_J, half_expert):
    """The products [J, P, B] with each of J weights."""
    if _hopper_runs(x_PA, stack_NAB):
        kernels, static = _hopper(), {"num_experts": num_experts}
        if first_J.shape[0] == 2:
            return kernels.rows_times_pair(x_PA, stack_NAB, first_J, half_expert, **static)
        y_PB = kernels.rows_times_weights(
            (x_PA,), stack_NAB, first_J, half_expert, **static, transpose=False
        )
        return y_PB[None]
    weights = [GroupWeights(stack_NAB, first, num_experts).dense() for first in first_J]
    return jnp.stack([_portable_matmul(x_PA, w_EAB, half_expert) for w_EAB in weights])


def _multiply_forward(num_experts, x_PA, stack_NAB, first_J, half_expert):
    saved = (stack_NAB, first_J, half_expert)
    return _multiply(num_experts, x_PA, *saved), saved


def _multiply_backward(num_experts, saved, dys):
    return _input_gradient(num_experts, dys, *saved), None, None, None


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _input_gradient(num_experts, dys, stack_NAB, first_J, half_expert):
    """The sum over J of each tile of dy [P, B] times its expert's transposed weights: [P, A]."""
    if _hopper_runs(*dys, stack_NAB):
        return _hopper().rows_times_weights(
            dys, stack_NAB, first_J, half_expert, num_experts=num_experts, transpose=True
        )
    weights = [GroupWeights(stack_NAB, first, num_experts).dense() for first in first_J]
    products = [
        _portable_matmul(dy_PB, jnp.swapaxes(w_EAB, 1, 2), half_expert)
        for dy_PB, w_EAB in zip(dys, weights, strict=True)
    ]
    return functools.reduce(jnp.add, products)


@jax.custom_vjp
def grouped_matmul(x_PA, w_EAB, half_expert):
    """As `multiply_by_group` for an array of weights, and differentiable in it too."""
    return multiply_by_group(x_PA, GroupWeights.of(w_EAB), half_expert)


def _forward(x_PA, w_EAB, half_expert):
    return grouped_matmul(x_PA, w_EAB, half_expert), (x_PA, w_EAB, half_expert)


def _backward(saved, dy_PB):
    x_PA, w_EAB, half_expert = saved
    weights = GroupWeights.of(w_EAB)
    dx_PA = _input_gradient(
        weights.num_experts, (dy_PB,), weights.stack, weights.first[None], half_expert
    )
    product = WeightGradient(x_PA, dy_PB, half_expert, weights.num_experts)
    return dx_PA, product.dense(w_EAB.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _hopper_runs(*operands) -> bool:
    """Whether the Hopper kernels take these operands: bfloat16, widths in steps of 64."""
    if any(x.dtype != jnp.bfloat16 for x in operands):
        return False
    widths = [width for x in operands for width in x.shape[1:]]
    return target.is_hopper() and not any(w % 64 for w in widths)


def _hopper():
    """The kernels' module, which needs JAX's GPU support to import."""
    from layers import grouped_matmul_hopper

    return grouped_matmul_hopper


def _portable_matmul(x_PD, w_EDF, half_expert):
    """The product anywhere, a tile at a time and only the used ones."""
    num_experts, width = w_EDF.shape[0], w_EDF.shape[2]

    def multiply(tile):
        x_tile, expert = tile
        return lax.cond(
            expert < num_experts,
            lambda: x_tile @ w_EDF[jnp.minimum(expert, num_experts - 1)],
            lambda: jnp.zeros((x_tile.shape[0], width), x_tile.dtype),
        )

    # A tile whose first half is unused is unused.
    tile_expert = half_expert[::2]
    tiles = (x_PD.reshape(tile_expert.shape[0], -1, x_PD.shape[1]), tile_expert)
    return lax.map(multiply, tiles).reshape(-1, width)


def _portable_weight_gradient(x_PA, dy_PB, half_expert, num_experts: int, dtype):
    """Sums x^T dy of each expert's rows, one tile at a time into one buffer [E, A, B]."""
    halves = half_expert.reshape(-1, 2)

    def add_tile(dw_EAB, tile):
        *rows, experts = tile
        unused = (experts == num_experts)[:, None, None]
        x_half, dy_half = (jnp.where(unused, 0, half) for half in rows)

        def add(dw_EAB):
            product = jnp.einsum("hta,htb->ab", x_half, dy_half, preferred_element_type=dtype)
            return dw_EAB.at[experts[0]].add(product)

        return lax.cond(experts[0] < num_experts, add, lambda dw_EAB: dw_EAB, dw_EAB), None

    tiles = [x.reshape(*halves.shape, -1, x.shape[1]) for x in (x_PA, dy_PB)]
    zeros = jnp.zeros((num_experts, x_PA.shape[1], dy_PB.shape[1]), dtype)
    return lax.scan(add_tile, zeros, (*tiles, halves))[0]
