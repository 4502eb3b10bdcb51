"""Top-k routing of tokens to experts: scores, choices, gates, capacity, balance.

Choices are integers and are made once, in the forward pass; everything that carries a gradient
(scores, gates, losses) is a function of the logits at given choices, so a backward pass can
recompute it without choosing again.

Legend: B sequences, S positions, T = B*S tokens, D model width, E experts, K choices per token.
"""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from layers import target
from layers.dtypes import accumulation_dtype
from layers.norm import RMSNorm, inverse_rms

# Keeps sums of sigmoid scores, which can all underflow, from dividing by zero.
TINY = 1e-20


class Router(nnx.Module):
    """Linear map from normalised hidden states to one logit per expert.

    A norm is a factor for each row and one for each column, and both can be had at the product: the
    normalised rows, which would have to be written and read, are never made.
    """

    def __init__(self, *, d_model, num_experts, init_std, dtype=jnp.float32, rngs: nnx.Rngs):
        init = nnx.initializers.normal(init_std)
        self.kernel = nnx.Param(init(rngs.params(), (d_model, num_experts), dtype))

    def __call__(self, x_TD, norm: RMSNorm):
        """Logits [T, E] of the rows that `norm` makes of x; in float32 or wider."""
        wide = accumulation_dtype(x_TD.dtype)
        kernel_DE = norm.scale[...].astype(wide)[:, None] * self.kernel[...].astype(wide)
        return _product(x_TD, kernel_DE) * inverse_rms(x_TD, norm.eps)


@jax.custom_vjp
def _product(x_TD, kernel_DE):
    """The wide product of rows and wide weights, which are rounded to the rows' type.

    Rows made wide first would be twice the traffic, which is what so few columns cost.
    """
    wide = kernel_DE.dtype
    return jnp.einsum("td,de->te", x_TD, kernel_DE.astype(x_TD.dtype), preferred_element_type=wide)


def _product_backward(saved, dy_TE):
    x_TD, kernel_DE = saved
    # Rounded to the rows' type, as the other gradients of activations are.
    dtype, wide = x_TD.dtype, dy_TE.dtype
    dy_TE = dy_TE.astype(dtype)
    dx_TD = jnp.einsum("te,de->td", dy_TE, kernel_DE.astype(dtype), preferred_element_type=wide)
    dkernel_DE = jnp.einsum("td,te->de", x_TD, dy_TE, preferred_element_type=wide)
    return dx_TD.astype(dtype), dkernel_DE


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _product_backward)


def router_scores(logits_TE, kind: str):
    """Scores [T, E] from logits: "softmax" over the experts, or "sigmoid" of each."""
    if kind == "softmax":
        return jax.nn.softmax(logits_TE, axis=-1)
    if kind == "sigmoid":
        return jax.nn.sigmoid(logits_TE)
    raise ValueError(f"router_score = {kind!r} must be 'softmax' or 'sigmoid'")


def choose_experts(scores_TE, bias_E, top_k: int):
    """Expert ids [T, K] with the largest score + bias, best first, ties to the lower id.

    The bias steers the choice and never enters a gate. Source: Wang et al., "Auxiliary-Loss-Free
    Load Balancing Strategy for Mixture-of-Experts".
    """
    scores_TE = lax.stop_gradient(scores_TE) + bias_E
    # A GPU sorts whole rows for the largest few; a CPU is ten times slower at reducing pairs.
    if target.is_gpu():
        return largest_in_turn(scores_TE, top_k)
    return lax.top_k(scores_TE, top_k)[1].astype(jnp.int32)


def largest_in_turn(x_TE, count: int):
    """Columns [T, count] of each row's largest values, best first, ties to the lower column.

    As `lax.top_k` of finite values, but for zeros of both signs, which it tells apart.
    """
    columns = []
    for _ in range(count):
        columns.append(lax.argmax(x_TE, 1, jnp.int32))
        x_TE = jnp.where(jnp.arange(x_TE.shape[1]) == columns[-1][:, None], -jnp.inf, x_TE)
    return jnp.stack(columns, axis=1)


def gates_at(scores_TE, ids_TK, *, normalize: bool, scale: float):
    """Gates [T, K]: the scores of the chosen experts, optionally summing to one, times `scale`."""
    chosen_TKE = ids_TK[..., None] == jnp.arange(scores_TE.shape[-1])
    # A masked sum, not a gather: the transpose of a gather would be a scatter-add.
    gates_TK = jnp.sum(jnp.where(chosen_TKE, scores_TE[:, None, :], 0), axis=-1)
    if normalize:
        gates_TK = gates_TK / (jnp.sum(gates_TK, axis=-1, keepdims=True) + TINY)
    return gates_TK * scale


def choice_counts(ids_BSK, num_experts: int):
    """Times each expert was chosen in each sequence, int32 [B, E]."""
    return jnp.sum(ids_BSK[..., None] == jnp.arange(num_experts), axis=(1, 2), dtype=jnp.int32)


def expert_capacity(capacity_factor: float, seq_len: int, top_k: int, num_experts: int) -> int:
    """Tokens of one sequence that one expert keeps at most: the ceiling of the exact product."""
    # In floats 1.1 * 100 * 1 / 10 is a little more than 11, and its ceiling 12.
    return math.ceil(Fraction(str(capacity_factor)) * seq_len * top_k / num_experts)


def within_capacity(ids_BSK, num_experts: int, capacity: int):
    """True [B, S, K] where fewer than `capacity` earlier tokens chose the same expert.

    Priority goes to earlier tokens of the sequence, whatever the rank of the choice, so that
    dropping never depends on later tokens.
    """
    chose_BSE = jnp.any(ids_BSK[..., None] == jnp.arange(num_experts), axis=2).astype(jnp.int32)
    earlier_BSE = jnp.cumsum(chose_BSE, axis=1) - chose_BSE
    return jnp.take_along_axis(earlier_BSE, ids_BSK, axis=2) < capacity


def balance_loss(scores_BSE, counts_BE, top_k: int):
    """Per-sequence balance loss [B]: sum over e of f_e P_e, 1 when perfectly even.

    f_e is the share of choices that went to expert e times E (no gradient), P_e the mean share of
    its score. Source: DeepSeek-V3 technical report, section 2.1.2.
    """
    seq_len, num_experts = scores_BSE.shape[1:]
    fraction_BE = counts_BE * (num_experts / (top_k * seq_len))
    share_BSE = scores_BSE / (jnp.sum(scores_BSE, axis=-1, keepdims=True) + TINY)
    return jnp.sum(fraction_BE * jnp.mean(share_BSE, axis=1), axis=-1)


def z_loss(logits_TE):
    """Squared log-partition of each token's logits, [T]. Source: Zoph et al., "ST-MoE"."""
    return jax.nn.logsumexp(logits_TE, axis=-1) ** 2


def updated_bias(bias_LE, counts_LE, rate: float):
    """The selection bias after a step: up for experts below the mean load, down for those above."""
    counts = counts_LE.astype(bias_LE.dtype)
    return bias_LE + rate * jnp.sign(jnp.mean(counts, axis=-1, keepdims=True) - counts)
