"""What our kernels for Hopper GPUs lose while another kernel holds some of the processors.

  python -m benchmarks.held_processors

NCCL's kernel holds a few for the length of a transfer. Here a kernel that only waits takes its
place, on a stream of torch's, so that one GPU is enough. Times the products of an expert and the
loss's softmax with their work dealt in 1 to 16 shares a processor (layers/hopper.py), alone and
beside it. Needs torch (2.11 was there) beside what training needs.
"""

import functools
import time

import jax
import jax.numpy as jnp
import torch

from benchmarks.grouped_matmul import Products
from disag_jax.timing import time_calls
from layers import hopper
from layers.softmax_hopper import nll_and_gradient

NUM_ROWS = 65_536
LOSS_ROWS, VOCAB_SIZE = 8_192, 32_000
CALLS = 10
# Longer than the calls of a repeat take.
MILLISECONDS = 40
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


def milliseconds(name: str, call, holder: Holder, held: int) -> float:
    """Time of a call beside so many held processors."""
    prepare = functools.partial(holder.hold, held) if held else holder.wait
    figure = time_calls(name, call, calls=CALLS, prepare=prepare)
    holder.wait()
    return figure.milliseconds


def softmax_call():
    """A call of the loss's kernel."""
    logits = jax.random.normal(jax.random.key(0), (LOSS_ROWS, VOCAB_SIZE), jnp.float32)
    labels, weights = jnp.arange(LOSS_ROWS, dtype=jnp.int32), jnp.ones(LOSS_ROWS)
    return lambda: nll_and_gradient(logits, labels, weights, jnp.dtype("bfloat16"))


def main():
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {NUM_ROWS:,} rows; ms")
    holder = Holder(MILLISECONDS)
    for shares in (1, 2, 4, 8, 16):
        # Kernels are made for so many when they are traced.
        hopper.SHARES = shares
        jax.clear_caches()
        products = Products(NUM_ROWS, 0.0)
        calls = {name: products.calls[name][1] for name in Products.WHOLE}
        calls["softmax"] = softmax_call()
        for held in (0, 2):
            took = {name: milliseconds(name, call, holder, held) for name, call in calls.items()}
            took["all of an expert"] = sum(took[name] for name in Products.WHOLE)
            line = ", ".join(f"{name}: {ms:.3f}" for name, ms in took.items())
            print(f"{shares} shares, {held} processors held: {line}", flush=True)


if __name__ == "__main__":
    main()
