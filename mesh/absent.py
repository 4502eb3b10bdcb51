"""GPUs that are not here: XLA's compiler for them runs on any machine with JAX's CUDA plugin.

It is told what it would otherwise ask the driver. Programs for them can be compiled, looked at and
counted, not run. Kernels are not tuned by trying them: options `UNTUNED`.
"""

import dataclasses
import importlib.util

from jax.experimental import topologies

# The version of CUDA that each is for.
CUDA_PLUGINS = {"jax_plugins.xla_cuda13": "13.0.0", "jax_plugins.xla_cuda12": "12.8.0"}

# For `compile(compiler_options=...)`: there is nothing to try kernels on, and of dense products
# only the library's have a choice that needs no trying.
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}

TARGET = """
gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {processors}
  fpus_per_core: {lanes}
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory_bytes}
  memory_bandwidth: {memory_bytes_per_second}
  l2_cache_size: {l2_bytes}
  shared_memory_per_core: {shared_bytes}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_bytes_of_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "{cuda}"
  runtime_version: "{cuda}"
  compile_time_toolkit_version: "{cuda}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks of a GPU (NVIDIA's datasheets and tuning guides of each chip)."""

    name: str
    processors: int
    clock_ghz: float
    memory_bytes: int
    memory_bytes_per_second: int
    l2_bytes: int = 50 << 20
    major: int = 9
    minor: int = 0
    lanes: int = 128
    # A block can have all of a processor's but 1 KiB.
    shared_bytes: int = 228 << 10

    def target(self, cuda: str) -> str:
        """The description in XLA's text form, for a version of CUDA such as "13.0.0"."""
        fields = dataclasses.asdict(self)
        return TARGET.format(**fields, cuda=cuda, shared_bytes_of_block=self.shared_bytes - 1024)


H100 = Gpu("NVIDIA H100 80GB HBM3", 132, 1.98, 84_942_979_072, 3_352_320_000_000)
KNOWN = {
    "h100": H100,
    "h800": dataclasses.replace(H100, name="NVIDIA H800"),
    "h200": dataclasses.replace(
        H100,
        name="NVIDIA H200",
        memory_bytes=150_755_000_000,
        memory_bytes_per_second=4_800_000_000_000,
    ),
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", 108, 1.41, 85_094_825_984, 2_039_000_000_000,
        l2_bytes=40 << 20, major=8, lanes=64, shared_bytes=164 << 10,
    ),
}  # fmt: skip


def gpu_of(hardware: str) -> Gpu | None:
    """The GPU of a hardware description's name, such as "h100" or "h100x2_nvlink"."""
    return next((gpu for name, gpu in KNOWN.items() if hardware.startswith(name)), None)


def devices(gpu: Gpu, count: int) -> list:
    """`count` such GPUs on one host, to build a mesh of; needs `cuda_plugin`."""
    topology = topologies.get_topology_desc(
        f"{count} {gpu.name}",
        "cuda",
        topology=f"1x1x{count}",
        target_config=gpu.target(CUDA_PLUGINS[cuda_plugin()]),
    )
    return topology.devices


def cuda_plugin() -> str | None:
    """The installed plugin of JAX for CUDA, if any."""
    if importlib.util.find_spec("jax_plugins") is None:
        return None
    return next((plugin for plugin in CUDA_PLUGINS if importlib.util.find_spec(plugin)), None)
