"""What our Pallas kernels for Hopper GPUs share: blocks of outputs and how they are filled.

Two compute warpgroups share a block of 128 x 256 outputs; a third one loads the operands.

Source of the technique: the Hopper matmul and ragged-dot examples that ship with JAX
(jax.experimental.pallas.ops.gpu).
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from layers import target

ROWS = 128  # of one tile
SIDE = 128  # of the square that a warpgroup computes
DEPTH, STEPS = 64, 4  # inner width of a pipeline step, and steps loaded ahead
EPILOGUE = 64  # the output leaves in squares of this size
SQUARES = 2  # of a warpgroup that may be on their way out
STRIPE = 8  # blocks of columns that neighbours in time share, for the L2 cache
LOADER_REGISTERS = 40
TILE_ROWS = 8  # of the swizzled tiles in which a buffer lies in shared memory
# Shares that a processor's work is cut into at most. Where NCCL's kernel holds a processor for the
# length of a transfer, a share waits until another processor is free: with one share each a kernel
# takes up to twice its time. Eight lose a tenth, and alone nothing (benchmarks/README.md).
SHARES = 8


def ignore(*_, **__):
    """Stands for the body where only a pipeline's buffers are asked for."""


def pipeline(body, compute_context, *, steps, concurrent_steps, in_specs):
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        memory_registers=LOADER_REGISTERS,
        in_specs=in_specs,
        wg_axis="wg",
        num_compute_wgs=2,
        max_concurrent_steps=concurrent_steps,
        compute_context=compute_context,
    )


def spec(shape, index_map, transforms):
    return plgpu.BlockSpec(shape, index_map, transforms=transforms, memory_space=plgpu.SMEM)


def transforms(width: int, dtype):
    """Tiling and swizzle of a shared-memory buffer whose rows are cut into `width` elements."""
    swizzle = plgpu.find_swizzle(width * jnp.dtype(dtype).itemsize * 8)
    elements = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((TILE_ROWS, elements)), plgpu.SwizzleTransform(swizzle)


def staging(dtype):
    """Shared memory for output squares of each warpgroup."""
    shape = (2, SQUARES, EPILOGUE, EPILOGUE)
    return plgpu.SMEM(shape, dtype, transforms=transforms(EPILOGUE, dtype))


def squares(height: int = SIDE, width: int = SIDE):
    """Slices of the parts in which a warpgroup's result leaves."""
    return [
        (slice(r, r + EPILOGUE), slice(c, c + EPILOGUE))
        for r in range(0, height, EPILOGUE)
        for c in range(0, width, EPILOGUE)
    ]


def store(parts, staging, group):
    """Sends squares of a warpgroup's result out through its part of `staging`.

    parts: (values, where they go) of each.
    """
    for number, (values, place) in enumerate(parts):
        slot = staging.at[group, number % SQUARES]
        plgpu.wait_smem_to_gmem(SQUARES - 1, wait_read_only=True)
        slot[...] = values
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(slot, place)


def num_shares(pieces: int, least: int = 1) -> int:
    """Shares on all processors that a kernel's work is dealt in, of `least` pieces where it can."""
    processors = target.num_processors()
    return processors * max(1, min(SHARES, pl.cdiv(pieces, processors) // least))


def for_each_block(blocks, block, stripe: int):
    """Deals the blocks to the shares, so that neighbours in time share operands.

    Shares begin in their order; as many as there are processors run side by side.
    """
    num_blocks, processors = math.prod(blocks), target.num_processors()
    turns = pl.cdiv(num_blocks, lax.axis_size("share"))
    wave, place = (f(lax.axis_index("share"), processors) for f in (lax.div, lax.rem))
    first = wave * (turns * processors) + place
    left = lax.div(num_blocks - first + processors - 1, processors)

    @pl.loop(0, jnp.minimum(turns, left))
    def _(turn):
        block(*plgpu.planar_snake(first + turn * processors, blocks, 1, stripe))


def on_accumulators(finish, *shapes):
    """Runs a block's pipeline on accumulators of zeros, and `finish` on the results."""

    def compute_context(run_pipeline):
        def run(*accumulators):
            run_pipeline(accumulators)
            finish(*[acc[...] for acc in accumulators])

        pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32) for shape in shapes])

    return compute_context


def call(kernel, operands, out=None, *, blocks, in_place=None):
    """Runs the kernel on its operands, by three warpgroups for each share of its blocks.

    It writes a new array like `out`, or changes the array `in_place`, its last operand.
    blocks: as `for_each_block` takes them.
    """

    function = pl.kernel(
        kernel,
        mesh=plgpu.Mesh(
            grid=(num_shares(math.prod(blocks)),),
            grid_names=("share",),
            num_threads=3,
            thread_name="wg",
        ),
        out_type=() if out is None else out,
        name=kernel.__name__,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    # Pallas' loops count in 32 bits and cannot be traced where JAX counts in 64.
    with jax.enable_x64(False):
        if in_place is None:
            return function(*operands)
        # A kernel changes a Ref that it is given; around it the change is an array again.
        changed = jax.new_ref(in_place)
        function(*operands, changed)
        return jax.freeze(changed)
