"""GPUs that are not here, without JAX's CUDA plugin; with it see test_gpu_programs.py."""

import re
import types

import jax.numpy as jnp
import pytest

from layers import target
from layers.attention import AttentionKernel, default_kernel
from layers.grouped_matmul import tile_rows
from mesh import absent


def test_hardware_has_the_gpu_of_its_name():
    assert absent.gpu_of("h100") is absent.gpu_of("h100x2_nvlink") is absent.H100
    assert absent.gpu_of("h800").name == "NVIDIA H800"
    assert absent.gpu_of("tpu") is None


@pytest.mark.parametrize("name", absent.KNOWN)
def test_every_number_is_in_the_description(name):
    gpu = absent.KNOWN[name]
    text = gpu.target("13.0.0")
    found = dict(re.findall(r"(\w+): \"?([^\"\s]+)", text))
    assert int(found["core_count"]) == gpu.processors
    assert int(found["device_memory_size"]) == gpu.memory_bytes
    assert int(found["shared_memory_per_block_optin"]) == gpu.shared_bytes - 1024
    assert text.count("{") == text.count("}") and "{{" not in text


def test_kernels_are_chosen_for_the_device_that_programs_are_made_for():
    assert not target.is_gpu() and tile_rows() == 32
    device = types.SimpleNamespace(platform="gpu", core_count=132, compute_capability="9.0")
    with target.made_for(device):
        assert target.is_gpu() and tile_rows() == 128 and target.num_processors() == 132
        assert default_kernel(jnp.bfloat16) is AttentionKernel.CUDNN
    assert not target.is_gpu()
    assert default_kernel(jnp.bfloat16) is AttentionKernel.EINSUM
