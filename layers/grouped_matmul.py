"""Matrix products of expert-sorted rows with their experts' weights.

Rows are sorted by expert and every expert's group is padded to whole tiles, so that a tile of rows
belongs to one expert: a fast kernel is then the dense kernel with an indexed weight operand.

Legend: n rows, K choices per row, P sorted rows (a multiple of the tile), E experts,
D and F widths.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layers.dtypes import accumulation_dtype


class ExpertOrder(NamedTuple):
    """Where each (row, choice) pair sits among the expert-sorted rows.

    Attributes:
      pair: int32 [P], flat pair index n*K + k in each sorted row, -1 = padding.
      position: int32 [n, K], sorted row of each pair, -1 = none.
      tile_expert: int32 [P / tile], expert of each tile, E = unused tile.
    """

    pair: jax.Array
    position: jax.Array
    tile_expert: jax.Array


def tile_rows() -> int:
    """Rows of a tile on this backend: what the GPU's matrix units want, small elsewhere."""
    return 128 if jax.default_backend() == "gpu" else 32


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
    assert num_sorted % tile == 0, (num_sorted, tile)
    ids = ids_nK.reshape(-1)
    one_hot = (ids[:, None] == jnp.arange(num_experts)).astype(jnp.int32)
    rank = jnp.sum((jnp.cumsum(one_hot, axis=0) - one_hot) * one_hot, axis=1)
    tiles_E = -(-jnp.sum(one_hot, axis=0) // tile)
    end_tile_E = jnp.cumsum(tiles_E)
    begin_E = (end_tile_E - tiles_E) * tile
    position = jnp.sum(begin_E * one_hot, axis=1) + rank
    position = jnp.where((ids >= 0) & (position < num_sorted), position, -1)
    pair = jnp.full((num_sorted,), -1, jnp.int32)
    target = jnp.where(position >= 0, position, num_sorted)
    pair = pair.at[target].set(jnp.arange(ids.size, dtype=jnp.int32), mode="drop")
    tile_index = jnp.arange(num_sorted // tile)
    tile_expert = jnp.sum(tile_index[:, None] >= end_tile_E, axis=1, dtype=jnp.int32)
    order = ExpertOrder(pair, position.astype(jnp.int32).reshape(ids_nK.shape), tile_expert)
    return order, end_tile_E[-1] * tile


@jax.custom_vjp
def grouped_matmul(x_PD, w_EDF, tile_expert):
    """Returns [P, F]: each tile of rows times the weights of its expert.

    Padding rows must be zero; rows of unused tiles are unspecified.
    """
    if _hopper_runs(x_PD, w_EDF):
        return _hopper().rows_times_weights(x_PD, w_EDF, tile_expert, transpose=False)
    return _portable_matmul(x_PD, w_EDF, tile_expert)


def _forward(x_PD, w_EDF, tile_expert):
    return grouped_matmul(x_PD, w_EDF, tile_expert), (x_PD, w_EDF, tile_expert)


def _backward(saved, dy_PF):
    x_PD, w_EDF, tile_expert = saved
    if _hopper_runs(x_PD, w_EDF):
        dx_PD = _hopper().rows_times_weights(dy_PF, w_EDF, tile_expert, transpose=True)
        dw_EDF = _hopper().weight_gradient(x_PD, dy_PF, tile_expert, w_EDF.shape[0], w_EDF.dtype)
    else:
        dx_PD = _portable_matmul(dy_PF, jnp.swapaxes(w_EDF, 1, 2), tile_expert)
        dw_EDF = _portable_weight_gradient(x_PD, dy_PF, tile_expert, w_EDF)
    return dx_PD, dw_EDF, None


grouped_matmul.defvjp(_forward, _backward)


def _hopper_runs(x_PD, w_EDF) -> bool:
    """Whether the Hopper kernels take these operands: bfloat16, widths in steps of 64."""
    if jax.default_backend() != "gpu" or x_PD.dtype != jnp.bfloat16:
        return False
    return jax.devices()[0].compute_capability == "9.0" and not any(
        width % 64 for width in w_EDF.shape[1:]
    )


def _hopper():
    """The kernels' module, which needs JAX's GPU support to import."""
    from layers import grouped_matmul_hopper

    return grouped_matmul_hopper


def _portable_matmul(x_PD, w_EDF, tile_expert):
    """The product anywhere, a tile at a time and only the used ones."""
    num_experts, width = w_EDF.shape[0], w_EDF.shape[2]

    def multiply(tile):
        x_tile, expert = tile
        return lax.cond(
            expert < num_experts,
            lambda: x_tile @ w_EDF[jnp.minimum(expert, num_experts - 1)],
            lambda: jnp.zeros((x_tile.shape[0], width), x_tile.dtype),
        )

    tiles = (x_PD.reshape(tile_expert.shape[0], -1, x_PD.shape[1]), tile_expert)
    return lax.map(multiply, tiles).reshape(-1, width)


def _portable_weight_gradient(x_PD, dy_PF, tile_expert, w_EDF):
    """Sums x^T dy of each expert's tiles, one tile at a time into one buffer."""
    num_tiles, num_experts = tile_expert.shape[0], w_EDF.shape[0]

    def add_tile(dw_EDF, tile):
        x_tile, dy_tile, expert = tile

        def add(dw_EDF):
            product = jnp.einsum("td,tf->df", x_tile, dy_tile, preferred_element_type=dw_EDF.dtype)
            return dw_EDF.at[expert].add(product)

        return lax.cond(expert < num_experts, add, lambda dw_EDF: dw_EDF, dw_EDF), None

    tiles = (
        x_PD.reshape(num_tiles, -1, x_PD.shape[-1]),
        dy_PF.reshape(num_tiles, -1, dy_PF.shape[-1]),
        tile_expert,
    )
    zeros = jnp.zeros(w_EDF.shape, accumulation_dtype(w_EDF.dtype))
    return lax.scan(add_tile, zeros, tiles)[0].astype(w_EDF.dtype)
