"""Whether a step fits: bytes that each worker needs, by the compiler's count, and those it has."""

import math

import jax

from disag_jax.errors import ConfigError
from disag_jax.state import StateManager
from mesh.placement import Meshes
from mesh.roles import Role

# How the refusal begins, by which other commands know it.
TOO_LITTLE = "memory of each device must hold a step"


def state_bytes(manager: StateManager, groups: tuple[str, ...]) -> int:
    """Bytes of the masters and optimizer state of parameter groups on one of their devices."""
    return sum(_group_bytes(manager, name) for name in groups)


def role_groups(colocated: bool) -> dict[str, tuple[str, ...]]:
    """The parameter groups that a kind of worker (`Placement.kind_of`) holds."""
    if colocated:
        return {"worker": (*(role.label for role in Role), "vocabulary")}
    return {f"{role.label} worker": (role.label, "vocabulary") for role in Role}


def needed_bytes(manager: StateManager, program: jax.stages.Compiled) -> dict[str, int]:
    """Bytes that each kind of worker holds at once while the training pipeline runs.

    Masters and optimizer state, and of the program its arguments (compute copies of the weights,
    the batch), outputs (gradients) and temporary buffers.
    """
    analysis = program.memory_analysis()
    of_program = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    return {
        kind: state_bytes(manager, groups) + of_program
        for kind, groups in role_groups(manager.config.split.colocated).items()
    }


def available_bytes(meshes: Meshes) -> dict[str, int]:
    """The least bytes that JAX may use on a device of each kind here; empty if it has no limit."""
    found = {}
    for devices in meshes.union.devices:
        for worker, device in enumerate(devices):
            is_here = device.process_index == jax.process_index()
            stats = device.memory_stats() if is_here else None
            if stats and "bytes_limit" in stats:
                kind = meshes.placement.kind_of(worker)
                found[kind] = min(found.get(kind, math.inf), stats["bytes_limit"])
    return found


def check(needed: dict[str, int], available: dict[str, int]):
    """ConfigError with the bytes missing on each kind of worker, if a step does not fit."""
    missing = {
        kind: needed[kind] - available[kind]
        for kind in needed
        if kind in available and needed[kind] > available[kind]
    }
    if missing:
        parts = "; ".join(
            f"{kind}: {in_words(needed[kind])} needed, {in_words(available[kind])} available, "
            f"{in_words(size)} missing"
            for kind, size in missing.items()
        )
        raise ConfigError(
            f"{TOO_LITTLE} ({parts}): fewer tokens in "
            "batch.tokens_per_worker, more workers or stages in split, or a larger "
            "XLA_PYTHON_CLIENT_MEM_FRACTION would help"
        )


def in_words(size: float) -> str:
    """Bytes with their unit."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _group_bytes(manager: StateManager, name: str) -> int:
    group = manager.groups[name]
    pairs = [(group.params, group.specs), (group.opt_state, group.opt_specs)]
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for tree, specs in pairs
        for leaf, sharding in zip(
            jax.tree.leaves(tree), jax.tree.leaves(group.shardings(specs)), strict=True
        )
    )
