"""Starting `train.py` for a config that exists in memory only."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys

from disag_jax.config import Config
from disag_jax.errors import RunError

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
    """Runs a command to its end and returns its exit code; `options` are of subprocess.Popen.

    SIGTERM is passed on: it has the command end in order, and RunError follows.
    """
    started, stops = [], []

    def stop(*_):
        stops.append(True)
        for process in started:
            process.terminate()

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with subprocess.Popen(command, **options) as process:
            started.append(process)
            if stops:  # the signal came before there was a process to pass it on to
                process.terminate()
            code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
    if stops:
        raise RunError("stopped by SIGTERM")
    return code


def last_line(text: str) -> str:
    """The last line that says something, such as a command's error."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
