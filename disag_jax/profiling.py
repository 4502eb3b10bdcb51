"""Where the time of a step goes: seconds of its named parts, and traces of whole steps."""

import collections
import contextlib
import pathlib
import re
import time

import jax

from disag_jax.config import ConfigError
from disag_jax.state import TrainState


class Stopwatch:
    """Adds up the seconds that named parts of a step take on the host, waiting included.

    In a trace the parts are spans of the same names.
    """

    def __init__(self):
        self._seconds = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, part: str):
        began = time.perf_counter()
        with jax.profiler.TraceAnnotation(part):
            yield
        self._seconds[part] += time.perf_counter() - began

    @property
    def seconds(self) -> dict[str, float]:
        """The sums, as `<part>_seconds`."""
        return {f"{part}_seconds": seconds for part, seconds in self._seconds.items()}


def parse_steps(text: str | None, num_steps: int) -> range | None:
    """The steps that a `--profile_steps` of "begin:end" names, None for None.

    ConfigError if it names no step of a run of `num_steps`.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(*map(int, match.groups())) if match else range(0)
    if not steps or steps.start >= num_steps:
        raise ConfigError(
            f"--profile_steps = {text!r} must be begin:end with begin < end and begin < "
            f"run.num_steps = {num_steps}: 10:13 traces steps 10, 11 and 12, counted from 0"
        )
    return steps


class Profiler:
    """Traces some steps of a run into a directory that TensorBoard and Perfetto open.

    Each process traces its own devices. Of several processes each has its own directory: the files
    are named by their host alone. Tracing slows its steps down.
    """

    def __init__(self, directory: pathlib.Path, steps: range | None, then=None, say=print):
        """
        Args:
          then: called with the directory when a trace has been written into it.
          say: takes a sentence when one could not be written, which is no reason to lose a run.
        """
        several = jax.process_count() > 1
        self._directory = directory / f"process_{jax.process_index()}" if several else directory
        self._steps = steps or range(0)
        self._is_tracing, self._then, self._say = False, then, say

    def before_step(self, state: TrainState) -> bool:
        """Starts or ends the trace if `state.step` is the step to do so at; whether it did."""
        wanted = state.step in self._steps
        if wanted == self._is_tracing:
            return False
        # Whole steps: the update of the one before ends first.
        state.wait()
        if wanted:
            options = jax.profiler.ProfileOptions()
            # Every Python call would be a span, and they would drown the rest.
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._directory, profiler_options=options)
            self._is_tracing = True
        else:
            self.close()
        return True

    def close(self):
        """Ends a trace under way and writes it."""
        if not self._is_tracing:
            return
        self._is_tracing = False
        try:
            jax.profiler.stop_trace()
        except (OSError, jax.errors.JaxRuntimeError) as error:
            self._say(f"warning: the trace in {self._directory} is lost: {error}")
            return
        if self._then is not None:
            self._then(self._directory)
