"""XLA flags and environment variables: defaults that whatever the user has set outlives."""

import os
import subprocess
import sys

import pytest

from mesh import runtime


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The variables that the module changes, restored after the test."""
    for name in ("XLA_FLAGS", "JAX_PLATFORMS", "PJRT_NPROC", *runtime.GPU_ENVIRONMENT,
                 *runtime.SOCKETS):  # fmt: skip
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def flags(environment_now):
    return dict(flag.split("=", 1) for flag in environment_now["XLA_FLAGS"].split())


def test_accelerators_get_defaults():
    runtime.start(0)
    assert flags(os.environ) == runtime.GPU_FLAGS
    assert {name: os.environ[name] for name in runtime.GPU_ENVIRONMENT} == runtime.GPU_ENVIRONMENT
    assert "JAX_PLATFORMS" not in os.environ and "NCCL_P2P_DISABLE" not in os.environ


def test_what_the_user_has_set_stays(environment):
    name = next(iter(runtime.GPU_FLAGS))
    environment.setenv("XLA_FLAGS", f"{name}=false --xla_other=1")
    environment.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    runtime.start(0, deterministic=True, network="sockets")
    given = {name: "false", "--xla_other": "1"}
    assert flags(os.environ) == runtime.GPU_FLAGS | runtime.DETERMINISTIC_FLAGS | given
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "lo"


def test_simulated_devices_are_as_many_as_asked_for(environment):
    environment.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3 --xla_other=1")
    runtime.start(6)
    found = flags(os.environ)
    assert found["--xla_force_host_platform_device_count"] == "6" and found["--xla_other"] == "1"
    assert os.environ["JAX_PLATFORMS"] == "cpu" and int(os.environ["PJRT_NPROC"]) >= 32


# Another boolean of the same parser, off by default, which XLA lets us look at.
SEEN = "--xla_cpu_enable_fast_math"
XLA_READS = """\
from jaxlib import xla_client
options = xla_client.CompileOptions().executable_build_options.debug_options
print(options.xla_cpu_enable_fast_math)
"""


@pytest.mark.parametrize(
    "given, on",
    [
        ("", False),
        ("{}=true", True),
        ("{}=True", True),
        ("{}=1", True),
        ("{}", True),
        ("{}='TRUE'", True),
        ("{}=false", False),
        ("{}=0", False),
        ("{}=true --xla_gpu_autotune_level=1 {}=false", False),
        ("{}=0  {}", True),
    ],
)
def test_boolean_flags_are_read_as_xla_reads_them(environment, given, on):
    environment.setenv("XLA_FLAGS", given.format(SEEN, SEEN))
    assert runtime.is_on(SEEN) is on
    assert runtime.is_set(SEEN) is (SEEN in given.format(SEEN, SEEN).replace("=", " ").split())
    assert not runtime.is_on("--xla_cpu_enable_fast") and not runtime.is_on("--xla")
    ours = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", XLA_READS], env=ours, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(on)


@pytest.mark.parametrize(
    "given, expected", [("", "False"), ("=1", "True"), ("=True", "True"), ("=false", "False")]
)
def test_attention_is_deterministic_where_xla_is(environment, given, expected):
    environment.setenv("XLA_FLAGS", given and f"--xla_gpu_deterministic_ops{given}")
    program = (
        "from layers import cudnn_attention as ours\n"
        "make = ours.cudnn.create_dot_product_attention_backend_config_base\n"
        "print(hasattr(make, '__wrapped__'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected
