"""Checkpoints of the logical model, so that a run can go on under any other split.

Orbax keeps the step directories: asynchronous saving, atomic commit, retention. In a step, `arrays`
holds one zarr array per leaf in logical form (disag_jax/logical.py); the metadata, JSON, has the
leaves' types and what the caller adds. Each process writes and reads only what its own devices
hold, and no two devices write to one chunk. The directory must be on a file system that all
processes see, and all processes must call every method.

A `SavedCheckpoint` is read in its logical form, by programs that know of no split.
"""

import asyncio
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
from disag_jax.logical import LeafMap, state_maps
from disag_jax.state import StateManager, TrainState

# "state" is not possible: Orbax gives that name to a handler of its own.
ARRAYS = "arrays"

# A chunk that is missing is damage, not zeros.
READ_OPTIONS = {"fill_missing_data_reads": False}


class UnreadableCheckpointError(ConfigError):
    """A checkpoint that lacks a file, or has one that does not hold what it should."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the training state.

    Attributes:
      name: its path in the state, and its directory in a checkpoint.
      physical: its shape, type and sharding under the split at hand.
      leaf_map: its logical form.
    """

    name: str
    physical: jax.ShapeDtypeStruct
    leaf_map: LeafMap

    @property
    def logical_type(self) -> str:
        """Type and logical shape, as in "float32[4, 64]"."""
        return f"{self.physical.dtype}{list(self.leaf_map.logical_shape)}"


@dataclasses.dataclass(frozen=True)
class LogicalArrays:
    """What LogicalArraysHandler saves (leaves and arrays) or loads (leaves)."""

    leaves: list[Leaf]
    arrays: list[jax.Array] | None = None


@ocp.handlers.register_handler
class LogicalArraysHandler(ocp.handlers.CheckpointableHandler):
    """Saves arrays in logical form, and loads them for another split.

    A checkpoint names its handler by module and class: renaming this one makes old checkpoints
    unreadable.
    """

    async def save(self, directory, arrays: LogicalArrays):
        """Copies to the host what is to be written, and returns the writing."""
        pairs = list(zip(arrays.leaves, arrays.arrays, strict=True))
        for _, array in pairs:
            for shard in _shards_to_write(array):
                shard.data.copy_to_host_async()
        return self._write(directory, [(leaf, _blocks(leaf, array)) for leaf, array in pairs])

    async def _write(self, directory, leaves):
        root = await directory.await_creation()
        await _all(_write_leaf(root, leaf, blocks) for leaf, blocks in leaves)

    async def load(self, directory, arrays: LogicalArrays | None = None):
        """Returns the reading, which gives a list of arrays."""
        return self._read(directory, arrays.leaves)

    async def _read(self, root, leaves: list[Leaf]):
        return await _all(_read_leaf(root, leaf) for leaf in leaves)

    async def metadata(self, directory):
        return None

    def is_handleable(self, value) -> bool:
        return isinstance(value, LogicalArrays)

    def is_abstract_handleable(self, value) -> bool:
        return isinstance(value, LogicalArrays)


class Checkpoints:
    """The checkpoints of a run, by step.

    Args:
      directory: made if it is not there.
      manager: of the split to save from and to restore to.
      keep_last: how many of the newest checkpoints to keep, at least one.
      keep_every: keep those of every step that is a multiple of it, too; 0 = none.
    """

    def __init__(
        self, directory, manager: StateManager, *, keep_last: int = 3, keep_every: int = 0
    ):
        if keep_last < 1:
            raise ConfigError(f"keep_last = {keep_last} must be 1 or more")
        self._directory = os.path.abspath(directory)
        self._manager = manager
        paths, self._tree = jax.tree_util.tree_flatten_with_path(manager.abstract_state().masters)
        self._leaves = [
            Leaf(jax.tree_util.keystr(path, simple=True, separator="."), physical, leaf_map)
            for (path, physical), leaf_map in zip(
                paths, self._tree.flatten_up_to(state_maps(manager)), strict=True
            )
        ]
        self._types = {leaf.name: leaf.logical_type for leaf in self._leaves}
        self._abandoned = []
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep_last)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        self._checkpointer = ocp.training.Checkpointer(
            self._directory, preservation_policy=policies.AnyPreservationPolicy(kept)
        )

    def save(self, state: TrainState, extra: dict):
        """Begins to save; when this returns the state may be donated.

        Waits if an earlier checkpoint is still being written: one left out might be one to keep.
        `extra` must be JSON. ConfigError if the directory already has this or a later step. The
        first time after an older step was restored, the steps after that one are deleted: the run
        has taken another course.
        """
        for later in self._abandoned:
            self._checkpointer.delete(later)
        self._abandoned = []
        latest = self._checkpointer.latest
        if latest is not None and latest.step >= state.step:
            raise ConfigError(
                f"step = {state.step} must be after the last checkpoint in {self._directory}, "
                f"which is of step {latest.step}"
            )
        self._checkpointer.save_checkpointables_async(
            state.step,
            {ARRAYS: LogicalArrays(self._leaves, self._tree.flatten_up_to(state.masters))},
            # A copy that the caller cannot change meanwhile, and an error here if it is not JSON.
            custom_metadata=json.loads(json.dumps({"leaves": self._types, "extra": extra})),
            force=True,
        )

    def restore(self, step: int | None = None) -> tuple[TrainState, dict]:
        """The state at a step, or at the last one, and the `extra` that was saved with it.

        ConfigError if there is no such checkpoint or it is of another model,
        UnreadableCheckpointError if it is damaged.
        """
        step = _existing_step(self._directory, self.steps(), step)
        metadata = _read_metadata(self._directory, step).custom_metadata
        self._check_model(step, metadata["leaves"])
        with _reading(self._directory, step):
            parts = {ARRAYS: LogicalArrays(self._leaves)}
            arrays = self._checkpointer.load_checkpointables(step, parts)[ARRAYS]
        masters = jax.tree.unflatten(self._tree, arrays)
        self._abandoned = [later for later in self.steps() if later > step]
        return self._manager.with_compute_copies(step, **masters), metadata["extra"]

    def steps(self) -> list[int]:
        """The steps that have a checkpoint; waits for the one that is being written."""
        self.wait()
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def wait(self):
        """Waits until all is written, and raises what went wrong in it."""
        self._checkpointer.wait()

    def close(self):
        self._checkpointer.close()

    def _check_model(self, step: int, saved: dict[str, str]):
        for name in self._types | saved:
            there, here = saved.get(name, "absent"), self._types.get(name, "absent")
            if there != here:
                raise ConfigError(
                    f"the checkpoint of step {step} in {self._directory} must be of this model: "
                    f"its {name} is {there}, the model's is {here}"
                )


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
        step = _existing_step(directory, saved_steps(directory), step)
        metadata = _read_metadata(directory, step)
        with _reading(directory, step):
            return cls(
                directory=directory,
                step=step,
                written=metadata.commit_timestamp,
                leaves={
                    name: _parse_type(text)
                    for name, text in metadata.custom_metadata["leaves"].items()
                },
                extra=metadata.custom_metadata["extra"],
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
                tree[path[-1]] = jnp.asarray(self._read(name), dtype)
        return params

    def router_bias(self) -> jax.Array:
        """The selection bias [L, E]."""
        return jnp.asarray(self._read("router_bias"))

    def _read(self, name: str) -> np.ndarray:
        with _reading(self.directory, self.step):
            spec = _storage(self.path / ARRAYS, name) | READ_OPTIONS
            return ts.open(spec, open=True).result().read().result()


def saved_steps(directory) -> list[int]:
    """The steps that have a checkpoint in a directory of checkpoints, which need not be there."""
    paths = pathlib.Path(directory).glob("*")
    # What is still being written has a longer name.
    return sorted(int(path.name) for path in paths if path.name.isdecimal() and path.is_dir())


def _existing_step(directory: str, steps: list[int], step: int | None) -> int:
    if not steps:
        raise ConfigError(f"{directory} must hold a checkpoint, but there is none")
    if step is None:
        return steps[-1]
    if step not in steps:
        known = ", ".join(map(str, steps))
        raise ConfigError(f"step = {step} must be one of the checkpoints in {directory}: {known}")
    return step


def _read_metadata(directory: str, step: int):
    """Orbax's metadata of a checkpoint; its `custom_metadata` is what `Checkpoints.save` gave."""
    with _reading(directory, step):
        metadata = ocp.checkpointables_metadata(os.path.join(directory, str(step)))
        if "leaves" not in (metadata.custom_metadata or {}):
            raise ValueError("its metadata is missing")
        return metadata


@contextlib.contextmanager
def _reading(directory: str, step: int):
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


async def _all(tasks) -> list:
    """Results of the tasks; the first error only when all are done, as none may be left running."""
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _shards_to_write(array: jax.Array) -> list:
    """This process's shards, without those that another device writes."""
    return [shard for shard in array.addressable_shards if shard.replica_id == 0]


def _blocks(leaf: Leaf, array: jax.Array) -> list[tuple]:
    """What this process writes of a leaf: (logical indices by dim, host copy of the values)."""
    blocks = []
    for shard in _shards_to_write(array):
        located = leaf.leaf_map.locate(shard.index)
        if not located.is_empty:
            blocks.append((located.targets, located.pick(np.asarray(shard.data))))
    return blocks


def _storage(root, name: str) -> dict:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{root}/{name}/"}}


async def _write_leaf(root, leaf: Leaf, blocks):
    if not blocks:
        return
    metadata = {
        "shape": leaf.leaf_map.logical_shape,
        "data_type": leaf.physical.dtype.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": leaf.leaf_map.chunk_shape},
        },
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ],
    }
    # A chunk of zeros is stored like any other, so that a missing one is an error when read.
    options = {"metadata": metadata, "store_data_equal_to_fill_value": True}
    store = await ts.open(_storage(root, leaf.name) | options, open=True, create=True)
    await _all(store.oindex[targets].write(values) for targets, values in blocks)


async def _read_leaf(root, leaf: Leaf) -> jax.Array:
    """The array under the split at hand, zeros in the padding; each part is read only once."""
    shape, sharding = leaf.physical.shape, leaf.physical.sharding
    indices = sharding.addressable_devices_indices_map(shape)
    shards = {}
    if indices:
        store = await ts.open(_storage(root, leaf.name) | READ_OPTIONS, open=True)
    for index in indices.values():
        if str(index) not in shards:
            located = leaf.leaf_map.locate(index)
            values = await store.oindex[located.targets].read()
            shards[str(index)] = located.fill(values, sharding.shard_shape(shape))
    buffers = [jax.device_put(shards[str(index)], device) for device, index in indices.items()]
    return jax.make_array_from_single_device_arrays(
        shape, sharding, buffers, dtype=leaf.physical.dtype
    )
