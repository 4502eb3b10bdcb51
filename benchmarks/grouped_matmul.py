"""Times the grouped matrix product on a Hopper GPU, beside torch's where torch is installed.

  python -m benchmarks.grouped_matmul

Rows are routed at random to 64 experts, evenly or skewed; widths are the balanced shape's. Prints
the time and the rate of each product, counting the real rows only.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from disag_jax.timing import time_calls
from layers.grouped_matmul import order_by_expert, sorted_rows, tile_rows
from layers.grouped_matmul_hopper import (
    add_weight_gradient,
    rows_times_pair,
    rows_times_weights,
)

EXPERTS, D_MODEL, WIDTH = 64, 2048, 1408
REPEATS = 20


def route(num_rows: int, skew: float):
    """Expert ids [num_rows] in which the most popular expert is e^skew times the least popular."""
    weight = np.exp(-skew * np.arange(EXPERTS) / EXPERTS)
    return np.random.default_rng(0).choice(EXPERTS, num_rows, p=weight / weight.sum())


def measure(num_rows: int, skew: float):
    """Prints a line for each product of one routing."""
    ids = route(num_rows, skew)
    num_sorted = sorted_rows(num_rows, EXPERTS, tile_rows())
    order, _ = order_by_expert(
        jnp.asarray(ids, jnp.int32)[:, None], EXPERTS, num_sorted, tile_rows()
    )
    keys = jax.random.split(jax.random.key(0), 3)
    real = order.pair[:, None] >= 0
    x = jnp.where(real, jax.random.normal(keys[0], (num_sorted, D_MODEL), jnp.bfloat16), 0)
    dy, dz = jnp.where(real, jax.random.normal(keys[1], (2, num_sorted, WIDTH), jnp.bfloat16), 0)
    w = jax.random.normal(keys[2], (2 * EXPERTS, D_MODEL, WIDTH), jnp.bfloat16)
    sums = jnp.zeros((EXPERTS, D_MODEL, WIDTH))

    # Whatever a call is given is made before: only kernels are timed.
    both = jnp.array([0, EXPERTS], jnp.int32)
    first, second = both[:1], both[1:]
    product = functools.partial(rows_times_weights, num_experts=EXPERTS)

    @jax.jit
    def add_products(dy, dz, w):
        one = product((dy,), w, first, order.tile_expert, transpose=True)
        return one + product((dz,), w, second, order.tile_expert, transpose=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(sums, x, dy):
        return add_weight_gradient(sums, jnp.int32(0), x, dy, order.tile_expert, EXPERTS)

    def add_again():
        nonlocal sums
        sums = add(sums, x, dy)
        return sums[0, 0, 0]

    groups = order.tile_expert
    calls = {
        "x w": (1, lambda: product((x,), w, first, groups, transpose=False)),
        "x w, x v": (2, lambda: rows_times_pair(x, w, both, groups, num_experts=EXPERTS)),
        "dy w^T": (1, lambda: product((dy,), w, first, groups, transpose=True)),
        "dy w^T + dz v^T": (2, lambda: product((dy, dz), w, both, groups, transpose=True)),
        "the same in three": (2, lambda: add_products(dy, dz, w)),
        "+= x^T dy": (1, add_again),
    }
    counts = np.bincount(ids, minlength=EXPERTS)
    load = counts.max() / counts.mean()
    work = 2 * num_rows * D_MODEL * WIDTH
    for name, (num_products, call) in calls.items():
        took = time_calls(name, call, calls=REPEATS).milliseconds / 1e3
        _report(name, num_rows, load, took, num_products * work)
    _measure_torch(num_rows, counts, load, work)


def _measure_torch(num_rows: int, counts, load: float, work: float):
    try:
        import torch
    except ImportError:
        return
    ends = torch.tensor(np.cumsum(counts), dtype=torch.int32, device="cuda")
    x = torch.randn(num_rows, D_MODEL, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(EXPERTS, D_MODEL, WIDTH, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        torch._grouped_mm(x, w, offs=ends)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(REPEATS):
        torch._grouped_mm(x, w, offs=ends)
    torch.cuda.synchronize()
    _report("torch x w", num_rows, load, (time.perf_counter() - began) / REPEATS, work)


def _report(name: str, num_rows: int, load: float, took: float, work: float):
    print(
        f"{name:17} {num_rows:7,} rows, max/mean load {load:.2f}: {1e3 * took:6.3f} ms, "
        f"{work / took / 1e12:4.0f} TFLOP/s",
        flush=True,
    )


def main():
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for num_rows, skew in ((98_304, 0.0), (98_304, 2.0), (65_536, 0.0), (32_768, 0.0)):
        measure(num_rows, skew)


if __name__ == "__main__":
    main()
