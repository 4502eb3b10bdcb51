"""Which worker or process is slow: in lock step all wait for it, and the step's time is the same.

So now and then each device runs a small piece of work by itself, and each process tells how long
its host takes in a step, for input and everything else that is no program.
"""

import collections
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from disag_jax.config import Config, Dtype
from mesh.placement import Meshes

# Of the square matrices that a device multiplies: some tens of microseconds on a GPU.
PROBE_SIZE = {"gpu": 2048}
DEFAULT_PROBE_SIZE = 256
# The best of some runs, as a busy host delays single ones.
PROBE_RUNS = 3
# Steps between two samples, at least: devices are idle while one is taken.
LEAST_STEPS = 10
# Samples in a row that make a worker slow: one alone may have met something else on its host.
SLOW_SAMPLES = 3
# Records that a median is taken of, and how many there must be.
REMEMBERED_RECORDS, ENOUGH_RECORDS = 100, 3


class Stragglers:
    """Compares the workers of a run with each other, and its steps with the time expected.

    Args:
      predicted_step_seconds: what a step should take; None takes the median of the run's own
        records so far.
    """

    def __init__(self, config: Config, meshes: Meshes, predicted_step_seconds: float | None = None):
        self._factor = config.run.straggler_factor
        self._meshes = meshes
        self._predicted = predicted_step_seconds
        self._slow_samples = collections.Counter()
        self._recent = collections.deque(maxlen=REMEMBERED_RECORDS)
        self._records_per_sample = -(-LEAST_STEPS // config.run.log_every)
        self._records = 0
        self._probes = _make_probes(config, meshes)

    def is_due(self) -> bool:
        """Whether to sample with this log record; every process must ask at every one."""
        self._records += 1
        return self._records % self._records_per_sample == 0

    def sample(self, record: dict) -> tuple[dict, list[str]]:
        """A log record (disag_jax/metrics.py) with more fields, and warnings in words.

        worker_milliseconds: of the probe on each worker, "replica0_stage1_expert2" or so.
        host_seconds_of: of each process, "process0" or so, its host's part of a step.
        expected_step_seconds: what `step_seconds` should have been, if there is something to go by.

        All processes must call it together, with nothing running on the devices.
        """
        host_seconds = record["input_wait_seconds"] + record["host_seconds"]
        milliseconds, hosts = self._gather(host_seconds)
        fields = {
            "worker_milliseconds": milliseconds,
            "host_seconds_of": {f"process{i}": host for i, host in enumerate(hosts)},
        }
        warnings = self._slow_workers(milliseconds)
        warnings += slow_hosts(hosts, record["step_seconds"], self._factor)
        expected = self._expected()
        if "compile_seconds" not in record:
            if expected is not None:
                fields["expected_step_seconds"] = expected
                warnings += self._slow_step(record["step_seconds"], expected)
            self._recent.append(record["step_seconds"])
        return record | fields, warnings

    def _expected(self) -> float | None:
        """The one place that says what a step should take, in seconds."""
        if self._predicted is not None:
            return self._predicted
        if len(self._recent) < ENOUGH_RECORDS:
            return None
        return statistics.median(self._recent)

    def _slow_workers(self, milliseconds: dict[str, float]) -> list[str]:
        usual = statistics.median(milliseconds.values())
        slow = {name for name, value in milliseconds.items() if value >= self._factor * usual}
        for name in milliseconds:
            self._slow_samples[name] = self._slow_samples[name] + 1 if name in slow else 0
        return [
            f"{name} is slow: it took {milliseconds[name]:.3g} ms for what takes the others "
            f"{usual:.3g} ms, {self._slow_samples[name]} times in a row"
            for name in sorted(slow)
            if self._slow_samples[name] % SLOW_SAMPLES == 0
        ]

    def _slow_step(self, seconds: float, expected: float) -> list[str]:
        if seconds <= self._factor * expected:
            return []
        return [f"a step took {seconds:.3g} s, {seconds / expected:.1f} times the {expected:.3g} s "
                "that were expected"]  # fmt: skip

    def _gather(self, host_seconds: float) -> tuple[dict[str, float], list[float]]:
        """The probes' times by worker, and every process's `host_seconds`."""
        devices = self._meshes.union.devices
        times = np.full(devices.shape, -1.0)
        for index, probe in self._probes.items():
            times[index] = probe()
        hosts = np.array([host_seconds])
        if jax.process_count() > 1:
            times, hosts = multihost_utils.process_allgather((times, hosts))
            times, hosts = times.max(axis=0), hosts.reshape(-1)
        placement = self._meshes.placement
        by_worker = {
            f"replica{replica}_{placement.name_of(worker)}": float(value)
            for (replica, worker), value in np.ndenumerate(times)
        }
        return by_worker, hosts.tolist()


def slow_hosts(hosts: list[float], step_seconds: float, factor: float) -> list[str]:
    """A warning for each process whose host makes steps `factor` times as long, or more."""
    warnings = []
    for process, seconds in enumerate(hosts):
        others = hosts[:process] + hosts[process + 1 :]
        if not others:
            continue
        usual = statistics.median(others)
        without = step_seconds - (seconds - usual)
        if seconds > usual and step_seconds >= factor * without:
            warnings.append(
                f"process {process} is slow: its host takes {seconds:.3g} s of a step of "
                f"{step_seconds:.3g} s, the others {usual:.3g} s"
            )
    return warnings


def _make_probes(config: Config, meshes: Meshes) -> dict:
    """By place in the union mesh, functions that time this process's devices, in milliseconds."""
    dtype = jnp.float32 if config.run.compute_dtype is Dtype.FLOAT64 else config.run.compute_dtype
    multiply = jax.jit(lambda matrix: matrix @ matrix)
    probes = {}
    for index, device in np.ndenumerate(meshes.union.devices):
        if device.process_index == jax.process_index():
            size = PROBE_SIZE.get(device.platform, DEFAULT_PROBE_SIZE)
            matrix = jax.device_put(np.zeros((size, size), jnp.dtype(dtype)), device)
            jax.block_until_ready(multiply(matrix))  # compiles
            probes[index] = lambda matrix=matrix: (
                1e3 * min(_seconds(multiply, matrix) for _ in range(PROBE_RUNS))
            )
    return probes


def _seconds(function, argument) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function(argument))
    return time.perf_counter() - began
