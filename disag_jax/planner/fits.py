"""Least-squares fits of measured times to the work that was timed."""

import numpy as np
from scipy.optimize import nnls

from disag_jax.planner.costs import Work
from disag_jax.planner.hardware import Transfer, UnitFit


def fit_unit(points: list[tuple[Work, float]]) -> UnitFit:
    """The coefficients of a unit's time, none below 0, from (work, seconds) of each shape."""
    work = [(1, w.products / 1e12, w.scores / 1e12, w.num_bytes / 1e9) for w, _ in points]
    milliseconds = [1e3 * seconds for _, seconds in points]
    (overhead, product, score, byte), r_squared = _fit(work, milliseconds)
    return UnitFit(1e3 * overhead, product, score, byte, r_squared, len(points))


def fit_transfer(points: list[tuple[int, float, float]]) -> Transfer:
    """Latency and rate from (rounds, bytes in all, seconds) of each size."""
    (latency, per_gigabyte), r_squared = _fit(
        [(rounds, num_bytes / 1e9) for rounds, num_bytes, _ in points],
        [seconds for *_, seconds in points],
    )
    if not per_gigabyte:
        raise ValueError("the largest transfer took no longer than the smallest")
    return Transfer(1 / per_gigabyte, 1e6 * latency, r_squared=r_squared)


def fit_slope(points: list[tuple[float, float]]) -> float:
    """The slope of (x, y) through the origin."""
    (slope,), _ = _fit([(x,) for x, _ in points], [y for _, y in points])
    return slope


def _fit(columns, values) -> tuple[list[float], float]:
    """(coefficients, R^2); relative errors count, or the largest shapes alone would decide."""
    columns, values = np.array(columns, float), np.array(values, float)
    scale = np.abs(columns).max(axis=0)
    scale[scale == 0] = 1
    coefficients, _ = nnls(columns / scale / values[:, None], np.ones_like(values))
    coefficients = coefficients / scale
    residual = values - columns @ coefficients
    spread = values - values.mean()
    total = float(spread @ spread)
    r_squared = 1 - float(residual @ residual) / total if total else 1.0
    return coefficients.tolist(), max(0.0, r_squared)
