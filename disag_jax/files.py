"""Writing files that are never seen half written, refusing those that cannot be, and no output."""

import json
import os
import pathlib
import sys

from disag_jax.errors import ConfigError


def write_json(path: pathlib.Path, value: dict):
    """Replaces a file in one step: whenever the process ends, it is the old one or the new one."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def discard_output():
    """Has all that is still printed go nowhere; for when whoever read it is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_out(path: str):
    """ConfigError unless `write_out` could write to `--out`; for before anything is measured."""
    file = pathlib.Path(path).resolve()
    if not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
        raise ConfigError(
            f"--out = {path!r} must be in a directory that exists and can be written to"
        )
    if file.exists() and not file.is_file():
        raise ConfigError(f"--out = {path!r} must be a file")


def write_out(path: pathlib.Path, record: dict):
    """Writes what `--out` keeps, or a file beside it."""
    try:
        write_json(path, record)
    except OSError as error:
        raise ConfigError(f"--out = {str(path)!r} must be writable: {error.strerror}") from error
