"""Starting `train.py` for a config that exists in memory only."""

import dataclasses
import json
import pathlib
import sys

from disag_jax.config import Config

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


def last_line(text: str) -> str:
    """The last line that says something, such as a command's error."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
