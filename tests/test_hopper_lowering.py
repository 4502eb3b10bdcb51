"""The Hopper kernels lower for CUDA where there is no GPU; tests/test_gpu.py runs them."""

import jax
import jax.numpy as jnp
import pytest

from layers import grouped_matmul_hopper

EXPERTS, ROWS, INNER, OUTER = 4, 1024, 256, 384


@pytest.fixture(autouse=True)
def processors_of_an_h100(monkeypatch):
    monkeypatch.setattr(grouped_matmul_hopper, "num_processors", lambda: 132)


def lowered_kernels(function, **shapes) -> int:
    """Kernels in the lowered program of a function of arrays of these (dtype, *shape)."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for dtype, *shape in shapes.values()]
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return program.as_text().count("@mosaic_gpu")


@pytest.mark.parametrize("transpose", [False, True])
def test_equal_products_of_rows_are_lowered_once(transpose):
    def two_products(x, y, weights, tile_expert):
        return [
            grouped_matmul_hopper.rows_times_weights(
                rows, weights, jnp.int32(1), tile_expert, num_experts=EXPERTS, transpose=transpose
            )
            for rows in (x, y)
        ]

    inner = OUTER if transpose else INNER
    found = lowered_kernels(
        two_products,
        x=(jnp.bfloat16, ROWS, inner),
        y=(jnp.bfloat16, ROWS, inner),
        weights=(jnp.bfloat16, EXPERTS + 2, INNER, OUTER),
        tile_expert=(jnp.int32, ROWS // 128),
    )
    assert found == 1


@pytest.mark.parametrize(("inner", "outer"), [(INNER, OUTER), (OUTER, INNER)])
def test_weight_gradients_lower_in_both_orientations(inner, outer):
    def add(sums, x, dy, tile_expert):
        return grouped_matmul_hopper.add_weight_gradient(
            sums, jnp.int32(0), x, dy, tile_expert, EXPERTS
        )

    found = lowered_kernels(
        add,
        sums=(jnp.float32, EXPERTS, inner, outer),
        x=(jnp.bfloat16, ROWS, inner),
        dy=(jnp.bfloat16, ROWS, outer),
        tile_expert=(jnp.int32, ROWS // 128),
    )
    assert found == 1
