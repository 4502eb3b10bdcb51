"""A step with bad numbers changes nothing, says where they are, and too many in a row end a run."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from disag_jax import training
from disag_jax.bad_numbers import NonFiniteLossError, SkippedSteps, count_non_finite
from disag_jax.config import PlacementKind, SplitConfig
from disag_jax.saved_checkpoint import saved_steps
from mesh.roles import Role
from tests import support

SPLITS = {
    "disaggregated": (SplitConfig(stages=2, attention_workers=1, expert_workers=3), 4),
    "co-located": (
        SplitConfig(attention_workers=4, expert_workers=2, placement=PlacementKind.COLOCATED), 2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=SPLITS)
def trained(request):
    """A stepper, and its state after a step that moved everything."""
    split, micro_batches = SPLITS[request.param]
    config = support.small_config(split, micro_batches, num_layers=3, bias_update_rate=0.01)
    stepper = support.make_stepper(config)
    return stepper, stepper.train_step(stepper.init(0), support.random_sequences(config))[0]


def with_bad_value(stepper, rows, role: Role, row: int, value):
    """A copy of packed rows with one bad number, on the first worker of a role in stage 0."""
    worker = stepper.meshes.placement.worker(0, role, 0)
    changed = jax.tree.map(np.array, jax.device_get(rows))
    (changed[role.label] if isinstance(changed, dict) else changed)[worker, row, 3] = value
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), changed, rows)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_step_leaves_the_state_bit_for_bit(trained, value):
    stepper, state = trained
    before = jax.tree.map(np.array, jax.device_get((state.masters, state.vocabulary)))
    rows = with_bad_value(stepper, state.rows, Role.EXPERT, 0, value)
    bad = dataclasses.replace(state, rows=rows)
    after, metrics = stepper.train_step(bad, support.random_sequences(stepper.config, seed=2))
    assert metrics["skipped"] and not np.isfinite(metrics["gradient_norm"])
    assert after.step == bad.step + 1, "or the same batch would come again"
    assert after.rows is rows
    masters = jax.device_get((after.masters, after.vocabulary))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(masters), strict=True):
        assert old.tobytes() == np.asarray(new).tobytes()


@pytest.mark.parametrize("role", Role)
def test_bad_gradients_are_found_by_role_and_layer(trained, role):
    stepper, state = trained
    zeros = jax.tree.map(lambda x: jax.device_put(x * 0, x.sharding), state.rows)
    rows = with_bad_value(stepper, zeros, role, 1, np.inf)
    vocabulary = jax.tree.map(lambda x: x.at[0].set(np.nan), state.vocabulary)
    counts = count_non_finite(stepper.config, stepper.meshes, rows, vocabulary)
    expected = [0] * stepper.config.model.num_layers
    expected[stepper.config.split.stages] = 1  # row 1 of stage 0
    other = Role(1 - role)
    assert (counts[role.label], sum(counts[other.label])) == (expected, 0)
    assert counts["vocabulary"] == 2 * stepper.config.model.d_model + 1


def skip(steps: SkippedSteps, step: int) -> str:
    places = {"attention": [0, 7, 0], "expert": [0] * 3, "vocabulary": 0}
    metrics = {"total_loss": 1.5, "gradient_norm": np.inf, "non_finite": places}
    steps.bad(step, metrics)
    return steps.warning(step, metrics)


def test_only_steps_in_a_row_stop_the_run():
    steps = SkippedSteps(max_in_a_row=2)
    for step in (1, 3, 5):
        message = skip(steps, step)
        steps.good()
    assert steps.total == 3
    assert "step 5: loss = 1.5 and gradient norm = inf must be finite" in message
    assert "non-finite gradients in attention of layers 1; its update is skipped" in message
    skip(steps, 6)
    with pytest.raises(NonFiniteLossError, match=r"step 7: .*run.max_skipped_steps = 2 in a row"):
        skip(steps, 7)


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [None, 5])
def test_an_update_that_overflows_ends_the_run_with_the_checkpoints_before(small_run, stop_after):
    """Gradients are finite until parameters of the size of the learning rate meet in a product.

    Told to stop after a skipped step, the run saves nothing of what overflowed.
    """
    config, workdir = small_run
    support.make_plain(config)
    config.optimizer.peak_learning_rate = 1e300
    config.run.num_steps, config.run.checkpoint_every, config.run.eval_batches = 20, 1, 0
    with pytest.raises(NonFiniteLossError, match=r"step 12: .*run.max_skipped_steps = 10 in a row"):
        training.train(config, workdir, stop_after=stop_after)
    assert saved_steps(pathlib.Path(workdir, "checkpoints")) == [1, 2]
