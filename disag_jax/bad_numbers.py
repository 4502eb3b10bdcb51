"""Steps whose loss or gradient is not finite: where the bad numbers are, and when to give up.

Such a step's update is skipped (disag_jax/step.py). One bad batch or one flipped bit is passed over
so; a model that has diverged skips step after step, and the run stops.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from disag_jax.config import Config
from disag_jax.errors import RunError
from disag_jax.pipeline import EVERYWHERE
from mesh.placement import Meshes
from mesh.roles import Role

# Layers that a message names before it only counts the rest.
NAMED_LAYERS = 4


class NonFiniteLossError(RunError):
    """Loss or gradient of several steps in a row were not finite; the state is unchanged."""


def count_non_finite(config: Config, meshes: Meshes, row_grads, vocabulary_grads) -> dict:
    """How many values of a step's gradients are not finite.

    Returns {"attention": [L], "expert": [L], "vocabulary": number}: of a layer, those of the worker
    that has most. All processes must call it together. It compiles a program of its own, which only
    a bad step needs.
    """
    placement = meshes.placement
    count = jax.jit(
        lambda tree: jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x), axis=-1), tree),
        out_shardings=NamedSharding(meshes.union, EVERYWHERE),
    )
    rows, vocabulary = jax.device_get(count((row_grads, vocabulary_grads)))
    counts = {}
    for role in Role:
        # [D W, v] of all workers, those of the other role included unless co-located.
        of_workers = rows[role.label] if placement.colocated else rows
        layers = np.zeros((of_workers.shape[1], placement.stages), int)
        for row, values in enumerate(of_workers):
            worker = row % placement.workers
            if placement.rank_of(worker, role) is not None:
                stage = placement.stage_of(worker)
                layers[:, stage] = np.maximum(layers[:, stage], values)
        counts[role.label] = layers.reshape(-1)[: config.model.num_layers].tolist()
    counts["vocabulary"] = int(sum(np.sum(x) for x in vocabulary.values()))
    return counts


class SkippedSteps:
    """Counts the skipped steps of a run, and stops it after too many in a row.

    Attributes:
      total: since the run began or was resumed.
    """

    def __init__(self, max_in_a_row: int):
        self._max_in_a_row = max_in_a_row
        self._in_a_row = 0
        self.total = 0

    def good(self):
        """Takes note of a step that was not skipped."""
        self._in_a_row = 0

    def bad(self, step: int, metrics: dict) -> dict:
        """Takes note of a skipped step: what the log says of it.

        metrics: as `Stepper.train_step` returned them.
        """
        self.total += 1
        self._in_a_row += 1
        return {
            "step": step,
            "skipped_steps": self.total,
            **{f"non_finite_{name}": counts for name, counts in metrics["non_finite"].items()},
        }

    def warning(self, step: int, metrics: dict) -> str:
        """What is said of the step just noted.

        NonFiniteLossError if it is the last of `run.max_skipped_steps` in a row.
        """
        what = (
            f"step {step}: loss = {metrics['total_loss']} and gradient norm = "
            f"{metrics['gradient_norm']} must be finite; {_places(metrics['non_finite'])}"
        )
        if self._in_a_row == self._max_in_a_row:
            raise NonFiniteLossError(
                f"{what}; skipped run.max_skipped_steps = {self._in_a_row} in a row, with the "
                "parameters and checkpoints as before them; if a resumed run ends so too, "
                "--resume_step names an older checkpoint"
            )
        return f"warning: {what}; its update is skipped ({self._in_a_row} in a row)"


def _places(non_finite: dict) -> str:
    """Where the bad numbers are, in words."""
    parts = []
    for role in Role:
        layers = [layer for layer, count in enumerate(non_finite[role.label]) if count]
        if layers:
            named = ", ".join(map(str, layers[:NAMED_LAYERS]))
            more = f" and {len(layers) - NAMED_LAYERS} more" if layers[NAMED_LAYERS:] else ""
            parts.append(f"{role.label} of layers {named}{more}")
    if non_finite["vocabulary"]:
        parts.append("the vocabulary")
    return f"non-finite gradients in {'; '.join(parts)}" if parts else "all gradients are finite"
