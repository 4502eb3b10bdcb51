"""Grouped matrix products on Hopper GPUs, as Pallas Mosaic kernels.

Because every tile of rows belongs to one expert, the product of rows is the dense warp-specialised
kernel with an indexed weight operand, and the weight gradient is one dense product per expert whose
inner dim runs over the expert's tiles. Two compute warpgroups share a block of 128 x 256 outputs; a
third one loads the operands. Weights are read, and their gradients summed, where they lie among
other rows: nothing is copied out. Measured in benchmarks/README.md.

Source of the technique: the Hopper matmul and ragged-dot examples that ship with JAX
(jax.experimental.pallas.ops.gpu).

Legend: P sorted rows, A inner width, B outer width, E experts, N matrices of a stack.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 128  # of one tile
SIDE = 128  # of the square that a warpgroup computes
COLUMNS = 2 * SIDE
DEPTH, STEPS = 64, 4  # inner width of a pipeline step, and steps loaded ahead
EPILOGUE = 64  # the output leaves in squares of this size
SQUARES = 2  # of a warpgroup that may be on their way out
STRIPE = 8  # blocks of columns that neighbours in time share, for the L2 cache
# Of a weight gradient: what it is added to takes shared memory, and passes through the cache too.
GRADIENT_STEPS, GRADIENT_STRIPE = 3, 16
FETCH_STEP = 3  # when a block's first square of sums is fetched; as many steps between squares
LOADER_REGISTERS = 40


# Lowering a kernel takes half a second of Python: inside jit it is done once for all equal calls
# of a program, of which a pipeline's has dozens.
@functools.partial(jax.jit, static_argnames=("num_experts", "transpose"))
def rows_times_weights(x_PA, stack, first, tile_expert, *, num_experts: int, transpose: bool):
    """Each tile of 128 rows times its expert's weights: [P, B], unspecified in unused tiles.

    stack, first, num_experts: of layers.grouped_matmul.GroupWeights of [A, B], or with `transpose`
      of [B, A]. A must be a multiple of 64.
    """
    num_rows, inner = x_PA.shape
    outer = stack.shape[1] if transpose else stack.shape[2]
    assert num_rows % ROWS == 0 and inner % DEPTH == 0, (x_PA.shape, stack.shape)
    blocks = (num_rows // ROWS, pl.cdiv(outer, COLUMNS))
    transforms = _transforms(DEPTH, x_PA.dtype)

    def pipeline(body, compute_context, row_block=0, column_block=0):
        weight_block = (COLUMNS, DEPTH) if transpose else (DEPTH, COLUMNS)
        return _pipeline(
            body,
            compute_context,
            steps=inner // DEPTH,
            concurrent_steps=STEPS,
            in_specs=[
                _spec((ROWS, DEPTH), lambda k: (row_block, k), transforms),
                _spec(
                    weight_block,
                    (lambda k: (column_block, k)) if transpose else (lambda k: (k, column_block)),
                    transforms,
                ),
            ],
        )

    def multiply_by_group(tile_expert, tile_place, x, w, out):
        def in_scope(allocations, staging):
            group = lax.axis_index("wg")
            columns = pl.ds(group * SIDE, SIDE)

            def block(row_block, column_block):
                expert = tile_expert[row_block]
                target = out.at[
                    pl.ds(row_block * ROWS, ROWS),
                    pl.ds(column_block * COLUMNS + group * SIDE, SIDE),
                ]

                def multiply(_, x_tile, w_tile, acc):
                    weights = (
                        w_tile.at[columns].transpose((1, 0)) if transpose else w_tile.at[:, columns]
                    )
                    plgpu.wgmma(acc, x_tile, weights)
                    plgpu.wgmma_wait(0)
                    return acc

                def store(acc):
                    result = acc.astype(out.dtype)
                    for number, square in enumerate(_squares()):
                        slot = staging.at[group, number % SQUARES]
                        plgpu.wait_smem_to_gmem(SQUARES - 1, wait_read_only=True)
                        slot[...] = result[square]
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(slot, target.at[square])

                @pl.when(expert < num_experts)
                def _():
                    context = functools.partial(_with_accumulator, store)
                    weights = w.at[tile_place[row_block]]
                    pipeline(multiply, context, row_block, column_block)(
                        x, weights, allocations=allocations
                    )

            _for_each_block(blocks, block, STRIPE)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(
            in_scope,
            pipeline(_ignore, _ignore).get_allocations(x, w.at[0]),
            _staging(out.dtype),
            collective_axes="wg",
        )

    out = jax.ShapeDtypeStruct((num_rows, outer), x_PA.dtype)
    return _call(multiply_by_group, (tile_expert, tile_expert + first, x_PA, stack), out)


@functools.partial(jax.jit, static_argnames="num_experts")
def add_weight_gradient(sums_NAB, first, x_PA, dy_PB, tile_expert, num_experts: int):
    """Adds the sum of x^T dy over each expert's tiles to its matrix in `sums`, in place.

    sums: float32; expert e has the place first + e. Every sum is changed once, so the result does
    not depend on the order of the blocks.

    Reading and writing the sums takes as long as the product. Half of a block's are fetched under
    the product and stored; the copy engine adds the other half in the cache, which adds too slowly
    for all of them.
    """
    inner, outer = x_PA.shape[1], dy_PB.shape[1]
    assert sums_NAB.shape[1:] == (inner, outer), (x_PA.shape, dy_PB.shape, sums_NAB.shape)
    height, width = _gradient_block(inner, outer)
    blocks_per_expert = pl.cdiv(inner, height)
    blocks = (num_experts * blocks_per_expert, pl.cdiv(outer, width))
    transforms = _transforms(DEPTH, x_PA.dtype)
    tiles_E = jnp.sum(tile_expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    first_E = (jnp.cumsum(tiles_E) - tiles_E).astype(jnp.int32)
    steps_per_tile = ROWS // DEPTH

    def pipeline(body, compute_context, steps=GRADIENT_STEPS, first=0, row_block=0, column_block=0):
        return _pipeline(
            body,
            compute_context,
            steps=steps,
            concurrent_steps=GRADIENT_STEPS,
            in_specs=[
                _spec((DEPTH, height), lambda k: (first + k, row_block), transforms),
                _spec((DEPTH, width), lambda k: (first + k, column_block), transforms),
            ],
        )

    def weight_gradient(places, tiles, firsts, x, dy, sums):
        def in_scope(allocations, staging, arrived):
            group = lax.axis_index("wg")
            # The warpgroups share the block's longer side.
            row = group * SIDE if height > SIDE else 0
            column = group * SIDE if width > SIDE else 0

            def block(expert_and_row, column_block):
                expert = lax.div(expert_and_row, jnp.int32(blocks_per_expert))
                row_block = lax.rem(expert_and_row, jnp.int32(blocks_per_expert))
                steps = tiles[expert] * steps_per_tile
                begin = firsts[expert] * steps_per_tile
                target = sums.at[
                    places[expert],
                    pl.ds(row_block * height + row, SIDE),
                    pl.ds(column_block * width + column, SIDE),
                ]
                fetched = list(enumerate(_squares()[:SQUARES]))

                def multiply(step, x_tile, dy_tile, acc):
                    for number, square in fetched:

                        @pl.when(step[0] == jnp.minimum((1 + number) * FETCH_STEP, steps - 1))
                        def _(number=number, square=square):
                            if number == 0:
                                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            plgpu.copy_gmem_to_smem(
                                target.at[square], staging.at[group, number], arrived.at[group]
                            )

                    x_part = x_tile.at[:, pl.ds(row, SIDE)].transpose((1, 0))
                    plgpu.wgmma(acc, x_part, dy_tile.at[:, pl.ds(column, SIDE)])
                    plgpu.wgmma_wait(0)
                    return acc

                def add(acc):
                    plgpu.barrier_wait(arrived.at[group])
                    for number, square in enumerate(_squares()):
                        slot = staging.at[group, number % SQUARES]
                        if number < SQUARES:
                            slot[...] = slot[...] + acc[square]
                        else:
                            plgpu.wait_smem_to_gmem(SQUARES - 1, wait_read_only=True)
                            slot[...] = acc[square]
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(
                            slot,
                            target.at[square],
                            reduction_op=None if number < SQUARES else "add",
                        )

                @pl.when(steps > 0)
                def _():
                    context = functools.partial(_with_accumulator, add)
                    pipeline(multiply, context, steps, begin, row_block, column_block)(
                        x, dy, allocations=allocations
                    )

            _for_each_block(blocks, block, GRADIENT_STRIPE)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(
            in_scope,
            pipeline(_ignore, _ignore).get_allocations(x, dy),
            _staging(sums.dtype),
            plgpu.Barrier(num_arrivals=SQUARES, num_barriers=2),
            collective_axes="wg",
        )

    places_E = first + jnp.arange(num_experts, dtype=jnp.int32)
    operands = (places_E, tiles_E, first_E, x_PA, dy_PB)
    return _call(weight_gradient, operands, in_place=sums_NAB)


def _gradient_block(inner: int, outer: int) -> tuple[int, int]:
    """The longer side of a block lies where fewer blocks cover the matrix."""
    shapes = ((SIDE, 2 * SIDE), (2 * SIDE, SIDE))
    return min(shapes, key=lambda shape: pl.cdiv(inner, shape[0]) * pl.cdiv(outer, shape[1]))


def _ignore(*_, **__):
    """Stands for the body where only a pipeline's buffers are asked for."""


def _pipeline(body, compute_context, *, steps, concurrent_steps, in_specs):
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


def _spec(shape, index_map, transforms):
    return plgpu.BlockSpec(shape, index_map, transforms=transforms, memory_space=plgpu.SMEM)


def _transforms(width: int, dtype):
    """Tiling and swizzle of a shared-memory buffer whose rows are cut into `width` elements."""
    swizzle = plgpu.find_swizzle(width * jnp.dtype(dtype).itemsize * 8)
    elements = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(swizzle)


def _staging(dtype):
    """Shared memory for output squares of each warpgroup."""
    shape = (2, SQUARES, EPILOGUE, EPILOGUE)
    return plgpu.SMEM(shape, dtype, transforms=_transforms(EPILOGUE, dtype))


def _squares():
    """Slices of the parts in which a warpgroup's result leaves."""
    starts = range(0, SIDE, EPILOGUE)
    return [(slice(r, r + EPILOGUE), slice(c, c + EPILOGUE)) for r in starts for c in starts]


def _for_each_block(blocks, block, stripe: int):
    """Deals the blocks to the processors, neighbours in time sharing operands."""

    @plgpu.nd_loop((blocks[0] * blocks[1],), collective_axes="sm")
    def _(loop):
        block(*plgpu.planar_snake(loop.index[0], blocks, 1, stripe))


def _with_accumulator(finish, run_pipeline):
    """Runs a block's pipeline on an accumulator of zeros, and `finish` on the result."""

    def run(acc):
        run_pipeline(acc)
        finish(acc[...])

    pl.run_scoped(run, plgpu.ACC((SIDE, SIDE), jnp.float32))


def num_processors() -> int:
    """Streaming multiprocessors of the GPU: blocks in flight."""
    return jax.devices()[0].core_count


def _call(kernel, operands, out=None, *, in_place=None):
    """Runs the kernel on its operands, by three warpgroups on every processor.

    It writes a new array like `out`, or changes the array `in_place`, its last operand.
    """

    function = pl.kernel(
        kernel,
        mesh=plgpu.Mesh(
            grid=(num_processors(),), grid_names=("sm",), num_threads=3, thread_name="wg"
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
