"""Grouped-query causal self-attention with rotary position embedding.

Legend: B sequences, S positions, D model width, H query heads, G key/value heads, A head width,
Q = H / G query heads per key/value head.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers import target
from layers.dtypes import accumulation_dtype
from layers.recall import recalled


class AttentionKernel(enum.StrEnum):
    """Implementation of softmax(q k^T) v."""

    CUDNN = "cudnn"
    EINSUM = "einsum"


def default_kernel(dtype) -> AttentionKernel:
    """cuDNN's flash attention for bfloat16 on a GPU, else einsum."""
    fused = target.is_gpu() and dtype == jnp.bfloat16
    return AttentionKernel.CUDNN if fused else AttentionKernel.EINSUM


def apply_rope(x_BSHA, theta: float):
    """Rotates pairs (i, i + A/2) of each head by position * theta^(-2i/A).

    Source: Su et al., "RoFormer"; the half-split pairing of the Llama family.
    """
    seq_len, head_dim = x_BSHA.shape[1], x_BSHA.shape[3]
    # bfloat16 cannot count positions past 256: angles are always wide.
    dtype = accumulation_dtype(x_BSHA.dtype)
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    angle = jnp.arange(seq_len, dtype=dtype)[:, None] * frequency
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    low, high = jnp.split(x_BSHA.astype(dtype), 2, axis=-1)
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return rotated.astype(x_BSHA.dtype)


class Attended(NamedTuple):
    """What `causal_attention` returns: out [B, S, H, A]; lse: log-sum-exp of scores [B, H, S]."""

    out: jax.Array
    lse: jax.Array


def causal_attention(
    q_BSHA, k_BSGA, v_BSGA, kernel: AttentionKernel, segments_BS=None, kept: Attended | None = None
) -> Attended:
    """Softmax attention over earlier positions, scaled by A^-1/2; differentiable in q, k and v.

    segments_BS: integers; a position sees only those with its own number. None: all earlier ones.
    kept: what a pass with these inputs returned; then only the gradient is computed, as in
      FlashAttention (Dao et al., 2022): of `out` alone.
    """
    # cuDNN reads the mask from memory, B S^2 words: 2.5 times the time of the plain causal one on
    # an H100 at S = 4096, a fifth of einsum's.
    mask_BSS = None
    if segments_BS is not None:
        mask_BSS = segments_BS[:, :, None] == segments_BS[:, None, :]
    passes = _kernel_passes(kernel)

    @jax.custom_vjp
    def attend(q_BSHA, k_BSGA, v_BSGA):
        return kept or Attended(*passes.forward(q_BSHA, k_BSGA, v_BSGA, mask_BSS))

    def forward(*qkv):
        attended = attend(*qkv)
        return attended, (*qkv, *attended)

    def backward(saved, cotangent: Attended):
        return passes.backward(*saved, cotangent.out, mask_BSS)

    attend.defvjp(forward, backward)
    return attend(q_BSHA, k_BSGA, v_BSGA)


def _kernel_passes(kernel: AttentionKernel):
    """The module or class that holds the kernel's `forward` and `backward`."""
    if kernel is AttentionKernel.EINSUM:
        return _Einsum
    # It needs JAX's GPU support to import.
    from layers import cudnn_attention

    return cudnn_attention


class _Einsum:
    """Attention anywhere, with all scores in memory."""

    @staticmethod
    def forward(q_BSHA, k_BSGA, v_BSGA, mask_BSS):
        scores = _masked_scores(q_BSHA, k_BSGA, mask_BSS)
        lse = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.exp(scores - lse[..., None]).astype(v_BSGA.dtype)
        out = jnp.einsum("bgqst,btga->bsgqa", weights, v_BSGA)
        return out.reshape(q_BSHA.shape), _flat_heads(lse)

    @staticmethod
    def backward(q_BSHA, k_BSGA, v_BSGA, out_BSHA, lse_BHS, dout_BSHA, mask_BSS):
        groups, dtype, wide = k_BSGA.shape[2], q_BSHA.dtype, lse_BHS.dtype
        scores = _masked_scores(q_BSHA, k_BSGA, mask_BSS)
        weights = jnp.exp(scores - lse_BHS.reshape(scores.shape[:-1])[..., None])
        dout = _by_group(dout_BSHA, groups)
        dv_BSGA = jnp.einsum("bgqst,bsgqa->btga", weights.astype(dtype), dout)
        dweights = jnp.einsum("bsgqa,btga->bgqst", dout, v_BSGA, preferred_element_type=wide)
        # The gradient of a softmax needs sum(weights * dweights), which is sum(out * dout).
        inner = jnp.sum(dout_BSHA.astype(wide) * out_BSHA.astype(wide), axis=-1)
        inner = inner.swapaxes(1, 2).reshape(scores.shape[:-1])
        scale = q_BSHA.shape[-1] ** -0.5
        dscores = (weights * (dweights - inner[..., None]) * scale).astype(dtype)
        dq = jnp.einsum("bgqst,btga->bsgqa", dscores, k_BSGA).reshape(q_BSHA.shape)
        dk_BSGA = jnp.einsum("bgqst,bsgqa->btga", dscores, _by_group(q_BSHA, groups))
        return dq, dk_BSGA, dv_BSGA


def _masked_scores(q_BSHA, k_BSGA, mask_BSS):
    """Scaled scores [B, G, Q, S, S], wide, -inf where a position may not see another."""
    seq_len, head_dim = q_BSHA.shape[1], q_BSHA.shape[3]
    wide = accumulation_dtype(q_BSHA.dtype)
    q_BSGQA = _by_group(q_BSHA, k_BSGA.shape[2])
    scores = jnp.einsum("bsgqa,btga->bgqst", q_BSGQA, k_BSGA, preferred_element_type=wide)
    visible = jnp.tril(jnp.ones((seq_len, seq_len), bool))
    if mask_BSS is not None:
        visible = visible & mask_BSS[:, None, None]
    return jnp.where(visible, scores * head_dim**-0.5, -jnp.inf)


def _by_group(x_BSHA, groups: int):
    """Heads [H] as [G, Q]."""
    batch, seq_len, num_heads, head_dim = x_BSHA.shape
    return x_BSHA.reshape(batch, seq_len, groups, num_heads // groups, head_dim)


def _flat_heads(x_BGQS):
    batch, groups, per_group, seq_len = x_BGQS.shape
    return x_BGQS.reshape(batch, groups * per_group, seq_len)


class AttentionKept(NamedTuple):
    """What a pass of `Attention` can keep for its backward pass; None is computed again.

    q [B, S, H, A], k and v [B, S, G, A], after the rotation; attended.
    """

    q: jax.Array | None = None
    k: jax.Array | None = None
    v: jax.Array | None = None
    attended: Attended | None = None


class Attention(nnx.Module):
    """Projections around `causal_attention`; input and output [B, S, D]."""

    def __init__(
        self, *, d_model, num_heads, num_kv_heads, head_dim, rope_theta, init_std, out_init_std,
        dtype=jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        init = nnx.initializers.normal(init_std)
        out_init = nnx.initializers.normal(out_init_std)
        self.query = nnx.Param(init(rngs.params(), (d_model, num_heads, head_dim), dtype))
        self.key = nnx.Param(init(rngs.params(), (d_model, num_kv_heads, head_dim), dtype))
        self.value = nnx.Param(init(rngs.params(), (d_model, num_kv_heads, head_dim), dtype))
        self.out = nnx.Param(out_init(rngs.params(), (num_heads, head_dim, d_model), dtype))
        self.rope_theta = rope_theta

    def __call__(self, x_BSD, segments_BS=None, kernel: AttentionKernel | None = None):
        return self.attend(x_BSD, segments_BS, kernel)[0]

    def attend(
        self,
        x_BSD,
        segments_BS=None,
        kernel: AttentionKernel | None = None,
        kept: AttentionKept = AttentionKept(),  # noqa: B008
    ):
        """Returns (output, everything of `AttentionKept`), taking from `kept` what it holds."""
        kernel = kernel or default_kernel(x_BSD.dtype)
        with jax.named_scope("qkv_projection"):
            q_BSHA = self._project(x_BSD, self.query, kept.q, rotates=True)
            k_BSGA = self._project(x_BSD, self.key, kept.k, rotates=True)
            v_BSGA = self._project(x_BSD, self.value, kept.v, rotates=False)
        with jax.named_scope("causal_attention"):
            attended = causal_attention(q_BSHA, k_BSGA, v_BSGA, kernel, segments_BS, kept.attended)
        with jax.named_scope("out_projection"):
            y_BSD = jnp.einsum("bsha,had->bsd", attended.out, self.out[...])
        return y_BSD, AttentionKept(q_BSHA, k_BSGA, v_BSGA, attended)

    def _project(self, x_BSD, weights: nnx.Param, kept, *, rotates: bool):
        def project(x_BSD, w_DHA):
            heads_BSHA = jnp.einsum("bsd,dha->bsha", x_BSD, w_DHA)
            return apply_rope(heads_BSHA, self.rope_theta) if rotates else heads_BSHA

        if kept is None:
            return project(x_BSD, weights[...])
        return recalled(project, kept, x_BSD, weights[...])
