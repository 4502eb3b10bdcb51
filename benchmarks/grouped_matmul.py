"""Times the grouped matrix product on a Hopper GPU, beside torch's where torch is installed.

  python -m benchmarks.grouped_matmul

Rows are routed at random to 64 experts, evenly or skewed; widths are the balanced shape's. Prints
the time and the rate of each product, counting the real rows only.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from disag_jax.timing import time_calls
from layers.grouped_matmul import order_by_expert, sorted_rows, tile_rows
from layers.grouped_matmul_hopper import (
    add_weight_gradient,
    rows_times_pair,
    rows_times_weights,
    weight_gradient,
)

EXPERTS, D_MODEL, WIDTH = 64, 2048, 1408
REPEATS = 20


def route(num_rows: int, skew: float):
    """Expert ids [num_rows] in which the most popular expert is e^skew times the least popular."""
    weight = np.exp(-skew * np.arange(EXPERTS) / EXPERTS)
    return np.random.default_rng(0).choice(EXPERTS, num_rows, p=weight / weight.sum())


class Products:
    """The products of one routing, as calls without arguments.

    Attributes:
      counts: real rows of each expert.
      calls: by name, (products of rows and a weight matrix that it makes, the call). Whatever a
        call is given is made before: only kernels are timed.
    """

    # Of an expert: two products forward as a pair and the one down, and what their gradients take.
    WHOLE = ("x w, x v", "x w", "dy w^T", "dy w^T + dz v^T", *3 * ["+= x^T dy"])
    # One product forward and its two gradients, all in bfloat16, as torch's below.
    ALONE = ("x w", "dy w^T", "x^T dy")

    def __init__(self, num_rows: int, skew: float):
        ids = route(num_rows, skew)
        self.counts = np.bincount(ids, minlength=EXPERTS)
        num_sorted = sorted_rows(num_rows, EXPERTS, tile_rows())
        order, _ = order_by_expert(
            jnp.asarray(ids, jnp.int32)[:, None], EXPERTS, num_sorted, tile_rows()
        )
        keys = jax.random.split(jax.random.key(0), 3)
        real = order.pair[:, None] >= 0
        x = jnp.where(real, jax.random.normal(keys[0], (num_sorted, D_MODEL), jnp.bfloat16), 0)
        dy, dz = jnp.where(
            real, jax.random.normal(keys[1], (2, num_sorted, WIDTH), jnp.bfloat16), 0
        )
        w = jax.random.normal(keys[2], (2 * EXPERTS, D_MODEL, WIDTH), jnp.bfloat16)
        sums = jnp.zeros((EXPERTS, D_MODEL, WIDTH))
        both, groups = jnp.array([0, EXPERTS], jnp.int32), order.half_expert
        first, second = both[:1], both[1:]
        product = functools.partial(rows_times_weights, num_experts=EXPERTS)

        @jax.jit
        def add_products(dy, dz, w):
            one = product((dy,), w, first, groups, transpose=True)
            return one + product((dz,), w, second, groups, transpose=True)

        @functools.partial(jax.jit, donate_argnums=0)
        def add(sums, x, dy):
            return add_weight_gradient(sums, jnp.int32(0), x, dy, groups, EXPERTS)

        def add_again():
            nonlocal sums
            sums = add(sums, x, dy)
            return sums[0, 0, 0]

        self.calls = {
            "x w": (1, lambda: product((x,), w, first, groups, transpose=False)),
            "x w, x v": (2, lambda: rows_times_pair(x, w, both, groups, num_experts=EXPERTS)),
            "dy w^T": (1, lambda: product((dy,), w, first, groups, transpose=True)),
            "dy w^T + dz v^T": (2, lambda: product((dy, dz), w, both, groups, transpose=True)),
            "the same in three": (2, lambda: add_products(dy, dz, w)),
            "+= x^T dy": (1, add_again),
            "x^T dy": (1, lambda: weight_gradient(x, dy, groups, EXPERTS, x.dtype)),
        }


def measure(num_rows: int, skew: float):
    """Prints a line for each product of one routing."""
    products = Products(num_rows, skew)
    counts = products.counts
    line = functools.partial(_report, num_rows, counts.max() / counts.mean())
    took = {
        name: line(name, time_calls(name, call, calls=REPEATS).milliseconds, num_products)
        for name, (num_products, call) in products.calls.items()
    }
    line("all of an expert", sum(took[name] for name in Products.WHOLE), 9)
    line("x w and gradients", sum(took[name] for name in Products.ALONE), 3)
    _measure_torch(num_rows, counts, line)


def _report(num_rows: int, load: float, name: str, milliseconds: float, num_products: int) -> float:
    """Prints a line for a measured time and returns it."""
    work = num_products * 2 * num_rows * D_MODEL * WIDTH
    print(
        f"{name:17} {num_rows:7,} rows, max/mean load {load:.2f}: {milliseconds:6.3f} ms, "
        f"{work / milliseconds / 1e9:4.0f} TFLOP/s",
        flush=True,
    )
    return milliseconds


def _measure_torch(num_rows: int, counts, line):
    """The same products of torch; it writes the weights' gradient, and adds it to nothing."""
    try:
        import torch
    except ImportError:
        return
    ends = torch.tensor(np.cumsum(counts), dtype=torch.int32, device="cuda")

    def draw(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, dy, w = draw(num_rows, D_MODEL), draw(num_rows, WIDTH), draw(EXPERTS, D_MODEL, WIDTH)
    calls = {
        "torch x w": lambda: torch._grouped_mm(x, w, offs=ends),
        "torch dy w^T": lambda: torch._grouped_mm(dy, w.transpose(1, 2), offs=ends),
        "torch x^T dy": lambda: torch._grouped_mm(x.t(), dy, offs=ends),
    }

    def milliseconds(name: str, call) -> float:
        wait = lambda _: torch.cuda.synchronize()  # noqa: E731
        return time_calls(name, call, calls=REPEATS, wait=wait).milliseconds

    took = {name: line(name, milliseconds(name, call), 1) for name, call in calls.items()}
    line("torch, all three", sum(took.values()), 3)


def main():
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for num_rows, skew in itertools.product((98_304, 65_536, 32_768), (0.0, 2.0)):
        measure(num_rows, skew)


if __name__ == "__main__":
    main()
