"""Starting commands, such as `train.py` for a config that exists in memory only."""

import contextlib
import dataclasses
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

from disag_jax.config import Config
from disag_jax.errors import RunError

POLL_SECONDS = 0.05
# As our commands and Python's tracebacks name it.
ERROR = re.compile(r"error: |[\w.]*(Error|Exception)\b")
# Ctrl-C reaches the commands too; so long they have to end by themselves.
INTERRUPT_SECONDS = 5

STOPS = (signal.SIGTERM, signal.SIGHUP)

TRAIN = pathlib.Path(__file__).parent.parent / "train.py"

# A config file that holds what is beside it, with whatever was overridden.
CONFIG_FILE = """\
import json
import pathlib

from disag_jax.workdir import config_from_dict


def get_config():
    return config_from_dict(json.loads(pathlib.Path(__file__).with_suffix(".json").read_text()))
"""


def train_command(config: Config, workdir: pathlib.Path, *flags: str) -> list[str]:
    """The command that trains a config in a directory; its config file is written beside that."""
    config_file = workdir.with_suffix(".py")
    config_file.write_text(CONFIG_FILE)
    workdir.with_suffix(".json").write_text(json.dumps(dataclasses.asdict(config)))
    command = [sys.executable, str(TRAIN), f"--config={config_file}", f"--workdir={workdir}"]
    return [*command, *flags]


class Stopped(RunError):
    """A signal to stop, which commands were told; `codes` are their exit codes, if any ran."""

    def __init__(self, signum: int, codes: list[int] | None = None):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.codes = codes


@contextlib.contextmanager
def on_stop(handler):
    """Within it SIGTERM and SIGHUP call `handler(signum, frame)`; under nohup SIGHUP does not."""
    signals = [s for s in STOPS if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {s: signal.signal(s, handler) for s in signals}
    try:
        yield
    finally:
        for signum, of_before in previous.items():
            signal.signal(signum, of_before)


def run(command: list[str], **options) -> int:
    """Runs a command to its end, as `run_together`, and returns its exit code."""
    return run_together([(command, options)])[0]


def run_together(commands: list[tuple[list[str], dict]]) -> list[int]:
    """Runs (command, options of subprocess.Popen) side by side, and returns their exit codes.

    Where one fails the others are killed, and have the code of SIGKILL. SIGTERM or SIGHUP has the
    commands get SIGTERM, to end in order, and `Stopped` follows.
    """
    started, stops = [], []

    def stop(signum, _):
        stops.append(signum)
        for process in started:
            process.terminate()

    def codes() -> list[int | None]:
        return [process.poll() for process in started]

    with on_stop(stop):
        try:
            for command, options in commands:
                started.append(subprocess.Popen(command, **options))
            if stops:  # the signal came before there were processes to pass it on to
                stop(stops[0], None)
            while None in codes() and (stops or not any(codes())):
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            deadline = time.monotonic() + INTERRUPT_SECONDS
            while None in codes() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            raise
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                process.wait()
    if stops:
        raise Stopped(stops[0], codes())
    return codes()


def free_port() -> int:
    """A port of this machine that nothing listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def last_line(text: str) -> str:
    """The last line that names an error, or else says something.

    What libraries say of a process that dies, such as its threads, comes behind its error.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.match(line)]
    return (errors or lines or ["no message"])[-1]
