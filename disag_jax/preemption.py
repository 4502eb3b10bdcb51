"""Ending a run early but in order: on SIGTERM, or after a step named beforehand.

Schedulers send SIGTERM before they take a machine away. The run then ends the step under way, saves
and exits with code 0, so that `--resume` goes on with the very next step.
"""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Says after which step a run is to stop, the same one on all processes.

    Of several processes any one may get the signal: JAX's preemption service, which takes SIGTERM
    for itself, tells the others within a second and has all agree on a step that none has begun.
    """

    def __init__(self, stop_after: int | None = None):
        """stop_after: step after which to stop in any case."""
        self._stop_after = stop_after
        self._signalled = threading.Event()
        self._is_reached = False
        self._previous = None

    def __enter__(self) -> "StopRequest":
        # Python lets only the main thread handle signals.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._signalled.set())
        return self

    def __exit__(self, *_):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Whether to stop now that `step` is done; every process must ask after every step.

        Once it is True it stays so, for a caller that cannot stop yet.
        """
        # False where there is no service, which is in a single process.
        everyone_stops = multihost_utils.reached_preemption_sync_point(step)
        self._is_reached |= everyone_stops or self._signalled.is_set() or step == self._stop_after
        return self._is_reached
