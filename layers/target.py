"""The device that programs are made for: one here, or one that is not here.

Layers choose kernels and tile sizes by it, instead of asking JAX what this machine has.
"""

import contextlib

import jax

_absent = []


def device():
    """A device of the kind that programs are made for, as JAX describes it."""
    return _absent[-1] if _absent else jax.devices()[0]


def is_gpu() -> bool:
    """Whether programs are made for GPUs."""
    return device().platform == "gpu"


def is_hopper() -> bool:
    """Whether programs are made for GPUs of the generation that our kernels are written for."""
    return is_gpu() and device().compute_capability == "9.0"


def num_processors() -> int:
    """Streaming multiprocessors of the device."""
    return device().core_count


@contextlib.contextmanager
def made_for(absent):
    """Within it, programs are made for a device that is not here (`mesh/absent.py`).

    What was traced before is not traced again: use it in a process that makes nothing else.
    """
    _absent.append(absent)
    try:
        yield
    finally:
        _absent.pop()
