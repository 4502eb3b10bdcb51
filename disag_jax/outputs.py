"""Where the results of a run go, and what happens when they cannot go there.

A disk that is full or away costs records and checkpoints, not the run: it trains on and says so,
until several checkpoints in a row have failed.
"""

import contextlib
import dataclasses
import time

from disag_jax import processes
from disag_jax.checkpoint import Checkpoints, SaveFailedError
from disag_jax.config import Config
from disag_jax.display import Display
from disag_jax.errors import RunError
from disag_jax.metrics_log import MetricsLog
from disag_jax.profiling import Profiler
from disag_jax.state import TrainState
from disag_jax.watchdog import Watchdog


class Outputs:
    """Display, log and checkpoints of a run; all processes must call every method together."""

    def __init__(
        self,
        config: Config,
        display: Display,
        log: MetricsLog,
        checkpoints: Checkpoints,
        watchdog: Watchdog,
        profiler: Profiler,
    ):
        self.display, self.profiler = display, profiler
        self._config, self._log, self._checkpoints = config, log, checkpoints
        self._watchdog = watchdog
        watchdog.last_good(checkpoints.describe_last_good())
        self._failed = 0
        for sentence in checkpoints.damage:
            display.say(f"warning: {sentence}; it is passed over")

    def write(self, record: dict):
        """Writes a record to the log; what cannot be written is lost and said."""
        try:
            self._log.write(record)
        except OSError as error:
            self.display.say(f"warning: the record of step {record['step']} is lost: {error}")

    def record(self, record: dict, warnings: list[str]):
        """Writes and shows what the steps since the last record did."""
        self.write(record)
        self.display.record(record)
        for warning in warnings:
            self.display.say(f"warning: step {record['step']}: {warning}")

    def save(self, state: TrainState, buckets: dict):
        """Begins a checkpoint and logs `checkpoint_seconds`, how long that kept the loop waiting.

        buckets: memory of the stepper's chooser (disag_jax/step.py).

        A failure of this one or of the one before is said; RunError after
        `run.max_failed_checkpoints` in a row.
        """
        began = time.perf_counter()
        self._watchdog.at(f"the checkpoint of step {state.step}")
        self._settle(self._checkpoints.wait, state.step)
        extra = {"config": dataclasses.asdict(self._config), "buckets": buckets}
        self._settle(lambda: self._checkpoints.save(state, extra), state.step)
        self.write({"step": state.step, "checkpoint_seconds": time.perf_counter() - began})

    def settle(self, step: int):
        """Says how a checkpoint under way has ended, if all processes have ended theirs."""
        if self._checkpoints.is_pending and not processes.any_of(self._checkpoints.is_saving):
            self._settle(self._checkpoints.wait, step)

    def finish(self, step: int):
        """Waits for the last checkpoint; RunError if it could not be saved."""
        self._settle(self._checkpoints.wait, step)
        if self._failed:
            last_good = self._checkpoints.describe_last_good()
            raise RunError(f"the last checkpoint could not be saved; {last_good}")

    def close(self):
        """Ends what is open, after an error too; other processes need not call it."""
        self.profiler.close()
        self._checkpoints.close()
        # A record that a full disk did not take has been said.
        with contextlib.suppress(OSError):
            self._log.close()
        self.display.close()

    def _settle(self, action, step: int):
        good = self._checkpoints.last_good
        try:
            action()
        except SaveFailedError as error:
            self._failed += 1
            self.display.say(f"warning: {error}; training goes on")
            self.write({"step": step, "failed_checkpoints": self._failed})
        if self._checkpoints.last_good != good:
            self._failed = 0
            self._watchdog.last_good(self._checkpoints.describe_last_good())
        if self._failed == self._config.run.max_failed_checkpoints:
            raise RunError(
                f"run.max_failed_checkpoints = {self._failed} in a row could not be saved; "
                f"{self._checkpoints.describe_last_good()}"
            )
