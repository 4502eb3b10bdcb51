"""Start-up of the JAX runtime."""

import os


def simulate_cpu_devices(num_devices: int):
    """Makes this process see `num_devices` CPU devices; call before the first use of JAX.

    CPU collectives block a thread of the client's pool each, and several programs are in flight at
    once: with the default pool of one thread per core they deadlock, hence PJRT_NPROC. A deadlock
    that happens all the same ends the process after a minute instead of hanging it.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("PJRT_NPROC", str(max(32, 4 * num_devices)))
    flags = {
        "--xla_force_host_platform_device_count": str(num_devices),
        "--xla_cpu_collective_call_terminate_timeout_seconds": "60",
    }
    kept = [f for f in os.environ.get("XLA_FLAGS", "").split() if f.split("=")[0] not in flags]
    os.environ["XLA_FLAGS"] = " ".join(kept + [f"{k}={v}" for k, v in flags.items()])
