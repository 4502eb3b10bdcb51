"""The directory that a run writes to."""

import dataclasses
import json
import pathlib

from disag_jax.config import Config, ConfigError


class Workdir:
    """A run's directory and what lies in it."""

    def __init__(self, path: str):
        self.path = pathlib.Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"

    def open(self, config: Config, *, resume: bool):
        """Creates or reopens the directory.

        A new run wants a directory without another run in it; a resumed one wants the directory of
        the same experiment. ConfigError otherwise, or if it cannot be written.
        """
        path, used = str(self.path), self.config.exists()
        if used and not resume:
            raise ConfigError(
                f"workdir = {path!r} must be new: it holds another run (--resume goes on with it)"
            )
        if resume and not used:
            raise ConfigError(f"workdir = {path!r} must hold a run to resume")
        text = json.dumps(dataclasses.asdict(config), indent=2)
        if used:
            _check_same_model(path, json.loads(self.config.read_text()), json.loads(text))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.config.write_text(text)
        except OSError as error:
            raise ConfigError(
                f"workdir = {path!r} must be a writable directory: {error.strerror}"
            ) from error


def _check_same_model(path: str, before: dict, now: dict):
    """The split and the schedule of a resumed run may change; the model may not."""
    for field, value in before["model"].items():
        if now["model"].get(field) != value:
            raise ConfigError(
                f"model.{field} = {now['model'].get(field)!r} must be {value!r}, as in the run "
                f"that workdir {path!r} holds"
            )
