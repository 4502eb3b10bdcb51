"""Least-squares fits of measured times to the work that was timed."""

import dataclasses

import numpy as np
from scipy.optimize import lsq_linear

from disag_jax.errors import RunError
from disag_jax.planner.costs import Work
from disag_jax.planner.hardware import UNITS, Link, Transfer, UnitFit


def fit_units(points: dict[str, list[dict]], product_tflops: float) -> dict[str, UnitFit]:
    """The fits of all units, from the points that `disag_jax.profile` keeps."""
    fields = [field.name for field in dataclasses.fields(Work)]
    return {
        unit: fit_unit(
            [
                (Work(*(point[field] for field in fields)), 1e-3 * point["milliseconds"])
                for point in points[unit]
            ],
            product_tflops,
        )
        for unit in UNITS
    }


def fit_unit(points: list[tuple[Work, float]], product_tflops: float) -> UnitFit:
    """The coefficients of a unit's time from (work, seconds) of each shape.

    None is below 0, and no FLOP is faster than in a large product: in one model's shapes products
    and bytes grow together, and without the bound a fit may take all of it for bytes.
    """
    work = [(1, w.products / 1e12, w.scores / 1e12, w.num_bytes / 1e9) for w, _ in points]
    milliseconds = [1e3 * seconds for _, seconds in points]
    least = 1e3 / product_tflops
    (overhead, product, score, byte), r_squared = _fit(work, milliseconds, (0, least, least, 0))
    return UnitFit(1e3 * overhead, product, score, byte, r_squared, len(points))


def fit_link(points: dict[str, list[dict]]) -> Link:
    """The fits of all kinds of transfer, from the points that `disag_jax.profile` keeps."""
    kinds = [field.name for field in dataclasses.fields(Link)]
    return Link(
        **{
            kind: fit_transfer(
                [(p["rounds"], p["num_bytes"], 1e-3 * p["milliseconds"]) for p in points[kind]]
            )
            for kind in kinds
        }
    )


def fit_transfer(points: list[tuple[int, float, float]]) -> Transfer:
    """Latency and rate from (rounds, bytes in all, seconds) of each size."""
    (latency, per_gigabyte), r_squared = _fit(
        [(rounds, num_bytes / 1e9) for rounds, num_bytes, _ in points],
        [seconds for *_, seconds in points],
        (0, 0),
    )
    if per_gigabyte < 1e-9:
        raise RunError("the largest transfer took no longer than the smallest: measure again")
    return Transfer(1 / per_gigabyte, 1e6 * latency, r_squared=r_squared)


def fit_update(points: dict[str, list[dict]]) -> float:
    """Milliseconds of an update per 10^9 parameters: a line through the origin."""
    (slope,), _ = _fit(
        [(point["parameters"] / 1e9,) for point in points["update"]],
        [point["milliseconds"] for point in points["update"]],
        (0,),
    )
    return slope


def _fit(columns, values, least) -> tuple[list[float], float]:
    """(coefficients, each at least `least`; R^2).

    Relative errors count, or the largest shapes alone would decide. Work that no shape has gets 0.
    """
    columns, values = np.array(columns, float), np.array(values, float)
    scale = np.abs(columns).max(axis=0)
    is_there = scale > 0
    scale = np.where(is_there, scale, 1)
    bounds = (np.where(is_there, least, 0) * scale, np.inf)
    found = lsq_linear(columns / scale / values[:, None], np.ones_like(values), bounds, tol=1e-14)
    # What the solver leaves at a bound is off by its last digits.
    coefficients = np.where(is_there, np.maximum(found.x / scale, least), 0)
    residual = values - columns @ coefficients
    spread = values - values.mean()
    total = float(spread @ spread)
    r_squared = 1 - float(residual @ residual) / total if total else 1.0
    return coefficients.tolist(), max(0.0, r_squared)
