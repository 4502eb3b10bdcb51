"""Ends this process, with a sentence that says why, when another of the run is lost or stuck.

A process that waits for a lost one waits for ever, inside a program that Python cannot interrupt.
So two threads watch. One exchanges signs of life: each process gives its own, process 0 reads them
all and gives a verdict, the others read that. It may hang with process 0; the other thread may not:
it ends this process on a verdict, when process 0 is silent, or when the main thread has not moved
for too long.
"""

import contextlib
import os
import sys
import threading
import time
import traceback

import jax

from disag_jax import processes, signs
from disag_jax.config import Config
from disag_jax.errors import RUN_ERROR, ConfigError, RunError
from disag_jax.last_words import LastWords
from disag_jax.signs import DONE, RUNNING, Sign

# Signs of life per timeout, and the longest time between two, in seconds.
SIGNS_PER_TIMEOUT, LONGEST_INTERVAL = 10, 5.0
# Signs of life from the end of a timeout until the slowest process has ended on the verdict.
SIGNS_UNTIL_ALL_END = 8
# Within this many seconds all processes fail that fail for the same reason.
GRACE = 4.0
SHOW_CURSOR = "\x1b[?25h"


class Watchdog:
    """Watches this process and the others while it is entered.

    A process is lost after `run.heartbeat_timeout_seconds` without a sign of life, stuck after
    `run.stall_timeout_seconds` at one place.
    """

    def __init__(self, config: Config):
        self._timeout = config.run.heartbeat_timeout_seconds
        self._stall_timeout = config.run.stall_timeout_seconds
        self._interval = min(LONGEST_INTERVAL, self._timeout / SIGNS_PER_TIMEOUT)
        self._me, self._several = jax.process_index(), jax.process_count() > 1
        self._status, self._place = RUNNING, "the start"
        self._checkpoint = "there is no checkpoint yet"
        self._verdict = ""
        self._others = {process: Sign() for process in range(jax.process_count())}
        self._failed_at = {}
        self._begin_anew()
        self._stopped = threading.Event()
        targets = [self._watch, self._exchange] if self._several else [self._watch]
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        self._last_words = None

    def __enter__(self) -> "Watchdog":
        if self._several:
            self._last_words = LastWords("")
            self.last_good(self._checkpoint)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, _, error: BaseException | None, trace):
        if self._several:
            self._leave(error)
            self._last_words.close()
        self._stopped.set()

    def at(self, place: str):
        """Takes note of where the main thread is now."""
        self._place, self._moved = place, time.monotonic()

    def last_good(self, sentence: str):
        """Takes note of where the run could go on from."""
        self._checkpoint = sentence
        if self._several:
            self._last_words.change(
                f"process {self._me} was ended by something else; {sentence}",
                address=processes.coordinator_address() if self._me else None,
                if_unreachable=f"{_lost(0)}; {sentence}",
            )

    def _begin_anew(self):
        """Forgets how long everything has taken so far."""
        now = time.monotonic()
        self._moved = now
        self._heard = dict.fromkeys(self._others, now)

    def _give_sign(self):
        signs.give(Sign(time.monotonic_ns(), self._status, self._place))

    def _watch(self):
        last = time.monotonic()
        while not self._stopped.wait(self._interval):
            now = time.monotonic()
            if now - last > self._timeout / 2:
                self._begin_anew()  # it was this process that was stopped
            elif self._status == RUNNING:
                if self._verdict:
                    self._end(self._verdict)
                # One that is done waits for the others without a sign.
                if self._me and self._is_silent(0, now) and self._others[0].status != DONE:
                    self._end(_lost(0))
                if now - self._moved > self._stall_timeout:
                    self._end(self._stalled())
            last = now

    def _exchange(self):
        while not self._stopped.wait(self._interval):
            # Where process 0 does not answer, `_watch` counts the seconds.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._give_sign()
                self._listen(signs.read_all() if self._me == 0 else {0: signs.read(0)})
                if self._me == 0 and not self._verdict:
                    verdict = self._judge()
                    if verdict:
                        signs.give_verdict(verdict)
                        # The others read it before the store ends with this process.
                        time.sleep(3 * self._interval)
                        self._verdict = verdict
                else:
                    self._verdict = signs.read_verdict()

    def _listen(self, found: dict[int, Sign]):
        for process, sign in found.items():
            if sign != self._others[process]:
                self._others[process], self._heard[process] = sign, time.monotonic()

    def _is_silent(self, process: int, now: float) -> bool:
        return now - self._heard[process] > self._timeout

    def _judge(self) -> str:
        """Which process is lost or has failed alone, in words; empty if none."""
        now = time.monotonic()
        for process, sign in self._others.items():
            if sign.status == RUNNING and self._is_silent(process, now):
                return _lost(process)
            if sign.has_failed and now - self._failed_at.setdefault(process, now) > GRACE:
                return f"process {process} failed: {sign.status}"
        return ""

    def _leave(self, error: BaseException | None):
        """Tells the others that this process goes; ends it here if it goes alone."""
        if _may_be_of_another(error):
            # A lost process breaks connections before it is known to be lost. Its name is worth
            # the wait, in which `_watch` ends this process.
            seconds = self._timeout + SIGNS_UNTIL_ALL_END * self._interval
            _print(
                f"process {self._me}: {processes.describe(error)} (for {seconds:.0f} s at most it "
                "looks whether another process is lost)"
            )
            self._stopped.wait(seconds)
        self._status = processes.describe(error) if error else DONE
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._give_sign()
            deadline = time.monotonic() + 2 * GRACE + 3 * self._interval
            while error and time.monotonic() < deadline:
                if all(sign.status != RUNNING for sign in signs.read_all().values()):
                    return
                time.sleep(0.2)
        if error:
            if not isinstance(error, ConfigError | RunError):
                traceback.print_exception(error)
            self._end(processes.describe(error))

    def _stalled(self) -> str:
        """What does not move, in words; process 0 knows of all."""
        places = {} if self._me else {process: s.place for process, s in self._others.items()}
        places[self._me] = self._place
        where = ", ".join(f"process {process} is at {place}" for process, place in places.items())
        return f"nothing has moved for run.stall_timeout_seconds = {self._stall_timeout}: {where}"

    def _end(self, sentence: str):
        """Ends this process at once: nothing that waits for another one is waited for."""
        cursor = SHOW_CURSOR if sys.stderr.isatty() else ""
        _print(f"{cursor}error: {sentence}; {self._checkpoint}")
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        if self._several:
            self._last_words.close()
        os._exit(RUN_ERROR)


def _may_be_of_another(error: BaseException | None) -> bool:
    """Whether a lost process may have caused an error: a program that failed with its connections.

    JAX raises a ValueError where the program ran while it was called.
    """
    is_of_jax = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    return is_of_jax and not isinstance(error, ConfigError)


def _print(sentence: str):
    # Where the disk with the log is full, the process ends all the same.
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


def _lost(process: int) -> str:
    return f"process {process} is lost: it was ended, or it is stopped"
