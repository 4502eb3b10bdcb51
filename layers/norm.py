"""Root-mean-square normalisation."""

import jax.numpy as jnp
from flax import nnx
from jax import lax

from layers.dtypes import accumulation_dtype


def rms_norm(x, scale, eps):
    """Returns x / rms(x) * scale over the last dim; statistics in float32 or wider.

    x: [..., D], scale: [D]. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization".
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    # The scale is applied wide, so that its gradient is a wide sum over all rows.
    return (wide * inverse_rms(x, eps) * scale.astype(wide.dtype)).astype(x.dtype)


def inverse_rms(x, eps):
    """1 / rms(x) over the last dim, which stays with length 1; in float32 or wider."""
    wide = x.astype(accumulation_dtype(x.dtype))
    return lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned scale."""

    def __init__(self, dim: int, eps: float, *, dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x):
        return rms_norm(x, self.scale[...], self.eps)
