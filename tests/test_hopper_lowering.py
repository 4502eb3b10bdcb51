"""The Hopper kernels lower for CUDA where there is no GPU; tests/test_gpu.py runs them."""

import types

import jax
import jax.numpy as jnp
import pytest

from layers import grouped_matmul_hopper, head, softmax_hopper, target

EXPERTS, ROWS, INNER, OUTER = 4, 1024, 256, 384


@pytest.fixture(autouse=True)
def made_for_an_h100():
    with target.made_for(types.SimpleNamespace(platform="gpu", core_count=132)):
        yield


def lowered_kernels(function, **shapes) -> int:
    """Kernels in the lowered program of a function of arrays of these (dtype, *shape)."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for dtype, *shape in shapes.values()]
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return program.as_text().count("@mosaic_gpu")


@pytest.mark.parametrize("transpose", [False, True])
def test_equal_products_of_rows_are_lowered_once(transpose):
    def two_products(x, y, weights, half_expert):
        return [
            grouped_matmul_hopper.rows_times_weights(
                (rows,),
                weights,
                jnp.array([1], jnp.int32),
                half_expert,
                num_experts=EXPERTS,
                transpose=transpose,
            )
            for rows in (x, y)
        ]

    inner = OUTER if transpose else INNER
    found = lowered_kernels(
        two_products,
        x=(jnp.bfloat16, ROWS, inner),
        y=(jnp.bfloat16, ROWS, inner),
        weights=(jnp.bfloat16, EXPERTS + 2, INNER, OUTER),
        half_expert=(jnp.int32, ROWS // 64),
    )
    assert found == 1


@pytest.mark.parametrize("outer", [OUTER, 192, 1408])
def test_a_pair_lowers_to_one_kernel_each_way(outer):
    """Also where a width is not whole blocks."""

    def forward_and_back(x, dy, weights, first, half_expert):
        places = (weights, first, half_expert)
        y = grouped_matmul_hopper.rows_times_pair(x, *places, num_experts=EXPERTS)
        dx = grouped_matmul_hopper.rows_times_weights(
            tuple(dy), *places, num_experts=EXPERTS, transpose=True
        )
        assert y.shape == dy.shape and dx.shape == x.shape
        return y, dx

    found = lowered_kernels(
        forward_and_back,
        x=(jnp.bfloat16, ROWS, INNER),
        dy=(jnp.bfloat16, 2, ROWS, outer),
        weights=(jnp.bfloat16, 2 * EXPERTS + 3, INNER, outer),
        first=(jnp.int32, 2),
        half_expert=(jnp.int32, ROWS // 64),
    )
    assert found == 2


def test_a_pair_lowers_to_one_kernel_that_writes_where_it_is_kept():
    def keep(words, first, x, weights, first_2, half_expert):
        return grouped_matmul_hopper.write_rows_times_pair(
            words, first, x, weights, first_2, half_expert, num_experts=EXPERTS
        )

    found = lowered_kernels(
        keep,
        words=(jnp.uint16, 5 * ROWS, OUTER),
        first=(jnp.int32,),
        x=(jnp.bfloat16, ROWS, INNER),
        weights=(jnp.bfloat16, 2 * EXPERTS, INNER, OUTER),
        first_2=(jnp.int32, 2),
        half_expert=(jnp.int32, ROWS // 64),
    )
    assert found == 1


@pytest.mark.parametrize(("inner", "outer"), [(INNER, OUTER), (OUTER, INNER)])
def test_weight_gradients_lower_in_both_orientations(inner, outer):
    """Once for both weights of a pair that are added, and once for both that are written."""

    def add_and_write(sums, x, dy, half_expert):
        written = []
        for which in range(2):
            sums = grouped_matmul_hopper.add_weight_gradient(
                sums, jnp.int32(which * EXPERTS), x, dy[which], half_expert, EXPERTS
            )
            product = (x, dy[which], half_expert, EXPERTS, jnp.dtype("bfloat16"))
            written.append(grouped_matmul_hopper.weight_gradient(*product))
        return sums, written

    found = lowered_kernels(
        add_and_write,
        sums=(jnp.float32, 2 * EXPERTS, inner, outer),
        x=(jnp.bfloat16, ROWS, inner),
        dy=(jnp.bfloat16, 2, ROWS, outer),
        half_expert=(jnp.int32, ROWS // 64),
    )
    assert found == 2


def loss_kernels(vocab_size: int, generation: str) -> int:
    """Kernels in the lowered gradients of a loss."""

    def loss(final_norm, weights, h, label, grads):
        params = head.HeadParams(final_norm, weights)
        grads = head.HeadParams(jnp.zeros((INNER,), jnp.float32), grads)
        return head.cross_entropy_and_grads(params, h, label, 1.0, grads, eps=1e-6, chunk=ROWS)

    made_for = types.SimpleNamespace(platform="gpu", core_count=132, compute_capability=generation)
    with target.made_for(made_for):
        return lowered_kernels(
            loss,
            final_norm=(jnp.bfloat16, INNER),
            weights=(jnp.bfloat16, vocab_size, INNER),
            h=(jnp.bfloat16, ROWS, INNER),
            label=(jnp.int32, ROWS),
            grads=(jnp.float32, vocab_size, INNER),
        )


def test_the_loss_is_one_kernel_where_a_row_fits_shared_memory():
    assert loss_kernels(32_000, "9.0") == 1
    assert loss_kernels(32_001, "9.0") == loss_kernels(256_000, "9.0") == 0
    assert loss_kernels(32_000, "8.0") == 0


def test_pieces_of_a_row_are_equal_and_fit_shared_memory():
    """As few as the width of a row allows, none larger than a thread's registers hold."""
    for vocab_size in (*range(128, 60_000, 128), 32_001, 50_257, 102_400, 151_936):
        cuts = [
            256 * n
            for n in range(1, 33)
            if vocab_size % (256 * n) == 0 and vocab_size <= min(8 * 256 * n, 53_248)
        ]
        assert softmax_hopper.piece_words(vocab_size) == max(cuts, default=None), vocab_size
