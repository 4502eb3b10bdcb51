"""Runs that are killed at any moment, and disks that fail under them."""

import functools
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import time

import pytest

from disag_jax import training
from disag_jax.checkpoint import UNFINISHED
from disag_jax.errors import RunError
from disag_jax.saved_checkpoint import SavedCheckpoint, saved_steps
from disag_jax.step import Stepper
from tests import launching, support
from tests.launching import PAIR, TIMEOUT_SECONDS, read_records

# A save at every step, so that most kills hit one.
KILLED = (*PAIR, "--config.run.checkpoint_every=1", "--config.run.num_steps=100000")
# How long a run goes on after its first step until it is killed.
LONGEST_RUN_SECONDS = 1.5


def train_and_kill(config_file, workdir, seconds: float, *arguments):
    """Starts a run and kills it that long after its first record."""
    written = len(read_records(workdir))
    (process,) = launching.start_all(config_file, workdir, 1, *KILLED, *arguments, devices=2)
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(read_records(workdir)) == written:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finally:
        process.kill()


@pytest.mark.timeout(20 * TIMEOUT_SECONDS)
@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_from_the_newest_complete_checkpoint(tmp_path, num_kills):
    config_file, workdir, rng = launching.write_config(tmp_path), tmp_path / "run", random.Random(7)
    resume, newest, unfinished = (), 0, 0
    for _ in range(num_kills):
        written = len(read_records(workdir))
        train_and_kill(config_file, workdir, rng.uniform(0, LONGEST_RUN_SECONDS), *resume)
        steps = [r["step"] for r in read_records(workdir)[written:] if "loss" in r]
        assert steps[0] == newest + 1, "it began after the newest checkpoint"
        # A machine that is busy may not end the first save before the first kill.
        newest = max(saved_steps(workdir / "checkpoints"), default=0)
        unfinished += any((workdir / "checkpoints").glob(f"*{UNFINISHED}"))
        # One save at a time is under way, and a step of training beside it.
        assert steps[-1] - newest <= 2, (steps[-1], newest)
        if newest:
            SavedCheckpoint.open(workdir / "checkpoints").params()
        resume = ("--resume",)
    print(f"{unfinished} of {num_kills} kills left an unfinished save")
    assert unfinished or num_kills < 20, "saves take longer than steps: most kills hit one"
    # Up to where the last kill had got.
    last = (*KILLED, "--resume", f"--stop_after={newest + 2}")
    killed = launching.launch(config_file, workdir, 1, *last, devices=2)
    whole = (*KILLED, f"--stop_after={newest + 2}", "--config.run.checkpoint_every=0")
    expected = launching.launch(config_file, tmp_path / "whole", 1, *whole, devices=2)
    loss_of = {record["step"]: record["loss"] for record in expected if "loss" in record}
    assert len(loss_of) == newest + 2
    for record in killed:
        if "loss" in record:
            assert record["loss"] == loss_of[record["step"]], record["step"]


@pytest.fixture
def small_file_limit():
    """A function that sets how large a file may become, in bytes: the stand-in for a full disk.

    Beyond it the kernel refuses to write with EFBIG, in the middle of a write as ENOSPC would.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def at_step(monkeypatch, actions: dict):
    """Calls `actions[step]()` when the training step after `step` begins."""
    train_step = Stepper.train_step

    def act_and_train(self, state, batch):
        actions.get(state.step, lambda: None)()
        return train_step(self, state, batch)

    monkeypatch.setattr(Stepper, "train_step", act_and_train)


def wait_for_checkpoint(workdir, step):
    while step not in saved_steps(pathlib.Path(workdir, "checkpoints")):
        time.sleep(0.01)


def test_a_full_disk_costs_checkpoints_and_not_the_run(
    small_run, monkeypatch, capsys, small_file_limit
):
    config, workdir = small_run
    config.run.eval_every = 0

    def fill_the_disk():
        wait_for_checkpoint(workdir, 2)
        small_file_limit(1000)

    # The checkpoint of step 4 fails, that of step 6 does not.
    empty_the_disk = functools.partial(small_file_limit, resource.RLIM_INFINITY)
    at_step(monkeypatch, {3: fill_the_disk, 5: empty_the_disk})
    training.train(config, workdir)
    printed = capsys.readouterr().out
    assert "warning: the checkpoint of step 4 could not be saved: " in printed
    assert "warning: the record of step 4 is lost: [Errno 27] File too large" in printed
    assert saved_steps(pathlib.Path(workdir, "checkpoints")) == [2, 6]
    assert "orbax-checkpoint-tmp" not in str(list(pathlib.Path(workdir, "checkpoints").iterdir()))


def test_a_checkpoint_directory_that_cannot_be_written_for_a_while(small_run, monkeypatch, capsys):
    """A file in its place is what even root cannot write to."""
    config, workdir = small_run
    support.make_plain(config)
    config.run.eval_every = 0
    checkpoints, away = pathlib.Path(workdir, "checkpoints"), pathlib.Path(workdir, "away")

    def replace():
        wait_for_checkpoint(workdir, 2)
        checkpoints.rename(away)
        checkpoints.touch()

    def put_back():
        checkpoints.unlink()
        away.rename(checkpoints)

    at_step(monkeypatch, {3: replace, 5: put_back})
    training.train(config, workdir)
    printed = capsys.readouterr().out
    assert "warning: the checkpoint of step 4 could not be saved: [Errno 20] Not a dir" in printed
    assert "is lost" not in printed, "the records are written beside it"
    assert saved_steps(checkpoints) == [2, 6]
    SavedCheckpoint.open(checkpoints, 2).params()


def test_a_vanished_workdir_stops_the_run_after_some_checkpoints(small_run, monkeypatch, capsys):
    config, workdir = small_run
    config.run.checkpoint_every, config.run.max_failed_checkpoints = 1, 2
    config.run.eval_every = 0
    away = f"{workdir}-away"

    def take_away():
        wait_for_checkpoint(workdir, 2)
        os.rename(workdir, away)

    at_step(monkeypatch, {2: take_away})
    with pytest.raises(
        RunError,
        match=r"max_failed_checkpoints = 2 in a row could not be saved; the last good .* of step 2",
    ):
        training.train(config, workdir)
    printed = capsys.readouterr().out
    for step in (3, 4):
        assert f"warning: the checkpoint of step {step} could not be saved: " in printed
        assert f"warning: the record of step {step} is lost: " in printed
    assert not os.path.exists(workdir), "nothing is written where a file system was mounted"
    SavedCheckpoint.open(f"{away}/checkpoints", 2).params()


def test_a_last_checkpoint_that_fails_is_an_error(small_run, monkeypatch):
    config, workdir = small_run
    config.run.checkpoint_every, config.run.eval_every = 6, 0
    at_step(monkeypatch, {5: lambda: shutil.rmtree(f"{workdir}/checkpoints")})
    message = "the last checkpoint could not be saved; there is no checkpoint yet"
    with pytest.raises(RunError, match=message):
        training.train(config, workdir)


# train.py, but process 1 cannot write the checkpoint of step 4.
FAILING_DISK = """
import runpy, sys
sys.path.insert(0, ".")
if "--process_id=1" in sys.argv:
    from disag_jax import leaf_arrays
    write_leaf = leaf_arrays.write_leaf
    async def fail_at_step_4(root, *args):
        if "/4.orbax" in str(root):
            raise OSError("the disk of process 1 is full")
        await write_leaf(root, *args)
    leaf_arrays.write_leaf = fail_at_step_4
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.timeout(2 * TIMEOUT_SECONDS)
def test_a_fault_at_one_process_is_one_of_all(tmp_path):
    config_file, workdir = launching.write_config(tmp_path), tmp_path / "run"
    (tmp_path / "failing.py").write_text(FAILING_DISK)
    running = launching.start_all(
        config_file, workdir, 2, *PAIR, "--config.run.num_steps=6", devices=2,
        script=str(tmp_path / "failing.py"),
    )  # fmt: skip
    printed = ""
    for out, error, code in launching.finish(running):
        assert code == 0, (out[-2000:], error[-3000:])
        printed += out
    assert "of step 4 could not be saved: the disk of process 1 is full" in printed
    assert saved_steps(workdir / "checkpoints") == [2, 6]

    # Process 1 alone reads the experts; both go on from the checkpoint before.
    chunk = workdir / "checkpoints/6/arrays/params.expert.experts.gate/c/0/0/0/0"
    damaged = bytearray(chunk.read_bytes())
    damaged[40] ^= 1
    chunk.write_bytes(damaged)
    resumed = (*PAIR, "--config.run.num_steps=6", "--resume", "--stop_after=3")
    running = launching.start_all(config_file, workdir, 2, *resumed, devices=2)
    printed = ""
    for out, error, code in launching.finish(running):
        assert code == 0, (out[-2000:], error[-3000:])
        printed += out
    assert "warning: the checkpoint of step 6 in " in printed and "is passed over" in printed
    assert saved_steps(workdir / "checkpoints") == [2, 3]


@pytest.fixture
def mount(tmp_path):
    """A function that mounts a memory file system at a path, where that is permitted."""
    mounted = []

    def mount_at(path, options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount")
        mounted.append(str(path))

    yield mount_at
    for path in mounted:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.mark.slow
def test_a_disk_without_space(small_run, monkeypatch, capsys, mount):
    """ENOSPC from a real file system."""
    config, workdir = small_run
    config.run.eval_every = 0
    os.mkdir(workdir)
    mount(workdir, "size=64m")
    filler = pathlib.Path(workdir, "filler")

    def fill_the_disk():
        wait_for_checkpoint(workdir, 2)
        with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**20))

    at_step(monkeypatch, {3: fill_the_disk, 5: filler.unlink})
    training.train(config, workdir)
    assert "could not be saved: [Errno 28] No space left on device" in capsys.readouterr().out
    assert saved_steps(pathlib.Path(workdir, "checkpoints")) == [2, 6]


@pytest.mark.slow
def test_a_disk_that_becomes_read_only(small_run, monkeypatch, capsys, mount):
    config, workdir = small_run
    config.run.max_failed_checkpoints, config.run.eval_every = 2, 0

    def make_read_only():
        wait_for_checkpoint(workdir, 2)
        mount(f"{workdir}/checkpoints", "ro")

    at_step(monkeypatch, {3: make_read_only})
    with pytest.raises(RunError, match=r"= 2 in a row could not be saved; .* of step 2 in"):
        training.train(config, workdir)
    assert "could not be saved: [Errno 30] Read-only file system" in capsys.readouterr().out
