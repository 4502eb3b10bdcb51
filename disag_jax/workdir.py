"""The directory that a run writes to."""

import dataclasses
import enum
import fcntl
import json
import pathlib
import tempfile
import typing

from disag_jax.config import Config, ConfigError
from disag_jax.files import write_json

MARK = "started"
# Held by the process that writes to the directory, for as long as it lives.
LOCK = "lock"


class Workdir:
    """A run's directory and what lies in it; a context that gives it free at its end.

    Attributes:
      changed: (name, value before, value now) of the fields of a resumed run's config that differ
        from those it was last started with.
    """

    def __init__(self, path: str):
        self._lock, self.changed = None, []
        self.path = pathlib.Path(path)
        self.config = self.path / "config.json"
        self.data = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *_):
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def open(self, config: Config, *, resume: bool, data_digest: str | None = None):
        """Creates or reopens the directory; what a run of `config` is, `write_config` says in it.

        A new run wants a directory without another run in it; a resumed one wants the directory of
        the same experiment on the same data (`Batches.digest`; None is any). ConfigError otherwise,
        if it cannot be written, or while another run writes to it.
        """
        path = str(self.path)
        try:
            # Without a config it was killed before its first step, and begins anew.
            if resume and not (self.config.exists() or (self.path / LOCK).exists()):
                raise ConfigError(f"workdir = {path!r} must hold a run to resume")
            traces = [p for p in (self.config, self.metrics) if p.exists()]
            # An empty directory is of a run that was killed before its first step.
            if self.checkpoints.exists() and any(self.checkpoints.iterdir()):
                traces.append(self.checkpoints)
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise _unwritable(path, error) from error
        for within in (self.tensorboard, self.profile):
            if within.exists() and not within.is_dir():
                raise ConfigError(f"{str(within)!r} must be a directory where it is there")
        if traces and not resume:
            if (self.path / LOCK).exists():
                with self:
                    self._take()  # says so if that run still lives
            raise ConfigError(
                f"workdir = {path!r} must be new: it holds another run's {traces[0].name} "
                "(--resume goes on with it)"
            )
        if traces and resume:
            self._check_same_run(config)
            self._check_same_data(data_digest)
        self._take()

    def _take(self):
        """ConfigError if another process has the directory: two would mix their checkpoints."""
        try:
            self._lock = (self.path / LOCK).open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.__exit__()
            raise ConfigError(
                f"workdir = {str(self.path)!r} must be free: another run is still writing to it"
            ) from error
        except OSError:
            pass  # a file system without locks

    def mark(self, token: str):
        """Leaves a token that every process must find in its own directory."""
        (self.path / MARK).write_text(token)

    def read_mark(self) -> str | None:
        """The token that `mark` left, None if there is none."""
        try:
            return (self.path / MARK).read_text()
        except OSError:
            return None

    def write_config(self, config: Config, data_digest: str | None = None):
        """Makes the directory that of a run of `config`, when nothing can refuse it any more."""
        try:
            write_json(self.config, dataclasses.asdict(config))
            write_json(self.data, {"checksum": data_digest})
        except OSError as error:
            raise _unwritable(str(self.path), error) from error

    def read_config(self) -> Config:
        """The config of the run that the directory holds; ConfigError if there is no such run."""
        try:
            return config_from_dict(json.loads(self.config.read_text()))
        except OSError as error:
            raise ConfigError(
                f"workdir = {str(self.path)!r} must hold a run, but its config.json cannot be "
                f"read: {error.strerror}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.config}: {error}") from error

    def _check_same_run(self, now: Config):
        """The split and the schedule of a resumed run may change; model and data may not.

        The data position is the step, so the sequences of each step must be the same.
        """
        before, run = self.read_config(), f"as in the run that workdir {str(self.path)!r} holds"
        both = zip(named_fields(before), named_fields(now), strict=True)
        self.changed = [(name, old, new) for (name, old), (_, new) in both if old != new]
        fields = [("model", field.name) for field in dataclasses.fields(now.model)]
        for section, name in [*fields, ("batch", "sequence_length"), ("run", "seed")]:
            here, there = (getattr(getattr(c, section), name) for c in (now, before))
            if here != there:
                raise ConfigError(f"{section}.{name} = {here!r} must be {there!r}, {run}")
        if now.sequences_per_step != before.sequences_per_step:
            raise ConfigError(
                f"batch.micro_batches = {now.batch.micro_batches} must make steps of "
                f"{before.sequences_per_step} sequences, not {now.sequences_per_step}, {run}"
            )

    def _check_same_data(self, digest: str | None):
        try:
            before = json.loads(self.data.read_text())["checksum"]
        except FileNotFoundError:
            return  # of a run before there was such a file
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.data} must say which data the run had, but cannot be read; without the "
                "file they are not compared"
            ) from error
        if None not in (before, digest) and before != digest:
            raise ConfigError(
                f"data (paths, sources, weights) must be that of the run that workdir "
                f"{str(self.path)!r} holds, with the checksum {before}, not {digest}"
            )


def named_fields(config: Config) -> list[tuple[str, object]]:
    """The name, such as "model.num_layers", and the value of every field of a config."""
    fields = []
    for section, values in dataclasses.asdict(config).items():
        if isinstance(values, dict):
            fields += [(f"{section}.{name}", value) for name, value in values.items()]
        else:
            fields.append((section, values))
    return fields


def check_new(path: str):
    """ConfigError if something lies where a run is to make a directory of its own."""
    directory = pathlib.Path(path)
    try:
        is_taken = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    except OSError as error:
        raise _unwritable(path, error) from error
    if is_taken:
        raise ConfigError(f"workdir = {path!r} must be a new or empty directory")


def new_directory(path: str) -> pathlib.Path:
    """Makes a directory for several runs, absolute; ConfigError if it is not new or empty."""
    check_new(path)
    directory = pathlib.Path(path).resolve()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise _unwritable(path, error) from error
    return directory


def _unwritable(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"workdir = {path!r} must be a writable directory: {error.strerror}")


def config_from_dict(values: dict) -> Config:
    """The config that `dataclasses.asdict` and JSON made `values` of.

    A field that is absent has its default; ConfigError for an unknown one or a wrong value.
    """
    return _restored(Config, values, "config").validate()


def _restored(kind, value, path: str):
    """A field's value of its type, from what JSON made of it."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{path} = {value!r} must hold the fields of {kind.__name__}")
        types = {field.name: field.type for field in dataclasses.fields(kind)}
        unknown = next((name for name in value if name not in types), None)
        if unknown is not None:
            raise ConfigError(
                f"{path}.{unknown} must be a field of {kind.__name__}: {', '.join(types)}"
            )
        return kind(**{n: _restored(types[n], v, f"{path}.{n}") for n, v in value.items()})
    if isinstance(kind, enum.EnumType) and value in list(kind):
        return kind(value)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        item = typing.get_args(kind)[0]
        return tuple(_restored(item, v, path) for v in value)
    # Whatever else it is, `Config.validate` has the rule.
    return value
