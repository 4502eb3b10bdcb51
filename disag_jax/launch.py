"""Starting commands, such as `train.py` for a config that exists in memory only."""

import dataclasses
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

from disag_jax.config import Config
from disag_jax.errors import RunError

POLL_SECONDS = 0.05

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


def run(command: list[str], **options) -> int:
    """Runs a command to its end, as `run_together`, and returns its exit code."""
    return run_together([(command, options)])[0]


def run_together(commands: list[tuple[list[str], dict]]) -> list[int]:
    """Runs (command, options of subprocess.Popen) side by side, and returns their exit codes.

    Where one fails the others are killed, and have the code of SIGKILL. SIGTERM is passed on: it
    has the commands end in order, and RunError follows.
    """
    started, stops = [], []

    def stop(*_):
        stops.append(True)
        for process in started:
            process.terminate()

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        for command, options in commands:
            started.append(subprocess.Popen(command, **options))
        if stops:  # the signal came before there were processes to pass it on to
            stop()
        while None in (codes := [process.poll() for process in started]):
            if any(codes) and not stops:
                break
            time.sleep(POLL_SECONDS)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
        signal.signal(signal.SIGTERM, previous)
    if stops:
        raise RunError("stopped by SIGTERM")
    return [process.returncode for process in started]


def free_port() -> int:
    """A port of this machine that nothing listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def last_line(text: str) -> str:
    """The last line that says something, such as a command's error."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
