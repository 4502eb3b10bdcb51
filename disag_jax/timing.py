"""Times of things that run on devices, with their noise."""

import dataclasses
import math
import statistics
import time

import jax

from disag_jax import processes

WARM_UP, REPEATS = 2, 5

# Iterations of a loop on the device of which a time is the difference: what is done once per call
# drops out. Where noise is a larger share of the difference than `NOISE`, there are more, up to
# `MOST` or as many as a call of so many milliseconds has.
FEW, MANY, MOST = 2, 10, 160
NOISE, LONGEST_CALL = 0.2, 500

# A GPU at the limit of its power lowers its clock within a second. It is busy for so many seconds
# before times under load are taken, each of so many seconds of calls.
LOAD_SECONDS, LOADED_CALLS_SECONDS = 2.0, 0.25


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured time.

    Attributes:
      name: what was timed.
      milliseconds: median of the repeats.
      noise: largest minus smallest repeat, over the median.
      floor_milliseconds: the least time that the device's measured rates allow; None if unknown.
      loaded_milliseconds: median once the device had been busy for a while; None if not timed.
      extra: further facts for the table, by column.
    """

    name: str
    milliseconds: float
    noise: float
    floor_milliseconds: float | None = None
    loaded_milliseconds: float | None = None
    extra: dict = dataclasses.field(default_factory=dict)

    @property
    def share_of_floor(self) -> float | None:
        if self.floor_milliseconds is None:
            return None
        return self.floor_milliseconds / self.milliseconds


def time_calls(
    name: str, call, *, calls: int = 5, wait=jax.block_until_ready, prepare=lambda: None, **fields
) -> Figure:
    """The time of `call()`: repeats of several calls queued in a row.

    wait: returns when what it is given, the result of the last call, is there.
    prepare: what is done before each repeat and not timed.
    """
    for _ in range(WARM_UP):
        wait(call())
    times = []
    for _ in range(REPEATS):
        prepare()
        times.append(_seconds_each(call, calls, wait))
    return figure_of(name, times, **fields)


def time_under_load(figure: Figure, call) -> Figure:
    """The figure of a call with its time at the clock at which a device can go on for ever."""
    calls = max(1, math.ceil(1e3 * LOADED_CALLS_SECONDS / figure.milliseconds))
    until = time.perf_counter() + LOAD_SECONDS
    while time.perf_counter() < until:
        _seconds_each(call, calls)
    loaded = figure_of(figure.name, [_seconds_each(call, calls) for _ in range(REPEATS)])
    return dataclasses.replace(figure, loaded_milliseconds=loaded.milliseconds)


def _seconds_each(call, calls: int, wait=jax.block_until_ready) -> float:
    """Seconds of one of several calls queued in a row."""
    began = time.perf_counter()
    for _ in range(calls):
        result = call()
    wait(result)
    return (time.perf_counter() - began) / calls


def time_iterations(name: str, call) -> Figure:
    """The time of one iteration of a loop on the device; `call(count)` runs `count` of them."""
    few, count = _time_loop(name, call, FEW), MANY
    while True:
        many = _time_loop(name, call, count)
        difference = many.milliseconds - few.milliseconds
        spread = few.noise * few.milliseconds + many.noise * many.milliseconds
        is_clear = spread <= NOISE * difference
        if is_clear or 4 * count > MOST or 4 * many.milliseconds > LONGEST_CALL:
            break
        count *= 4
    if difference <= 0:
        # Too short to be told from the noise of a call: what it takes at most.
        return dataclasses.replace(many, milliseconds=many.milliseconds / count)
    each = difference / (count - FEW)
    return dataclasses.replace(many, milliseconds=each, noise=spread / difference)


def _time_loop(name: str, call, count: int) -> Figure:
    return time_calls(name, lambda: call(count), calls=2)


def figure_of(name: str, times: list[float], **fields) -> Figure:
    """The figure of repeated times in seconds; of several processes', the slowest's."""
    times = processes.largest(times)
    median = statistics.median(times)
    return Figure(name, 1e3 * median, (max(times) - min(times)) / median, **fields)
