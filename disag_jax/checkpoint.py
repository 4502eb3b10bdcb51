"""Checkpoints of the logical model, so that a run can go on under any other split.

Orbax keeps the step directories: asynchronous saving, atomic commit, retention. In a step, `arrays`
holds one zarr array per leaf in logical form (disag_jax/logical.py); the metadata, JSON, has the
leaves' types and what the caller adds. Each process writes and reads only what its own devices
hold, and no two devices write to one chunk. The directory must be on a file system that all
processes see, and all processes must call every method.

Memory on the host: a save keeps one copy of what this process writes until it is written (two on
accelerators while it is made), and what one leaf takes to encode; a restore holds two copies of the
largest shard of a leaf.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile

import jax
import orbax.checkpoint.experimental.v1 as ocp

from disag_jax import leaf_arrays, processes
from disag_jax.config import ConfigError
from disag_jax.errors import RunError
from disag_jax.leaf_arrays import Leaf
from disag_jax.logical import state_maps
from disag_jax.saved_checkpoint import (
    ARRAYS,
    UnreadableCheckpointError,
    checksum,
    existing_step,
    read_metadata,
    reading,
    saved_steps,
)
from disag_jax.state import StateManager, TrainState

# Orbax's ending of the directories that it writes to.
UNFINISHED = ".orbax-checkpoint-tmp"


class SaveFailedError(RunError):
    """A checkpoint could not be written; those before it are as they were."""


@dataclasses.dataclass(frozen=True)
class LogicalArrays:
    """What LogicalArraysHandler saves.

    Attributes:
      attempt: names this save among all of the run; the same on all processes.
    """

    leaves: list[Leaf]
    arrays: list[jax.Array]
    attempt: str


@ocp.handlers.register_handler
class LogicalArraysHandler(ocp.handlers.CheckpointableHandler):
    """Saves arrays in logical form.

    A checkpoint names its handler by module and class: renaming this one makes old checkpoints
    unreadable.
    """

    async def save(self, directory, arrays: LogicalArrays):
        """Copies to the host what is to be written, and returns the writing."""
        pairs = list(zip(arrays.leaves, arrays.arrays, strict=True))
        for _, array in pairs:
            for shard in leaf_arrays.shards_to_write(array):
                shard.data.copy_to_host_async()
        blocks = [(leaf, leaf_arrays.blocks_to_write(leaf, array)) for leaf, array in pairs]
        return self._write(directory, blocks, arrays.attempt)

    async def _write(self, directory, leaves, attempt: str):
        async def write():
            root = await directory.await_creation()
            # One leaf after the other bounds the memory; a leaf's chunks are written at once.
            leaves.reverse()
            while leaves:
                await leaf_arrays.write_leaf(root, *leaves.pop())

        failure = await processes.share_failure(attempt, write())
        if failure:
            # On all processes, or those that succeeded would wait for the others for long.
            raise OSError(failure)

    async def load(self, directory, arrays=None):
        raise NotImplementedError("Checkpoints.restore reads without Orbax")

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

    Attributes:
      last_good: step of the newest checkpoint that this object restored or saved; None if none.
      damage: a sentence for each checkpoint that `restore` passed over.
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
        self._kept = policies.AnyPreservationPolicy(kept)
        os.makedirs(self._directory, exist_ok=True)
        self._checkpointer = self._open()
        self._saving, self._num_saves = None, 0
        self.last_good, self.damage = None, []

    def save(self, state: TrainState, extra: dict):
        """Begins to save; when this returns the state may be donated.

        Waits if an earlier checkpoint is still being written: one left out might be one to keep.
        `extra` must be JSON. ConfigError if the directory already has this or a later step;
        SaveFailedError if this one cannot be begun or an earlier one could not be ended. The first
        time after an older step was restored, the steps after that one are deleted: the run has
        taken another course.
        """
        self.wait()
        # Where process 0 cannot write, the others would wait for it inside Orbax.
        self._attempt(state.step, self._check_writable if processes.is_first() else None)
        self._attempt(state.step, self._delete_abandoned)
        latest = self._checkpointer.latest
        if latest is not None and latest.step >= state.step:
            raise ConfigError(
                f"step = {state.step} must be after the last checkpoint in {self._directory}, "
                f"which is of step {latest.step}"
            )
        # A copy that the caller cannot change meanwhile, and an error here if it is not JSON.
        extra = json.loads(json.dumps(extra))
        metadata = {
            "step": state.step,
            "leaves": self._types,
            "extra": extra,
            "checksum": checksum(self._types, extra),
        }
        self._num_saves += 1
        arrays = LogicalArrays(
            self._leaves, self._tree.flatten_up_to(state.masters), f"save/{self._num_saves}"
        )
        self._attempt(
            state.step,
            lambda: self._checkpointer.save_checkpointables_async(
                state.step, {ARRAYS: arrays}, custom_metadata=metadata, force=True
            ),
        )
        self._saving = state.step

    def restore(self, step: int | None = None) -> tuple[TrainState, dict]:
        """The state at a step, or at the last that is whole, and the `extra` saved with it.

        ConfigError if there is no such checkpoint or it is of another model,
        UnreadableCheckpointError if it is damaged, or without a `step` if all are.
        """
        known = self.steps()
        wanted = [existing_step(self._directory, known, step)]
        if step is None:
            wanted = known[::-1]
        self.damage = []
        for candidate in wanted:
            (arrays, extra), damage = processes.on_each(lambda c=candidate: self._read(c))
            damage = processes.first_sentence(damage)
            if not damage:
                masters = jax.tree.unflatten(self._tree, arrays)
                self.last_good = candidate
                self._abandoned = [later for later in known if later > candidate]
                return self._manager.with_compute_copies(candidate, **masters), extra
            self.damage.append(damage)
        raise UnreadableCheckpointError("; ".join(self.damage))

    def steps(self) -> list[int]:
        """The steps that have a checkpoint; waits for the one that is being written."""
        self.wait()
        return saved_steps(self._directory)

    def describe_last_good(self) -> str:
        """Where a run can go on from, in words."""
        if self.last_good is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is of step {self.last_good} in {self._directory}"

    @property
    def is_pending(self) -> bool:
        """Whether the last save has not been waited for; the same on all processes."""
        return self._saving is not None

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written here; another process may be ahead or behind."""
        return self.is_pending and self._checkpointer.is_saving_in_progress()

    def wait(self):
        """Waits until all is written; SaveFailedError on all processes if that failed on one."""
        if self._saving is not None:
            step, self._saving = self._saving, None
            self._attempt(step, self._checkpointer.wait)
            self.last_good = step

    def close(self):
        """Waits for this process's part of the writing; without `wait`, its errors are not told.

        The other processes need not call it: they may have failed.
        """
        if self._checkpointer is not None:
            with contextlib.suppress(Exception):
                self._checkpointer.close()

    def _open(self) -> ocp.training.Checkpointer:
        return ocp.training.Checkpointer(
            self._directory, preservation_policy=self._kept, cleanup_tmp_directories=True
        )

    def _attempt(self, step: int, action):
        """Does one part of a save; SaveFailedError on all processes if it fails on one."""
        failure = processes.first_failure(action)
        if failure:
            # Orbax still counts on what failed: the next save begins with a new one.
            self._checkpointer = None
            raise SaveFailedError(f"the checkpoint of step {step} could not be saved: {failure}")

    def _check_writable(self):
        # What a failed save left may be what fills the disk.
        for left in pathlib.Path(self._directory).glob(f"*{UNFINISHED}"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryFile(dir=self._directory) as file:
            file.write(bytes(4096))

    def _delete_abandoned(self):
        if self._checkpointer is None:
            self._checkpointer = self._open()
        for later in self._abandoned:
            self._checkpointer.delete(later)
        self._abandoned = []

    def _read(self, step: int) -> tuple[tuple[list[jax.Array], dict], str]:
        """((this process's part of the arrays, extra), ""), or what is damaged in words."""
        try:
            metadata = read_metadata(self._directory, step)
            self._check_model(step, metadata.leaves)
            with reading(self._directory, step):
                root = pathlib.Path(self._directory, str(step), ARRAYS)
                # One leaf after the other: this bounds the memory.
                arrays = [asyncio.run(leaf_arrays.read_leaf(root, leaf)) for leaf in self._leaves]
            return (arrays, metadata.extra), ""
        except UnreadableCheckpointError as error:
            return ([], {}), str(error)

    def _check_model(self, step: int, saved: dict[str, str]):
        for name in self._types | saved:
            there, here = saved.get(name, "absent"), self._types.get(name, "absent")
            if there != here:
                raise ConfigError(
                    f"the checkpoint of step {step} in {self._directory} must be of this model: "
                    f"its {name} is {there}, the model's is {here}"
                )
