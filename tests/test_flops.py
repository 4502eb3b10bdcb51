"""Model FLOPs against a count by hand and against the products that the layers really do."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import subjaxprs

from disag_jax import facts, flops
from disag_jax.config import Dtype, SplitConfig
from disag_jax.model import AttentionLayer
from mesh import runtime
from tests import support

CONFIG = support.small_config(SplitConfig())


def with_run(**fields):
    return dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, **fields))


def test_count_by_hand():
    # D 16, 4 heads and 2 key/value heads of width 6, S 8, 6 experts, 2 choices of width 12, 2
    # layers, V 43.
    query = out = 2 * 16 * 24
    key = value = 2 * 16 * 12
    seen = (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8) / 8
    scores = mixed = 2 * seen * 24
    router = 2 * 16 * 6
    expert = 3 * (2 * 16 * 12)
    count = flops.model_flops(CONFIG)
    assert count.attention == 3 * 2 * (query + key + value + scores + mixed + out + router)
    assert count.expert == 3 * 2 * 2 * expert
    assert count.head == 3 * 2 * 16 * 43
    assert count.total == count.attention + count.expert + count.head


def test_shared_experts_count_like_chosen_ones():
    model = dataclasses.replace(CONFIG.model, num_shared_experts=3)
    count = flops.model_flops(dataclasses.replace(CONFIG, model=model))
    assert count.expert == flops.model_flops(CONFIG).expert * (2 + 3) / 2


def test_attention_count_is_what_the_layer_does():
    """Against the products in the traced layer, which computes masked scores too."""
    model, tokens = CONFIG.model, CONFIG.batch.sequence_length

    def forward(x_BSD):
        layer = AttentionLayer(model, jnp.float32, nnx.Rngs(0))
        return layer.attention(x_BSD), layer.router(x_BSD[0], layer.post_norm)

    traced = jax.make_jaxpr(forward)(jnp.zeros((1, tokens, model.d_model), jnp.float32))
    masked = 4 * model.num_heads * model.head_dim * sum(tokens - 1 - s for s in range(tokens))
    per_layer = flops.model_flops(CONFIG).attention / 3 / model.num_layers
    assert product_flops(traced.jaxpr) - masked == per_layer * tokens


def product_flops(jaxpr) -> int:
    """FLOPs of all matrix products in a jaxpr."""
    total = sum(product_flops(inner) for inner in subjaxprs(jaxpr))
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, (out,) = equation.invars[0].aval.shape, equation.outvars
            total += 2 * math.prod(out.aval.shape) * math.prod(left[dim] for dim in contracted)
    return total


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H800", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GB200", 2500),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_peak_by_device_kind(kind, tflops):
    expected = None if tflops is None else tflops * 1e12
    assert flops.peak_flops(with_run(compute_dtype=Dtype.BFLOAT16), kind) == expected


def test_a_stated_peak_goes_first_and_the_table_is_for_bfloat16():
    assert flops.peak_flops(with_run(peak_tflops_per_device=0.5), "cpu") == 0.5e12
    assert flops.peak_flops(with_run(compute_dtype=Dtype.FLOAT32), "NVIDIA H100 80GB HBM3") is None


def test_a_part_of_a_gpu_has_its_share_of_the_peak_and_says_so(monkeypatch):
    bfloat16, kind = with_run(compute_dtype=Dtype.BFLOAT16), "NVIDIA H200"
    whole = flops.peak_flops(bfloat16, kind)
    monkeypatch.setenv(runtime.MPS_PERCENT, "25")
    assert flops.peak_flops(bfloat16, kind) == whole / 4
    assert flops.peak_flops(bfloat16, "cpu") is None
    assert facts.devices() == f"{len(jax.devices())} x 25% of cpu"


@pytest.mark.parametrize("percent", ["0", "101", "half", "nan"])
def test_a_share_that_cannot_be_is_refused(monkeypatch, percent):
    monkeypatch.setenv(runtime.MPS_PERCENT, percent)
    with pytest.raises(ValueError, match=f"{runtime.MPS_PERCENT} = '{percent}' must be a number"):
        runtime.gpu_share()
    monkeypatch.setenv(runtime.MPS_PERCENT, "")
    assert runtime.gpu_share() == 1
