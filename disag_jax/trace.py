"""Reads a trace: how long each GPU computed and communicated, and when which operation ran."""

import collections
import pathlib
import re
from typing import NamedTuple

import jax
import numpy as np

from disag_jax.errors import ConfigError

# Lines of a device's plane that hold what ran on it; others repeat it by operation or by module.
STREAM = re.compile(r"^Stream #")
GPU = re.compile(r"^/device:GPU:(\d+)")
HOST = "/host:CPU"
# The name of the annotation around a step (disag_jax/training.py).
STEP = "step"
COMMUNICATION = re.compile(r"nccl", re.IGNORECASE)
# Of it, what permutes and all-to-alls are made of; sums and gathers have kernels of their own.
EXCHANGE = re.compile(r"nccl.*SendRecv", re.IGNORECASE)


class DeviceTime(NamedTuple):
    """Seconds of one device within a trace; parts that run at once count once.

    Attributes:
      span: from the first to the last activity.
      compute: with a kernel or copy that is not communication.
      communication: with a communication kernel, waiting for its partner included.
      exposed: with communication and no compute.
    """

    span: float
    compute: float
    communication: float
    exposed: float

    @property
    def idle(self) -> float:
        """With nothing at all."""
        return self.span - self.compute - self.exposed

    @property
    def hidden_share(self) -> float:
        """Share of the communication that ran under compute."""
        return 1 - self.exposed / self.communication if self.communication else 1.0


class Operation(NamedTuple):
    """One execution of an operation of a compiled program, in nanoseconds.

    A kernel of a CUDA graph has the graph's name: which operation it belongs to is not recorded.
    """

    program: str
    name: str
    begin: float
    end: float
    kernel: str = ""


class Operations(NamedTuple):
    """What a process's trace says of its compiled programs.

    Attributes:
      by_device: what ran on each device, by the device's number in its process.
      steps: when the host began each step, by its number; nanoseconds.
    """

    by_device: dict[int, list[Operation]]
    steps: dict[int, float]


def operations(directory) -> Operations:
    """The operations of the newest trace under a directory; ConfigError if there is none.

    XLA names each kernel's operation on GPUs, and on the CPU all that its threads execute.
    """
    paths = sorted(pathlib.Path(directory).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    if not paths:
        raise ConfigError(f"{directory} must hold a trace")
    planes = list(jax.profiler.ProfileData.from_file(str(paths[-1])).planes)
    gpus = {int(found.group(1)): plane for plane in planes if (found := GPU.match(plane.name))}
    by_device, steps = collections.defaultdict(list), {}
    for plane in planes:
        if plane.name == HOST:
            for line in plane.lines:
                for event in line.events:
                    if event.name == STEP:
                        steps[dict(event.stats)["step_num"]] = event.start_ns
                    elif not gpus:
                        stats = dict(event.stats)
                        _add_operation(by_device[stats.get("device_ordinal")], event, stats)
    for number, plane in gpus.items():
        for event in _events_of_gpu(plane):
            _add_operation(by_device[number], event, dict(event.stats))
    return Operations({int(n): ran for n, ran in by_device.items() if ran}, steps)


def _add_operation(ran: list[Operation], event, stats: dict):
    if "hlo_op" in stats and "hlo_module" in stats:
        end = event.start_ns + event.duration_ns
        ran.append(Operation(stats["hlo_module"], stats["hlo_op"], event.start_ns, end, event.name))


def _events_of_gpu(plane):
    """What ran on a GPU, each kernel and copy once."""
    for line in plane.lines:
        if STREAM.match(line.name):
            yield from line.events


def device_times(directory, counted=COMMUNICATION) -> dict[str, DeviceTime]:
    """The times of each GPU in the traces under a directory; ConfigError if there are none.

    counted: the communication that counts; `EXCHANGE` leaves out the rest.
    """
    spans = collections.defaultdict(lambda: ([], []))
    for device, kernel, begin, end in kernels(directory):
        if counted.search(kernel) or not COMMUNICATION.search(kernel):
            is_communication = counted.search(kernel) is not None
            spans[device][is_communication].append((begin, end))
    return {name: device_time(*parts) for name, parts in sorted(spans.items())}


def kernels(directory) -> list[tuple[str, str, float, float]]:
    """(device, kernel or copy, begin, end) in nanoseconds of all that ran on GPUs, in any order.

    Of all traces under a directory; ConfigError if there are none.
    """
    found = []
    for path in sorted(pathlib.Path(directory).rglob("*.xplane.pb")):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for event in _events_of_gpu(plane) if GPU.match(plane.name) else ():
                end = event.start_ns + event.duration_ns
                found.append((plane.name, event.name, event.start_ns, end))
    if not found:
        raise ConfigError(f"{directory} must hold the trace of a GPU")
    return found


def device_time(compute, communication) -> DeviceTime:
    """The times of spans [n, 2] of nanoseconds, (begin, end) each, in any order."""
    everything = [*compute, *communication]
    busy, computing = _covered(everything), _covered(compute)
    begins, ends = np.array(everything).T
    return DeviceTime(
        span=float(ends.max() - begins.min()) / 1e9,
        compute=computing / 1e9,
        communication=_covered(communication) / 1e9,
        exposed=(busy - computing) / 1e9,
    )


def _covered(spans) -> float:
    """Length of the union of spans."""
    total, end = 0.0, -np.inf
    for begin, stop in sorted(spans):
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total
