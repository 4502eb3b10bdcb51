"""Start-up of the JAX runtime: the one place that sets XLA flags and environment variables.

What a user has set in the environment stays, but for what a named network needs; each default can
be overridden there. JAX and XLA read all of it when the first device is asked for.
"""

import os
import shlex
import tempfile

import jaxlib.version

# Of GPUs. XLA ends a process that sets a flag it does not know: only flags of the version that is
# there.
GPU_FLAGS = {
    # Chosen by XLA on most GPUs, but not where a program has a collective it cannot estimate.
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    # Without a limit, the other GPUs of a process wait for ever for one that lacks memory. They
    # wait for other processes too where a program begins, and those may still be compiling.
    "--xla_gpu_nccl_termination_timeout_seconds": "600",
}
if jaxlib.version.__version_info__ >= (0, 11):
    # With it, the memory that the temporaries of a step leave serves every small buffer before the
    # free memory behind it does, and those of the next step find no place in one piece.
    GPU_FLAGS["--xla_gpu_enable_allocator_spatial_partitioning"] = "false"
# Percent of a GPU's processors that MPS gives a process.
MPS_PERCENT = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"  # of the hardware
GPU_ENVIRONMENT = {
    # JAX takes three quarters by default; nothing else runs on a training GPU.
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    # Loading a kernel while NCCL waits on another GPU can block both; roles load different ones.
    "CUDA_MODULE_LOADING": "EAGER",
    # With as many as CUDA takes by itself a step was seen to wait for all that another stream had
    # queued (docs/design.md). More than 32 there are not.
    QUEUES: "32",
}
# A slow network on one machine: NCCL through loopback sockets.
SOCKETS = {
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_IB_DISABLE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_NSOCKS_PERTHREAD": "4",
    "NCCL_SOCKET_NTHREADS": "4",
}
NETWORKS = {"default": {}, "sockets": SOCKETS}
# Of a named network NCCL says in its log what it uses (disag_jax/nccl_log.py).
NETWORK_LOG = {
    "NCCL_DEBUG": "INFO",
    "NCCL_DEBUG_FILE": os.path.join(tempfile.gettempdir(), "nccl.%h.%p.txt"),
}
NETWORK_HELP = "sockets makes NCCL use loopback sockets, a slow network, on one machine"
DETERMINISTIC_FLAGS = {"--xla_gpu_deterministic_ops": "true"}
# Each pipeline sets these for itself, where the environment does not.
COLLECTIVES_AT_ONCE = "xla_gpu_experimental_parallel_collective_overlap_limit"
PASSES_LEFT_OUT = "xla_disable_hlo_passes"


def start(cpu_devices: int, *, deterministic: bool = False, network: str = "default"):
    """Prepares this process for simulated CPU devices, or for accelerators where it is 0.

    deterministic: bitwise equal results of equal runs also on GPUs, at some cost; on the CPU they
      are so anyway.
    network: of `NETWORKS`.
    """
    os.environ.update(NETWORKS[network])
    if NETWORKS[network]:
        # With less of it the log would not say what is checked.
        os.environ["NCCL_DEBUG"] = NETWORK_LOG["NCCL_DEBUG"]
        os.environ.setdefault("NCCL_DEBUG_FILE", NETWORK_LOG["NCCL_DEBUG_FILE"])
    if cpu_devices:
        simulate_cpu_devices(cpu_devices)
        return
    for name, value in GPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _add_flags(GPU_FLAGS | (DETERMINISTIC_FLAGS if deterministic else {}), override=False)


def simulate_cpu_devices(num_devices: int):
    """Makes this process see `num_devices` CPU devices; call before the first use of JAX.

    CPU collectives block a thread of the client's pool each, and several programs are in flight at
    once: with the default pool of one thread per core they deadlock, hence PJRT_NPROC. A deadlock
    that happens all the same ends the process after a minute instead of hanging it.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    # A plugin for CUDA may be there to compile for GPUs that are not (mesh/absent.py).
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("PJRT_NPROC", str(max(32, 4 * num_devices)))
    flags = {
        "--xla_force_host_platform_device_count": str(num_devices),
        "--xla_cpu_collective_call_terminate_timeout_seconds": "60",
    }
    _add_flags(flags, override=True)


def _add_flags(flags: dict[str, str], override: bool):
    """Adds XLA flags; one that the user has set gives way only to `override`."""
    given = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.split("=")[0] for flag in given}
    kept = [flag for flag in given if not (override and flag.split("=")[0] in flags)]
    added = [f"{k}={v}" for k, v in flags.items() if override or k not in names]
    os.environ["XLA_FLAGS"] = " ".join(kept + added)


def visible_gpus() -> list[str]:
    """The GPUs that this process is shown, as the environment names them; [] says nothing."""
    return [gpu for gpu in os.environ.get(VISIBLE_GPUS, "").split(",") if gpu]


def gpu_share() -> float:
    """The share of its GPU's processors that this process has (disag_jax/parts.py)."""
    percent = os.environ.get(MPS_PERCENT) or "100"
    try:
        if not 0 < float(percent) <= 100:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{MPS_PERCENT} = {percent!r} must be a number over 0, and 100 at most"
        ) from None
    return float(percent) / 100


def is_on(flag: str) -> bool:
    """Whether the environment has a boolean flag of XLA on, as XLA reads it; absent is off.

    XLA takes `=true` and `=1` in any case and the bare flag, and the last one wins; it ends the
    process at other spellings.
    """
    values = _given(flag)
    return bool(values) and values[-1].lower() in ("", "true", "1")


def is_set(flag: str) -> bool:
    """Whether the environment sets a flag of XLA."""
    return bool(_given(flag))


def _given(flag: str) -> list[str]:
    """The values that the environment gives a flag of XLA, in order."""
    flags = (given.partition("=") for given in shlex.split(os.environ.get("XLA_FLAGS", "")))
    return [value for name, _, value in flags if name == flag]
