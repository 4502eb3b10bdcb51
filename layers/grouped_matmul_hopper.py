"""Grouped matrix products on Hopper GPUs, as Pallas Mosaic kernels.

Because every tile of rows belongs to one expert, the product of rows is the dense warp-specialised
kernel with an indexed weight operand, and the weight gradient is one dense product per expert whose
inner dim runs over the expert's half tiles. Weights are read, and their gradients summed, where
they lie among other rows: nothing is copied out. Measured in benchmarks/README.md.

`half_expert` has the expert of each half tile (grouped_matmul.ExpertOrder). Products of rows go by
whole tiles: two warpgroups that share half a tile are no faster (benchmarks/LOG.md).

Legend: P sorted rows, A inner width, B outer width, E experts, N matrices of a stack, S sources of
a sum.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from layers import hopper
from layers.hopper import DEPTH, EPILOGUE, ROWS, SIDE, SQUARES, STEPS, STRIPE, TILE_ROWS

COLUMNS = 2 * SIDE
# Of a weight gradient: what it is added to takes shared memory, and passes through the cache too.
GRADIENT_STEPS, GRADIENT_STRIPE = 3, 16
FETCH_STEP = 3  # when a block's first square of sums is fetched; as many steps between squares


# Lowering a kernel takes half a second of Python: inside jit it is done once for all equal calls
# of a program, of which a pipeline's has dozens.
@functools.partial(jax.jit, static_argnames=("num_experts", "transpose"))
def rows_times_weights(xs, stack, first_S, half_expert, *, num_experts: int, transpose: bool):
    """Each tile of 128 rows times its expert's weights, summed over the sources: [P, B].

    Unspecified in unused tiles. The sum is made in the accumulator: it costs no pass over memory.

    xs: rows [P, A] of each source, one or two.
    stack, first_S: expert e's weights for source s have the place first_S[s] + e. They are [A, B],
      or with `transpose` [B, A]. A must be a multiple of 64.
    """
    num_rows, inner = xs[0].shape
    outer = stack.shape[1] if transpose else stack.shape[2]
    assert num_rows % ROWS == 0 and inner % DEPTH == 0, (xs[0].shape, stack.shape)
    sources, no_places = range(len(xs)), (0,) * len(xs)
    blocks = (num_rows // ROWS, pl.cdiv(outer, COLUMNS))
    transforms = hopper.transforms(DEPTH, xs[0].dtype)

    def pipeline(body, compute_context, row_block=0, column_block=0, place_S=no_places):
        def weights(place):
            if transpose:
                shape, at = (COLUMNS, DEPTH), lambda k: (place, column_block, k)
            else:
                shape, at = (DEPTH, COLUMNS), lambda k: (place, k, column_block)
            return hopper.spec((None, *shape), at, transforms)

        rows = hopper.spec((ROWS, DEPTH), lambda k: (row_block, k), transforms)
        return hopper.pipeline(
            body,
            compute_context,
            steps=inner // DEPTH,
            # A step holds the operands of all sources.
            concurrent_steps=STEPS // len(xs),
            in_specs=[*(rows for _ in sources), *map(weights, place_S)],
        )

    def multiply_by_group(tile_expert, tile_place, *refs):
        xs, w, out = refs[: len(sources)], refs[-2], refs[-1]

        def in_scope(allocations, staging):
            group = lax.axis_index("wg")
            columns = pl.ds(group * SIDE, SIDE)

            def block(row_block, column_block):
                target = out.at[
                    pl.ds(row_block * ROWS, ROWS),
                    pl.ds(column_block * COLUMNS + group * SIDE, SIDE),
                ]

                def multiply(_, *tiles_and_accumulators):
                    *tiles, accumulators = tiles_and_accumulators
                    for s in sources:
                        x_tile, w_tile = tiles[s], tiles[len(sources) + s]
                        weights = (
                            w_tile.at[columns].transpose((1, 0))
                            if transpose
                            else w_tile.at[:, columns]
                        )
                        plgpu.wgmma(accumulators[0], x_tile, weights)
                    plgpu.wgmma_wait(0)
                    return accumulators

                def store(acc):
                    result = acc.astype(out.dtype)
                    parts = [(result[square], target.at[square]) for square in hopper.squares()]
                    hopper.store(parts, staging, group)

                @pl.when(tile_expert[row_block] < num_experts)
                def _():
                    context = hopper.on_accumulators(store, (SIDE, SIDE))
                    place_S = [tile_place[s, row_block] for s in sources]
                    pipeline(multiply, context, row_block, column_block, place_S)(
                        *xs, *(w for _ in sources), allocations=allocations
                    )

            hopper.for_each_block(blocks, block, STRIPE)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(
            in_scope,
            pipeline(hopper.ignore, hopper.ignore).get_allocations(*xs, *(w for _ in sources)),
            hopper.staging(out.dtype),
            collective_axes="wg",
        )

    out = jax.ShapeDtypeStruct((num_rows, outer), xs[0].dtype)
    tile_expert = half_expert[::2]
    operands = (tile_expert, first_S[:, None] + tile_expert, *xs, stack)
    return hopper.call(multiply_by_group, operands, out, blocks=blocks)


@functools.partial(jax.jit, static_argnames="num_experts")
def rows_times_pair(x_PA, stack, first_2, half_expert, *, num_experts: int):
    """Each tile of 128 rows times both weights of its expert: [2, P, B].

    As `rows_times_weights` of each, with the rows loaded once. A block is 128 x 128 outputs of
    both, so that a width of 128 n wastes nothing; a warpgroup computes 64 rows of it.
    """
    num_rows, outer = x_PA.shape[0], stack.shape[2]
    out = jax.ShapeDtypeStruct((2 * num_rows, outer), x_PA.dtype)
    kernel, operands, blocks = _rows_times_pair(0, x_PA, stack, first_2, half_expert, num_experts)
    return hopper.call(kernel, operands, out, blocks=blocks).reshape(2, num_rows, outer)


@functools.partial(jax.jit, static_argnames="num_experts")
def write_rows_times_pair(words_RB, first, x_PA, stack, first_2, half_expert, *, num_experts: int):
    """The buffer with `rows_times_pair`, by bits, in the 2 P rows from `first` on, in place.

    words: unsigned integers as wide as the products; first: a multiple of 8.
    """
    assert words_RB.shape[1] == stack.shape[2], (words_RB.shape, stack.shape)
    kernel, operands, blocks = _rows_times_pair(
        first, x_PA, stack, first_2, half_expert, num_experts
    )
    return hopper.call(kernel, operands, blocks=blocks, in_place=words_RB)


def _rows_times_pair(first, x_PA, stack, first_2, half_expert, num_experts: int):
    """(kernel, its operands, its blocks) for the rows from `first` on of its last argument."""
    num_rows, inner = x_PA.shape
    outer = stack.shape[2]
    assert num_rows % ROWS == 0 and inner % DEPTH == 0, (x_PA.shape, stack.shape)
    blocks = (num_rows // ROWS, pl.cdiv(outer, SIDE))
    transforms = hopper.transforms(DEPTH, x_PA.dtype)
    height = ROWS // 2  # of a warpgroup's part

    def pipeline(body, compute_context, row_block=0, column_block=0, place_2=(0, 0)):
        def weights(place):
            return hopper.spec((None, DEPTH, SIDE), lambda k: (place, k, column_block), transforms)

        return hopper.pipeline(
            body,
            compute_context,
            steps=inner // DEPTH,
            concurrent_steps=STEPS,
            in_specs=[
                hopper.spec((ROWS, DEPTH), lambda k: (row_block, k), transforms),
                *[weights(place) for place in place_2],
            ],
        )

    def multiply_by_pair(tile_expert, tile_place, first, x, w, out):
        def in_scope(allocations, staging):
            group = lax.axis_index("wg")

            def block(row_block, column_block):
                row = first[0] * TILE_ROWS + row_block * ROWS + group * height
                columns = pl.ds(column_block * SIDE, SIDE)

                def multiply(_, x_tile, one_tile, other_tile, accumulators):
                    x_part = x_tile.at[pl.ds(group * height, height)]
                    for acc, w_tile in zip(accumulators, (one_tile, other_tile), strict=True):
                        plgpu.wgmma(acc, x_part, w_tile)
                    plgpu.wgmma_wait(0)
                    return accumulators

                def store(*accumulators):
                    parts = []
                    for which, acc in enumerate(accumulators):
                        result = acc.astype(x.dtype)
                        if out.dtype != x.dtype:
                            result = lax.bitcast_convert_type(result, out.dtype)
                        target = out.at[pl.ds(which * num_rows + row, height), columns]
                        for square in hopper.squares(height, SIDE):
                            parts.append((result[square], target.at[square]))
                    hopper.store(parts, staging, group)

                @pl.when(tile_expert[row_block] < num_experts)
                def _():
                    context = hopper.on_accumulators(store, (height, SIDE), (height, SIDE))
                    place_2 = [tile_place[which, row_block] for which in range(2)]
                    pipeline(multiply, context, row_block, column_block, place_2)(
                        x, w, w, allocations=allocations
                    )

            hopper.for_each_block(blocks, block, STRIPE)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(
            in_scope,
            pipeline(hopper.ignore, hopper.ignore).get_allocations(x, w, w),
            hopper.staging(out.dtype),
            collective_axes="wg",
        )

    # A copy must be known to begin at a whole tile of shared memory.
    first_1 = jnp.asarray(first // TILE_ROWS, jnp.int32)[None]
    tile_expert = half_expert[::2]
    operands = (tile_expert, first_2[:, None] + tile_expert, first_1, x_PA, stack)
    return multiply_by_pair, operands, blocks


@functools.partial(jax.jit, static_argnames="num_experts")
def add_weight_gradient(sums_NAB, first, x_PA, dy_PB, half_expert, num_experts: int):
    """Adds the sum of x^T dy over each expert's half tiles to its matrix in `sums`, in place.

    sums: float32; expert e has the place first + e. Every sum is changed once, so the result does
    not depend on the order of the blocks.

    Reading and writing the sums takes as long as the product. Half of a block's are fetched under
    the product and stored; the copy engine adds the other half in the cache, which adds too slowly
    for all of them.
    """
    assert sums_NAB.shape[1:] == (x_PA.shape[1], dy_PB.shape[1]), (x_PA.shape, sums_NAB.shape)
    kernel, operands, blocks = _weight_gradient(
        first, x_PA, dy_PB, half_expert, num_experts, adds=True
    )
    return hopper.call(kernel, operands, blocks=blocks, in_place=sums_NAB)


@functools.partial(jax.jit, static_argnames=("num_experts", "dtype"))
def weight_gradient(x_PA, dy_PB, half_expert, num_experts: int, dtype):
    """The sum of x^T dy over each expert's half tiles as a new array: [E, A, B] of `dtype`."""
    out = jax.ShapeDtypeStruct((num_experts, x_PA.shape[1], dy_PB.shape[1]), dtype)
    kernel, operands, blocks = _weight_gradient(
        0, x_PA, dy_PB, half_expert, num_experts, adds=False
    )
    return hopper.call(kernel, operands, out, blocks=blocks)


def _weight_gradient(first, x_PA, dy_PB, half_expert, num_experts: int, *, adds: bool):
    """(kernel, its operands, its blocks) that adds to the matrices of its last argument.

    Without `adds` it overwrites them, with zeros for an expert without rows.
    """
    inner, outer = x_PA.shape[1], dy_PB.shape[1]
    height, width = _gradient_block(inner, outer)
    blocks_per_expert = pl.cdiv(inner, height)
    blocks = (num_experts * blocks_per_expert, pl.cdiv(outer, width))
    transforms = hopper.transforms(DEPTH, x_PA.dtype)
    assert 2 * DEPTH == ROWS, "a step is half a tile"
    steps_E = jnp.sum(half_expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    tiles_E = (steps_E + 1) // 2
    first_step_E = (2 * (jnp.cumsum(tiles_E) - tiles_E)).astype(jnp.int32)

    def pipeline(body, compute_context, steps=GRADIENT_STEPS, first=0, row_block=0, column_block=0):
        return hopper.pipeline(
            body,
            compute_context,
            steps=steps,
            concurrent_steps=GRADIENT_STEPS,
            in_specs=[
                hopper.spec((DEPTH, height), lambda k: (first + k, row_block), transforms),
                hopper.spec((DEPTH, width), lambda k: (first + k, column_block), transforms),
            ],
        )

    def weight_gradient(places, num_steps, first_steps, x, dy, gradients):
        def in_scope(allocations, staging, arrived):
            group = lax.axis_index("wg")
            # The warpgroups share the block's longer side.
            row = group * SIDE if height > SIDE else 0
            column = group * SIDE if width > SIDE else 0

            def block(expert_and_row, column_block):
                expert = lax.div(expert_and_row, jnp.int32(blocks_per_expert))
                row_block = lax.rem(expert_and_row, jnp.int32(blocks_per_expert))
                steps, first = num_steps[expert], first_steps[expert]
                target = gradients.at[
                    places[expert],
                    pl.ds(row_block * height + row, SIDE),
                    pl.ds(column_block * width + column, SIDE),
                ]
                fetched = list(enumerate(hopper.squares()[: SQUARES if adds else 0]))

                def multiply(step, x_tile, dy_tile, accumulators):
                    for number, square in fetched:

                        @pl.when(step[0] == jnp.minimum((1 + number) * FETCH_STEP, steps - 1))
                        def _(number=number, square=square):
                            if number == 0:
                                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            plgpu.copy_gmem_to_smem(
                                target.at[square], staging.at[group, number], arrived.at[group]
                            )

                    x_part = x_tile.at[:, pl.ds(row, SIDE)].transpose((1, 0))
                    plgpu.wgmma(accumulators[0], x_part, dy_tile.at[:, pl.ds(column, SIDE)])
                    plgpu.wgmma_wait(0)
                    return accumulators

                def add(acc):
                    plgpu.barrier_wait(arrived.at[group])
                    for number, square in enumerate(hopper.squares()):
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

                def store(acc):
                    result = acc.astype(gradients.dtype)
                    parts = [(result[square], target.at[square]) for square in hopper.squares()]
                    hopper.store(parts, staging, group)

                @pl.when(steps > 0)
                def _():
                    context = hopper.on_accumulators(add if adds else store, (SIDE, SIDE))
                    pipeline(multiply, context, steps, first, row_block, column_block)(
                        x, dy, allocations=allocations
                    )

                if not adds:
                    # The third warpgroup, which loads, has no part of the block.
                    @pl.when((steps == 0) & (group < 2))
                    def _():
                        none = jnp.zeros((EPILOGUE, EPILOGUE), gradients.dtype)
                        parts = [(none, target.at[square]) for square in hopper.squares()]
                        hopper.store(parts, staging, group)

            hopper.for_each_block(blocks, block, GRADIENT_STRIPE)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(
            in_scope,
            pipeline(hopper.ignore, hopper.ignore).get_allocations(x, dy),
            hopper.staging(gradients.dtype),
            plgpu.Barrier(num_arrivals=SQUARES, num_barriers=2),
            collective_axes="wg",
        )

    places_E = first + jnp.arange(num_experts, dtype=jnp.int32)
    operands = (places_E, steps_E, first_step_E, x_PA, dy_PB)
    return weight_gradient, operands, blocks


def _gradient_block(inner: int, outer: int) -> tuple[int, int]:
    """The longer side of a block lies where fewer blocks cover the matrix."""
    shapes = ((SIDE, 2 * SIDE), (2 * SIDE, SIDE))
    return min(shapes, key=lambda shape: pl.cdiv(inner, shape[0]) * pl.cdiv(outer, shape[1]))
