"""Loss and gradient of a softmax in one pass over the logits, for Hopper GPUs.

A processor keeps a row of logits in its shared memory between finding its largest, summing and
writing the gradient, so that memory is read once. Measured in benchmarks/README.md.

Legend: c rows, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from layers import hopper

SIDE = 256  # a row's words lie in rows of so many: a copy spans no more along one dim
# A thread holds a 128th of a piece in registers, and the code is as long as there are pieces.
LARGEST_PIECE, MOST_PIECES = 8192, 8
SHARED_BYTES = 208 * 1024  # of 227 KiB, for pieces of rows; reductions take 2
LEAST_ROWS = 8  # of a share: the first of it is fetched beside none


def piece_words(vocab_size: int) -> int | None:
    """The most words, 256 n, that cut a row into equal pieces; None if it does not fit so."""
    for words in range(LARGEST_PIECE, 0, -SIDE):
        if vocab_size % words == 0:
            pieces = vocab_size // words
            return words if pieces <= min(MOST_PIECES, SHARED_BYTES // (4 * words)) else None
    return None


@functools.partial(jax.jit, static_argnames="dtype")
def nll_and_gradient(logits_cV, label_c, weight_c, dtype):
    """Returns (-log softmax at the label [c], weight * gradient by the logits [c, V] in `dtype`).

    logits: float32, of a width that `piece_words` takes; label: int32, of 0 <= label < V;
    weight: float32.
    """
    assert (logits_cV.dtype, label_c.dtype) == (jnp.float32, jnp.int32)
    num_rows, vocab_size = logits_cV.shape
    words = piece_words(vocab_size)
    pieces, height = vocab_size // words, words // SIDE
    slots = min(SHARED_BYTES // (4 * words), 2 * pieces)

    def softmax_gradient(logits, label, weight, nll, gradient):
        def in_scope(ring, arrived):
            first_row, step = lax.axis_index("share"), lax.axis_size("share")
            rows_here = lax.div(num_rows - first_row + step - 1, step)

            def part(piece):
                return pl.ds(piece * height, height)

            def fetch(number):
                """Begins to load a piece, counted over all rows of this share."""
                row = first_row + lax.div(number, pieces) * step
                slot = lax.rem(number, slots)
                source = logits.at[row, part(lax.rem(number, pieces))]
                plgpu.copy_gmem_to_smem(source, ring.at[slot], arrived.at[slot])

            def fetch_if_any(number):
                pl.when(number < rows_here * pieces)(lambda: fetch(number))

            for number in range(slots):
                fetch_if_any(jnp.int32(number))

            @pl.loop(0, rows_here)
            def _(turn):
                row = first_row + turn * step
                numbers = [turn * pieces + piece for piece in range(pieces)]

                def read(number):
                    return ring[lax.rem(number, slots)]

                largest = None
                for number in numbers:
                    plgpu.barrier_wait(arrived.at[lax.rem(number, slots)])
                    x = read(number)
                    largest = x if largest is None else jnp.maximum(largest, x)
                top = jnp.max(largest)
                exponentials = (jnp.exp(read(number) - top) for number in numbers)
                log_partition = top + jnp.log(jnp.sum(sum(exponentials)))
                place = (row, lax.div(label[row], SIDE), lax.rem(label[row], SIDE))
                log_probability = logits[place] - log_partition
                nll[row] = -log_probability
                for piece, number in enumerate(numbers):
                    probability = jnp.exp(read(number) - log_partition)
                    gradient[row, part(piece)] = (probability * weight[row]).astype(dtype)
                    # A barrier: all threads have read the piece before the next one is copied over
                    # it, and written their gradient before that at the label replaces one.
                    plgpu.commit_smem()
                    fetch_if_any(number + slots)
                at_label = (jnp.exp(log_probability) - 1) * weight[row]
                gradient[place] = at_label.astype(dtype)

        pl.run_scoped(
            in_scope,
            plgpu.SMEM((slots, height, SIDE), jnp.float32),
            plgpu.Barrier(num_barriers=slots),
        )

    function = pl.kernel(
        softmax_gradient,
        mesh=plgpu.Mesh(grid=(hopper.num_shares(num_rows, LEAST_ROWS),), grid_names=("share",)),
        out_type=(
            jax.ShapeDtypeStruct((num_rows,), jnp.float32),
            jax.ShapeDtypeStruct((num_rows, pieces * height, SIDE), dtype),
        ),
        name="softmax_gradient",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    # Pallas' loops count in 32 bits and cannot be traced where JAX counts in 64.
    with jax.enable_x64(False):
        nll_c, gradient = function(logits_cV.reshape(num_rows, -1, SIDE), label_c, weight_c)
    return nll_c, gradient.reshape(logits_cV.shape)
