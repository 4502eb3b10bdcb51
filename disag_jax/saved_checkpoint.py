"""A checkpoint as it lies on disk: the logical model, read by programs that know of no split."""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import tensorstore as ts

from disag_jax.config import ConfigError

# "state" is not possible: Orbax gives that name to a handler of its own.
ARRAYS = "arrays"

# A chunk that is missing is damage, not zeros.
READ_OPTIONS = {"fill_missing_data_reads": False}


class UnreadableCheckpointError(ConfigError):
    """A checkpoint that lacks a file, or has one that does not hold what it should."""


@dataclasses.dataclass(frozen=True)
class SavedCheckpoint:
    """One checkpoint as it is on disk: the logical model, whatever split it was saved under.

    Attributes:
      written: when it was complete, if known.
      leaves: logical shape and type of every array, by the name of its directory, such as
        "params.expert.experts.gate".
      extra: what was saved with it.
    """

    directory: str
    step: int
    written: datetime.datetime | None
    leaves: dict[str, jax.ShapeDtypeStruct]
    extra: dict

    @classmethod
    def open(cls, directory, step: int | None = None) -> "SavedCheckpoint":
        """The checkpoint of a step, or of the last one, in a directory of checkpoints.

        ConfigError if there is none, UnreadableCheckpointError if it is damaged.
        """
        directory = os.path.abspath(directory)
        step = existing_step(directory, saved_steps(directory), step)
        metadata = read_metadata(directory, step)
        with reading(directory, step):
            return cls(
                directory=directory,
                step=step,
                written=metadata.written,
                leaves={name: _parse_type(text) for name, text in metadata.leaves.items()},
                extra=metadata.extra,
            )

    @property
    def path(self) -> pathlib.Path:
        return pathlib.Path(self.directory, str(self.step))

    def params(self, dtype=None) -> dict:
        """The logical parameters on the default device, by group; floats as `dtype` if given."""
        params = {}
        for name in self.leaves:
            kind, *path = name.split(".")
            if kind == "params":
                tree = params
                for key in path[:-1]:
                    tree = tree.setdefault(key, {})
                # A leaf at a time: the host never holds two.
                tree[path[-1]] = jnp.asarray(self.read(name), dtype)
        return params

    def router_bias(self) -> jax.Array:
        """The selection bias [L, E]."""
        return jnp.asarray(self.read("router_bias"))

    def read(self, name: str) -> np.ndarray:
        """One of the `leaves`, in logical form."""
        with reading(self.directory, self.step):
            spec = storage(self.path / ARRAYS, name) | READ_OPTIONS
            return ts.open(spec, open=True).result().read().result()


def saved_steps(directory) -> list[int]:
    """The steps that have a checkpoint in a directory of checkpoints, which need not be there."""
    paths = pathlib.Path(directory).glob("*")
    # What is still being written has a longer name.
    return sorted(int(path.name) for path in paths if path.name.isdecimal() and path.is_dir())


def existing_step(directory: str, steps: list[int], step: int | None) -> int:
    if not steps:
        raise ConfigError(f"{directory} must hold a checkpoint, but there is none")
    if step is None:
        return steps[-1]
    if step not in steps:
        known = ", ".join(map(str, steps))
        raise ConfigError(f"step = {step} must be one of the checkpoints in {directory}: {known}")
    return step


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What `Checkpoints.save` wrote beside the arrays.

    Attributes:
      leaves: type and logical shape of every array, as in "float32[4, 64]", by its name.
      extra: what the caller added.
      written: when the checkpoint was complete, if known.
    """

    leaves: dict[str, str]
    extra: dict
    written: datetime.datetime | None


def read_metadata(directory: str, step: int) -> Metadata:
    """The metadata of a checkpoint; UnreadableCheckpointError if it is damaged."""
    with reading(directory, step):
        found = ocp.checkpointables_metadata(os.path.join(directory, str(step)))
        custom = found.custom_metadata or {}
        if "leaves" not in custom:
            raise ValueError("its metadata is missing")
        return Metadata(custom["leaves"], custom["extra"], found.commit_timestamp)


@contextlib.contextmanager
def reading(directory: str, step: int):
    try:
        yield
    except (KeyError, OSError, ValueError) as error:
        # Orbax hides what a handler raised behind a KeyError of its own.
        cause = error.__cause__ or error
        raise UnreadableCheckpointError(
            f"the checkpoint of step {step} in {directory} cannot be read: {cause}"
        ) from cause


def _parse_type(text: str) -> jax.ShapeDtypeStruct:
    """The inverse of `Leaf.logical_type`."""
    dtype, shape = text.split("[")
    return jax.ShapeDtypeStruct(json.loads(f"[{shape}"), np.dtype(dtype))


def storage(root, name: str) -> dict:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{root}/{name}/"}}
