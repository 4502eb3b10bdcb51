"""The one rule for the type of sums."""

import jax.numpy as jnp


def accumulation_dtype(dtype):
    """Type for sums, softmax and statistics of `dtype` values: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)
