"""SwiGLU experts over expert-sorted rows.

Legend: n rows, K choices per row, P sorted rows, E experts held here, D model width,
F expert width.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from layers.grouped_matmul import ExpertOrder, grouped_matmul
from layers.permute import gather_sum, spread


class Experts(nnx.Module):
    """A set of SwiGLU experts; each is initialised from its own id, whoever holds it."""

    def __init__(
        self, expert_ids, *, d_model, expert_width, init_std, out_init_std, dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        key = rngs.params()

        def weights(salt, std, shape):
            init = nnx.initializers.normal(std)
            salted = jax.random.fold_in(key, salt)
            one = lambda expert: init(jax.random.fold_in(salted, expert), shape, dtype)  # noqa: E731
            return nnx.Param(jax.vmap(one)(expert_ids))

        self.gate = weights(0, init_std, (d_model, expert_width))
        self.up = weights(1, init_std, (d_model, expert_width))
        self.down = weights(2, out_init_std, (expert_width, d_model))

    def __call__(self, x_nD, gate_nK, order: ExpertOrder):
        """Returns [n, D]: the gated sum of each row's experts, zeros for a row without any."""

        def product(name, rows):
            return grouped_matmul(rows, getattr(self, name)[...], order.half_expert)

        def gate_up(rows):
            return product("gate", rows), product("up", rows)

        return apply_experts(gate_up, functools.partial(product, "down"), x_nD, gate_nK, order)


def apply_experts(gate_up, down, x_nD, gate_nK, order: ExpertOrder):
    """Returns [n, D]: the gated sum of each row's experts, zeros for a row without any.

    gate_up: function of sorted rows [P, D] that returns two arrays [P, F], their products with
      their experts' gate and up weights.
    down: function of sorted rows [P, F] that returns their products [P, D] with the down weights.
    """
    x_PD = sort_rows(x_nD, order)
    with jax.named_scope("sort_rows"):
        gate_P1 = spread(gate_nK.reshape(-1, 1), order.pair, order.position.reshape(-1, 1))
    with jax.named_scope("gate_up"):
        gated_PF, up_PF = gate_up(x_PD)
    with jax.named_scope("swiglu"):
        # The gate is applied before `down`, so its gradient needs no output of the experts.
        # Source: Megatron-Core's memory-efficient permutation.
        wide = gate_P1.dtype
        hidden_PF = jax.nn.silu(gated_PF.astype(wide)) * up_PF.astype(wide) * gate_P1
        hidden_PF = hidden_PF.astype(x_nD.dtype)
    with jax.named_scope("down"):
        y_PD = down(hidden_PF)
    with jax.named_scope("sum_experts"):
        return gather_sum(y_PD, order.position, _row_of_place(order))


@jax.named_scope("sort_rows")
def sort_rows(x_nD, order: ExpertOrder):
    """Copies rows to their places among the expert-sorted ones [P, D]."""
    return spread(x_nD, _row_of_place(order), order.position)


def _row_of_place(order: ExpertOrder):
    """The row that each place [P] holds, -1 = none."""
    return jnp.where(order.pair >= 0, order.pair // order.position.shape[1], -1)
