"""A run saved under one split goes on under another; damage and mistakes are named."""

import asyncio
import contextlib
import dataclasses
import functools
import pathlib
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disag_jax import leaf_arrays
from disag_jax.checkpoint import Checkpoints, SaveFailedError
from disag_jax.config import ConfigError, MuDtype, PlacementKind, SplitConfig
from disag_jax.logical import state_maps
from disag_jax.saved_checkpoint import SavedCheckpoint, UnreadableCheckpointError
from disag_jax.state import StateManager
from disag_jax.step import Stepper
from tests import support

# Numbers that nothing divides: layers in stages, experts and vocabulary rows on workers.
MODEL = {
    "num_layers": 5, "num_experts": 7, "num_shared_experts": 1, "bias_update_rate": 0.01,
}  # fmt: skip
EXTRA = {"config": {"name": "small", "paths": [], "factor": None}, "note": 1.5}

# By (p, M, N), with as many micro-batches as make a step eight sequences.
SAVED_FROM = (SplitConfig(1, 2, 1, 3, bucket_factors=()), 4)
SPLITS = {
    "2 1 3": SAVED_FROM,
    "1 2 2": (SplitConfig(1, 1, 2, 2, bucket_factors=()), 2),
    "4 1 1": (SplitConfig(1, 4, 1, 1, bucket_factors=()), 4),
    "1 1 3, two replicas": (SplitConfig(2, 1, 1, 3, bucket_factors=()), 2),
    "co-located": (
        SplitConfig(1, 2, 4, 2, bucket_factors=(), placement=PlacementKind.COLOCATED), 1,
    ),
    "one device": (
        SplitConfig(1, 1, 1, 1, bucket_factors=(), placement=PlacementKind.COLOCATED), 4,
    ),
}  # fmt: skip


def make_stepper(split, micro_batches, **model) -> Stepper:
    return support.make_stepper(support.small_config(split, micro_batches, **MODEL | model))


@functools.cache
def stepper_of(name: str) -> Stepper:
    """The stepper of one of SPLITS, compiled once for all tests."""
    return make_stepper(*SPLITS[name])


def sequences(step: int) -> np.ndarray:
    config = support.small_config(*SAVED_FROM, **MODEL)
    return support.random_sequences(config, seed=step)


def logical(manager: StateManager, masters: dict) -> dict:
    return jax.tree.map(
        lambda leaf, leaf_map: leaf_map.to_logical(np.asarray(leaf)), masters, state_maps(manager)
    )


@contextlib.contextmanager
def writing_held_back():
    """Lets nothing be written to disk inside, as if the disk were slow."""
    released, write_leaf = threading.Event(), leaf_arrays.write_leaf

    async def write_later(*args):
        while not released.is_set():
            await asyncio.sleep(0.01)
        await write_leaf(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaf_arrays, "write_leaf", write_later)
        try:
            yield
        finally:
            released.set()


@dataclasses.dataclass
class Run:
    """A run that was saved at step 2 while it went on to step 4.

    Attributes:
      masters: the logical masters at step 2.
      losses: of the steps from 2 to 4.
    """

    directory: pathlib.Path
    stepper: Stepper
    masters: dict
    losses: list[float]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    stepper = stepper_of("2 1 3")
    directory = tmp_path_factory.mktemp("run")
    state, losses = stepper.init(3), []
    for step in range(2):
        state, _ = stepper.train_step(state, sequences(step))
    # Copied on the devices: a buffer that numpy has seen is not reused when it is donated.
    masters = jax.tree.map(jnp.copy, state.masters)
    checkpoints = Checkpoints(directory, stepper.manager)
    with writing_held_back():
        checkpoints.save(state, EXTRA)
        for step in range(2, 4):
            state, metrics = stepper.train_step(state, sequences(step))
            losses.append(metrics["total_loss"])
    checkpoints.close()
    return Run(directory, stepper, logical(stepper.manager, masters), losses)


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_restores_the_same_masters(name, run):
    manager = stepper_of(name).manager
    state, extra = Checkpoints(run.directory, manager).restore()
    assert (state.step, extra) == (2, EXTRA)
    jax.tree.map(np.testing.assert_array_equal, logical(manager, state.masters), run.masters)
    assert np.abs(state.router_bias).max() > 0
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state.masters)
    abstract = manager.abstract_state().masters
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract)


@pytest.mark.parametrize("name", [name for name in SPLITS if SPLITS[name] is not SAVED_FROM])
def test_training_goes_on_under_another_split(name, run):
    stepper = stepper_of(name)
    state, _ = Checkpoints(run.directory, stepper.manager).restore(step=2)
    for step, expected in zip(range(2, 4), run.losses, strict=True):
        state, metrics = stepper.train_step(state, sequences(step))
        assert support.relative_error(metrics["total_loss"], expected) < 1e-12


def test_a_short_first_moment_is_kept_bit_for_bit(tmp_path):
    def manager_of(name):
        config = support.small_config(*SPLITS[name], **MODEL)
        config.optimizer.mu_dtype = MuDtype.BFLOAT16
        return support.make_stepper(config).manager

    here, there = manager_of("1 2 2"), manager_of("one device")
    state = here.init(0)
    draw = np.random.default_rng(0).standard_normal
    state.opt_state = jax.tree.map(
        lambda x: jax.device_put(jnp.asarray(draw(x.shape), x.dtype), x.sharding), state.opt_state
    )
    checkpoints = Checkpoints(tmp_path, here)
    checkpoints.save(state, EXTRA)
    checkpoints.wait()
    restored, _ = Checkpoints(tmp_path, there).restore()
    saved, found = logical(here, state.masters), logical(there, restored.masters)
    jax.tree.map(np.testing.assert_array_equal, saved, found)
    leaves = jax.tree.leaves(restored.opt_state)
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16", "float64", "int32"}
    with pytest.raises(ConfigError, match="mu"):
        Checkpoints(tmp_path, stepper_of("1 2 2").manager).restore()


def test_divided_state_moves_to_whole_and_back(tmp_path):
    split = SplitConfig(2, 1, 1, 2, bucket_factors=())
    model = MODEL | {"num_experts": 8}

    def manager_of(is_sharded):
        config = support.small_config(split, 2, **model)
        config.optimizer.sharded = is_sharded
        return support.make_stepper(config.validate()).manager

    whole, divided = manager_of(False), manager_of(True)
    state = whole.init(0)
    draw = np.random.default_rng(0).standard_normal
    state.opt_state = jax.tree.map(
        lambda x: jax.device_put(jnp.asarray(draw(x.shape), x.dtype), x.sharding), state.opt_state
    )
    expected = logical(whole, state.masters)
    for number, (here, there) in enumerate([(whole, divided), (divided, whole)]):
        directory = tmp_path / str(number)
        checkpoints = Checkpoints(directory, here)
        checkpoints.save(state, EXTRA)
        checkpoints.wait()
        state, _ = Checkpoints(directory, there).restore()
        jax.tree.map(np.testing.assert_array_equal, logical(there, state.masters), expected)
        rows = there.with_compute_copies(0, state.params, state.opt_state, state.router_bias).rows
        np.testing.assert_array_equal(rows, state.rows)
    np.testing.assert_array_equal(state.rows, whole.init(0).rows)


def test_a_run_that_moves_at_every_step(run, tmp_path):
    """From the twin to one device and to other devices, each saving what the next restores."""
    directory = run.directory
    for step, name in zip(range(2, 5), ("co-located", "one device", "1 2 2"), strict=True):
        stepper = stepper_of(name)
        state, _ = Checkpoints(directory, stepper.manager).restore(step)
        state, metrics = stepper.train_step(state, sequences(step))
        if step < 4:
            assert support.relative_error(metrics["total_loss"], run.losses[step - 2]) < 1e-12
        checkpoints = Checkpoints(tmp_path, stepper.manager)
        checkpoints.save(state, EXTRA)
        checkpoints.wait()
        directory = tmp_path
    stayed, moved = stepper_of("2 1 3"), logical(stepper.manager, state.masters)
    state, _ = Checkpoints(run.directory, stayed.manager).restore(2)
    for step in range(2, 5):
        state, _ = stayed.train_step(state, sequences(step))
    errors = jax.tree.map(support.relative_error, moved, logical(stayed.manager, state.masters))
    assert max(jax.tree.leaves(errors)) < 1e-10, errors


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_reading_without_a_split(dtype, run):
    saved = SavedCheckpoint.open(run.directory)
    assert (saved.step, saved.extra, saved.path) == (2, EXTRA, run.directory / "2")
    assert saved.written.tzinfo is not None
    params = jax.tree.map(lambda x: x.astype(dtype or x.dtype), run.masters["params"])
    jax.tree.map(np.testing.assert_array_equal, saved.params(dtype), params)
    np.testing.assert_array_equal(saved.router_bias(), run.masters["router_bias"])
    moment = saved.leaves["opt_state.expert.0.mu.experts.gate"]
    assert (moment.shape, moment.dtype) == ((5, 7, 16, 12), np.float64)


@pytest.fixture(scope="module")
def small():
    """A manager of the smallest split, and a state for it."""
    stepper = make_stepper(SplitConfig(), 1, num_layers=1, num_experts=2)
    return stepper.manager, stepper.init(0)


def save_steps(checkpoints: Checkpoints, state, steps):
    for step in steps:
        checkpoints.save(dataclasses.replace(state, step=step), {})


@pytest.mark.parametrize("keep_every, kept", [(0, [4, 5]), (3, [3, 4, 5])])
def test_retention(keep_every, kept, small, tmp_path):
    manager, state = small
    checkpoints = Checkpoints(tmp_path, manager, keep_last=2, keep_every=keep_every)
    save_steps(checkpoints, state, range(1, 6))
    assert checkpoints.steps() == kept
    checkpoints.close()
    assert Checkpoints(tmp_path, manager).steps() == kept


def test_a_fresh_state(small, tmp_path):
    """Its moments are zero, and a chunk of zeros must not pass for a missing one."""
    manager, state = small
    checkpoints = Checkpoints(tmp_path, manager)
    checkpoints.save(state, {})
    restored, _ = checkpoints.restore()
    expected = logical(manager, state.masters)
    jax.tree.map(np.testing.assert_array_equal, logical(manager, restored.masters), expected)
    np.testing.assert_array_equal(restored.rows, state.rows)


def test_steps_go_forward(small, tmp_path):
    manager, state = small
    checkpoints = Checkpoints(tmp_path, manager)
    save_steps(checkpoints, state, [4])
    for step in (3, 4):
        with pytest.raises(ConfigError, match=f"step = {step} must be after .* of step 4"):
            save_steps(checkpoints, state, [step])


def test_another_course_after_an_older_step(small, tmp_path):
    """The later checkpoints stay until the new course has something to save."""
    manager, state = small
    save_steps(first := Checkpoints(tmp_path, manager), state, [2, 4, 6])
    first.close()
    again = Checkpoints(tmp_path, manager)
    restored, _ = again.restore(2)
    assert again.steps() == [2, 4, 6]
    save_steps(again, restored, [3])
    assert again.steps() == [2, 3]
    save_steps(again, restored, [4])
    assert again.steps() == [2, 3, 4]


def test_a_failed_write_is_reported_and_leaves_the_others(small, tmp_path, monkeypatch):
    manager, state = small
    checkpoints = Checkpoints(tmp_path, manager, keep_last=1)
    save_steps(checkpoints, state, [1])
    checkpoints.wait()

    async def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(leaf_arrays, "write_leaf", fail)
        save_steps(checkpoints, state, [2])
        with pytest.raises(SaveFailedError, match=r"of step 2 could not be saved: disk full"):
            checkpoints.wait()
    assert checkpoints.steps() == [1]
    assert len(list(tmp_path.iterdir())) == 2
    checkpoints._check_writable()
    assert [path.name for path in tmp_path.iterdir()] == ["1"], "its space is free again"
    save_steps(checkpoints, state, [3])
    assert checkpoints.steps() == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["3"], "the broken one is cleaned up"
    checkpoints.close()


def test_no_checkpoint(small, tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path} must hold a checkpoint"):
        Checkpoints(tmp_path, small[0]).restore()
    with pytest.raises(ConfigError, match="none must hold a checkpoint"):
        SavedCheckpoint.open(tmp_path / "none")


def test_directories_of_other_names_are_no_checkpoints(small, tmp_path):
    manager, state = small
    save_steps(first := Checkpoints(tmp_path, manager), state, [3])
    first.close()
    for name in ("-5", "3 copy", "04", "4.orbax-checkpoint-tmp", "\N{ARABIC-INDIC DIGIT NINE}"):
        (tmp_path / name).mkdir()
    (tmp_path / "7").write_text("a file")
    shutil.copytree(tmp_path / "3", tmp_path / "6")
    again = Checkpoints(tmp_path, manager)
    restored, _ = again.restore()
    assert restored.step == 3
    (copy,) = again.damage
    assert copy.endswith("cannot be read: its metadata must say step 6, not 3")
    save_steps(again, restored, [4])
    assert again.steps() == [3, 4]


def test_one_is_always_kept(small, tmp_path):
    with pytest.raises(ConfigError, match="keep_last = 0 must be"):
        Checkpoints(tmp_path, small[0], keep_last=0)


def test_a_missing_step_lists_those_that_are_there(small, tmp_path):
    manager, state = small
    checkpoints = Checkpoints(tmp_path, manager)
    save_steps(checkpoints, state, [3, 5])
    with pytest.raises(ConfigError, match=r"step = 4 must be one of .*: 3, 5$"):
        checkpoints.restore(4)
    with pytest.raises(ConfigError, match=r"step = 4 must be one of .*: 3, 5$"):
        SavedCheckpoint.open(tmp_path, 4)


@pytest.mark.parametrize(
    "model, message",
    [
        (
            {"expert_width": 20},
            r"experts.down is float64\[5, 7, 12, 16\], the model's is float64\[5, 7, 20, 16\]$",
        ),
        ({"num_layers": 6}, r"is float64\[5, .*, the model's is float64\[6, "),
        ({"num_shared_experts": 0}, r"shared_experts.down is .*, the model's is absent$"),
    ],
)
def test_another_model(model, message, run):
    manager = make_stepper(*SAVED_FROM, **model).manager
    with pytest.raises(ConfigError, match=message):
        Checkpoints(run.directory, manager).restore()


def remove(file: pathlib.Path):
    file.unlink()


def shorten(file: pathlib.Path):
    file.write_bytes(file.read_bytes()[:-9])


def flip_a_bit(file: pathlib.Path):
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)


CHUNK = "arrays/params.attention.attention.query/c/0/0/0/0"


@pytest.mark.parametrize(
    "file, damage",
    [
        (CHUNK, remove),
        (CHUNK, shorten),
        (CHUNK, flip_a_bit),
        ("arrays/opt_state.expert.0.count/c", remove),
        ("arrays/router_bias/zarr.json", remove),
        ("_CHECKPOINT_METADATA", shorten),
    ],
)
def test_damage(file, damage, small, tmp_path):
    manager, state = small
    checkpoints = Checkpoints(tmp_path, manager)
    save_steps(checkpoints, state, [1])
    checkpoints.wait()
    damage(tmp_path / "1" / file)
    message = r"checkpoint of step 1 .* cannot be read"
    with pytest.raises(UnreadableCheckpointError, match=message):
        checkpoints.restore()
    if "opt_state" not in file:
        with pytest.raises(UnreadableCheckpointError, match=message):
            saved = SavedCheckpoint.open(tmp_path)
            saved.params(), saved.router_bias()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(small, tmp_path):
    manager, state = small
    checkpoints = Checkpoints(tmp_path, manager)
    save_steps(checkpoints, state, [1, 2, 3])
    checkpoints.close()
    flip_a_bit(tmp_path / "3" / CHUNK)
    shorten(tmp_path / "2" / CHUNK)
    again = Checkpoints(tmp_path, manager)
    restored, _ = again.restore()
    assert restored.step == again.last_good == 1
    for step, sentence in zip((3, 2), again.damage, strict=True):
        assert f"the checkpoint of step {step} in {tmp_path} cannot be read" in sentence
    with pytest.raises(UnreadableCheckpointError, match=r"of step 3 .* cannot be read"):
        again.restore(3)
    again.restore()
    save_steps(again, restored, [2])
    assert again.steps() == [1, 2], "the damaged ones have gone with the course they were of"
    flip_a_bit(tmp_path / "1" / CHUNK), flip_a_bit(tmp_path / "2" / CHUNK)
    with pytest.raises(UnreadableCheckpointError, match=r"of step 2 .*; .* of step 1 "):
        again.restore()
