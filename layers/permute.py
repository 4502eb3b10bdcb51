"""Copying rows by saved indices, and its adjoint.

A row goes to several places (a token to several expert workers, a row to several experts) and the
results come back to one. Both directions are gathers: `source` lists for each place the row it
holds, `position` lists for each row the places it went to, -1 is none. Each function is the
other's transpose, so no gradient is ever a scatter-add, whose order would differ between runs.

Legend: n rows, m places, j places per row at most, D width.
"""

import jax
import jax.numpy as jnp

from layers.dtypes import accumulation_dtype


def take_rows(x_nD, index):
    """Rows of x at `index` (any shape), zeros where the index is -1."""
    rows = x_nD.at[jnp.maximum(index, 0)].get(mode="promise_in_bounds")
    return jnp.where(index[..., None] >= 0, rows, jnp.zeros((), x_nD.dtype))


@jax.custom_vjp
def spread(x_nD, source_m, position_nj):
    """Copies rows to their places: out[m] = x[source[m]], zeros where there is none."""
    del position_nj
    return take_rows(x_nD, source_m)


@jax.custom_vjp
def gather_sum(y_mD, position_nj, source_m):
    """Sums the places of each row: out[n] = sum over j of y[position[n, j]], in a fixed order."""
    del source_m
    places_njD = take_rows(y_mD, position_nj)
    return jnp.sum(places_njD, axis=1, dtype=accumulation_dtype(y_mD.dtype)).astype(y_mD.dtype)


def _spread_forward(x_nD, source_m, position_nj):
    return take_rows(x_nD, source_m), (source_m, position_nj)


def _spread_backward(saved, dy_mD):
    source_m, position_nj = saved
    return gather_sum(dy_mD, position_nj, source_m), None, None


def _gather_sum_forward(y_mD, position_nj, source_m):
    return gather_sum(y_mD, position_nj, source_m), (source_m, position_nj)


def _gather_sum_backward(saved, dx_nD):
    source_m, position_nj = saved
    return spread(dx_nD, source_m, position_nj), None, None


spread.defvjp(_spread_forward, _spread_backward)
gather_sum.defvjp(_gather_sum_forward, _gather_sum_backward)
