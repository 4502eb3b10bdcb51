"""Reads a trace of GPUs: how long each computed, communicated, and did nothing but communicate."""

import collections
import pathlib
import re
from typing import NamedTuple

import jax
import numpy as np

from disag_jax.errors import ConfigError

# Lines of a device's plane that hold what ran on it; others repeat it by operation or by module.
STREAM = re.compile(r"^Stream #")
COMMUNICATION = re.compile(r"nccl", re.IGNORECASE)


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


def device_times(directory) -> dict[str, DeviceTime]:
    """The times of each GPU in the traces under a directory; ConfigError if there are none."""
    spans = collections.defaultdict(lambda: ([], []))
    for path in sorted(pathlib.Path(directory).rglob("*.xplane.pb")):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if plane.name.startswith("/device:GPU"):
                for line in plane.lines:
                    if STREAM.match(line.name):
                        _sort_events(line.events, *spans[plane.name])
    if not spans:
        raise ConfigError(f"{directory} must hold the trace of a GPU")
    return {name: device_time(*parts) for name, parts in sorted(spans.items())}


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


def _sort_events(events, compute: list, communication: list):
    for event in events:
        span = (event.start_ns, event.start_ns + event.duration_ns)
        (communication if COMMUNICATION.search(event.name) else compute).append(span)


def _covered(spans) -> float:
    """Length of the union of spans."""
    total, end = 0.0, -np.inf
    for begin, stop in sorted(spans):
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total
