"""A checkpoint as it lies on disk: the logical model, read by programs that know of no split."""

import asyncio
import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from disag_jax.config import ConfigError

# "state" is not possible: Orbax gives that name to a handler of its own.
ARRAYS = "arrays"

# Orbax's name of a checkpoint's metadata.
METADATA = "_CHECKPOINT_METADATA"
# What is still being written has a longer name.
STEP_NAME = re.compile(r"0|[1-9]\d*", re.ASCII)
# A leaf's name is its directory: none leads out of the checkpoint.
LEAF_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
LEAF_TYPE = re.compile(
    r"(?P<dtype>float64|float32|bfloat16|float16|int64|int32|uint32)"
    r"\[(?P<shape>([1-9]\d{0,11}(, [1-9]\d{0,11})*)?)\]",
    re.ASCII,
)
MOST_ELEMENTS = 2**48


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
            return asyncio.run(self._read(name))

    async def _read(self, name: str) -> np.ndarray:
        store = await open_array(self.path / ARRAYS, name, self.leaves[name])
        return await store.read()


def saved_steps(directory) -> list[int]:
    """The steps that have a checkpoint in a directory of checkpoints, which need not be there."""
    paths = pathlib.Path(directory).glob("*")
    return sorted(
        int(path.name) for path in paths if STEP_NAME.fullmatch(path.name) and path.is_dir()
    )


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
        # Read as plain JSON: nothing in it names code to run.
        fields = json.loads(pathlib.Path(directory, str(step), METADATA).read_text("utf-8"))
        custom = _field(fields, "custom_metadata", dict)
        leaves, extra = _field(custom, "leaves", dict), _field(custom, "extra", dict)
        # Checkpoints of before there was a checksum have none.
        if custom.get("checksum") not in (None, checksum(leaves, extra)):
            raise ValueError("its metadata must have the checksum that it names")
        # A copy under another name would go on with other data. Older ones have no such field.
        if custom.get("step", step) != step:
            raise ValueError(f"its metadata must say step {step}, not {custom['step']!r}")
        for name, text in leaves.items():
            if not LEAF_NAME.fullmatch(name):
                raise ValueError(f"{name!r} must be a name of an array")
            _parse_type(text)
        written = _field(fields, "commit_timestamp_nsecs", int | None)
        if written is not None:
            written = datetime.datetime.fromtimestamp(written / 1e9, datetime.UTC)
        return Metadata(leaves, extra, written)


def checksum(leaves: dict, extra: dict) -> str:
    """What tells the metadata from one in which a bit has changed."""
    return f"{zlib.crc32(json.dumps([leaves, extra], sort_keys=True).encode()):08x}"


def _field(fields, name: str, kind):
    if not isinstance(fields, dict) or not isinstance(fields.get(name), kind):
        raise ValueError(f"its metadata must have the field {name}")
    return fields.get(name)


@contextlib.contextmanager
def reading(directory: str, step: int):
    try:
        yield
    except (OSError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise UnreadableCheckpointError(
            f"the checkpoint of step {step} in {directory} cannot be read: {error}"
        ) from error


def _parse_type(text) -> jax.ShapeDtypeStruct:
    """The inverse of `Leaf.logical_type`."""
    match = LEAF_TYPE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} must be the type of an array, such as 'float32[4, 64]'")
    shape = tuple(json.loads(f"[{match['shape']}]"))
    if math.prod(shape) > MOST_ELEMENTS:
        raise ValueError(f"{text!r} must be the type of an array that exists")
    return jax.ShapeDtypeStruct(shape, np.dtype(match["dtype"]))


async def open_array(root, name: str, expected: jax.ShapeDtypeStruct) -> ts.TensorStore:
    """An array to read below `root`, of the shape and type that the metadata says."""
    options = {"fill_missing_data_reads": False}  # a chunk that is missing is damage, not zeros
    store = await ts.open(storage(root, name) | options, open=True)
    if (store.shape, store.dtype.numpy_dtype) != (expected.shape, expected.dtype):
        raise ValueError(
            f"{name} must be {expected.dtype}{list(expected.shape)}, not {store.spec()}"
        )
    return store


def storage(root, name: str) -> dict:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{root}/{name}/"}}
