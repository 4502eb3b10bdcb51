"""What kernels on a Hopper GPU lose while another kernel holds some of the processors.

  python -m benchmarks.held_processors
  python -m benchmarks.held_processors --config configs/slow_network.py

NCCL's kernel holds a few for the length of a transfer. Here a kernel that only waits takes its
place, on a stream of torch's, so that one GPU is enough. Times the products of an expert and the
loss's softmax with their work dealt in 1 to 16 shares a processor (layers/hopper.py), alone and
beside it. With `--config` it times its units instead, whose attention is cuDNN's and cuBLAS's, and
the products of attention's output projection by XLA's choice and by our kernels, as of one expert.
Needs torch (2.11 was there) beside what training needs.
"""

import functools
import math
import time

import jax
import jax.numpy as jnp
import torch

from benchmarks.grouped_matmul import Products
from disag_jax.bench_units import UnitBench
from disag_jax.config import Config
from disag_jax.timing import time_calls
from layers import hopper
from layers.grouped_matmul import tile_rows
from layers.grouped_matmul_hopper import rows_times_weights, weight_gradient
from layers.softmax_hopper import nll_and_gradient

NUM_ROWS = 65_536
LOSS_ROWS, VOCAB_SIZE = 8_192, 32_000
CALLS = 10
# Of one kernel that holds; longer than the products' calls of a repeat take.
MILLISECONDS = 40
HELD = (2, 4)  # processors
# Threads as NCCL's kernel has them, and shared memory that leaves none of ours room beside it.
THREADS, SHARED_BYTES = 640, 40 * 1024
WAIT = r"""
extern "C" __global__ void wait(int nanoseconds) {
  long long begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  do {
    __nanosleep(200);
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - begin < nanoseconds);
}
"""


class Holder:
    """Holds processors for a while beside what other streams run.

    milliseconds: of one kernel, 2,000 at most.
    """

    def __init__(self, milliseconds: int):
        self._milliseconds = milliseconds
        self._kernel = torch.cuda._compile_kernel(WAIT, "wait")
        self._stream = torch.cuda.Stream()
        self._is_holding = False

    def hold(self, processors: int, kernels: int = 1):
        """Holds so many processors by kernels that follow each other, after a `wait`."""
        self.wait()
        self._is_holding = True
        for _ in range(kernels):
            self._kernel(
                grid=(processors, 1, 1),
                block=(THREADS, 1, 1),
                args=[self._milliseconds * 1_000_000],
                shared_mem=SHARED_BYTES,
                stream=self._stream,
            )
        # It must have begun before what is timed is sent.
        time.sleep(0.002)

    def wait(self):
        """Waits for the end; RuntimeError if it has come before what ran beside it had ended."""
        if self._is_holding and self._stream.query():
            raise RuntimeError("processors were not held to the end")
        self._stream.synchronize()
        self._is_holding = False


def milliseconds(name: str, call, holder: Holder, held: int, kernels: int = 1) -> float:
    """Time of a call beside so many processors held by so many kernels, one after the other."""
    prepare = functools.partial(holder.hold, held, kernels) if held else holder.wait
    figure = time_calls(name, call, calls=CALLS, prepare=prepare)
    holder.wait()
    return figure.milliseconds


def softmax_call():
    """A call of the loss's kernel."""
    logits = jax.random.normal(jax.random.key(0), (LOSS_ROWS, VOCAB_SIZE), jnp.float32)
    labels, weights = jnp.arange(LOSS_ROWS, dtype=jnp.int32), jnp.ones(LOSS_ROWS)
    return lambda: nll_and_gradient(logits, labels, weights, jnp.dtype("bfloat16"))


def measure_shares(holder: Holder):
    """Prints a line for each number of shares, with and without held processors."""
    print(f"{NUM_ROWS:,} rows; ms")
    for shares in (1, 2, 4, 8, 16):
        # Kernels are made for so many when they are traced.
        hopper.SHARES = shares
        jax.clear_caches()
        products = Products(NUM_ROWS, 0.0)
        calls = {name: products.calls[name][1] for name in Products.WHOLE}
        calls["softmax"] = softmax_call()
        for held in (0, HELD[0]):
            took = {name: milliseconds(name, call, holder, held) for name, call in calls.items()}
            took["all of an expert"] = sum(took[name] for name in Products.WHOLE)
            line = ", ".join(f"{name}: {ms:.3f}" for name, ms in took.items())
            print(f"{shares} shares, {held} processors held: {line}", flush=True)


def projection_calls(config: Config) -> dict:
    """Calls of attention's largest product and of its gradients, by XLA and by our kernels."""
    model, tokens = config.model, config.batch.tokens_per_worker
    inner, outer = model.num_heads * model.head_dim, model.d_model
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (tokens, inner), (inner, outer), (tokens, outer)
    x, w, dy = (jax.random.normal(*one, jnp.bfloat16) for one in zip(keys, shapes, strict=True))
    one_expert, first = jnp.zeros(tokens // tile_rows(), jnp.int32), jnp.zeros(1, jnp.int32)
    product = functools.partial(rows_times_weights, num_experts=1)
    stack = w[None]
    # As arguments: what a program closes over is a constant of it.
    by_xla = {
        "x w": functools.partial(jax.jit(jnp.matmul), x, w),
        "dy w^T": functools.partial(jax.jit(lambda dy, w: dy @ w.T), dy, w),
        "x^T dy": functools.partial(jax.jit(lambda x, dy: x.T @ dy), x, dy),
    }
    by_kernels = {
        "x w": lambda: product((x,), stack, first, one_expert, transpose=False),
        "dy w^T": lambda: product((dy,), stack, first, one_expert, transpose=True),
        "x^T dy": lambda: weight_gradient(x, dy, one_expert, 1, x.dtype),
    }
    ways = {"XLA": by_xla, "our kernel": by_kernels}
    return {f"{name}, {way}": call for way, calls in ways.items() for name, call in calls.items()}


def measure_config(config: Config, holder: Holder):
    """Prints a line for each unit and product: its time beside no, two and four processors held."""
    calls = UnitBench.of(config.validate()).calls() | projection_calls(config)
    for name, call in calls.items():
        alone = milliseconds(name, call, holder, 0)
        # For three times as long as the calls take alone.
        kernels = math.ceil(3 * CALLS * alone / MILLISECONDS)
        beside = [milliseconds(name, call, holder, held, kernels) for held in HELD]
        found = ", ".join(f"{ms:.3f} ({ms / alone - 1:+.0%})" for ms in beside)
        print(f"{name}: {alone:.3f} ms alone, beside {HELD} held {found}", flush=True)


def main(config: Config | None):
    """Times the config's units, or without one the products."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    holder = Holder(MILLISECONDS)
    if config is None:
        measure_shares(holder)
    else:
        measure_config(config, holder)


if __name__ == "__main__":
    from disag_jax import cli
    from mesh import runtime

    _CONFIG = cli.define_config_flag()

    def _run():
        runtime.start(0)
        main(_CONFIG.value)

    cli.run(_run)
