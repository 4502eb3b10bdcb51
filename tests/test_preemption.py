"""A run that is told to stop ends its step, saves, exits with 0, and goes on from there."""

import os
import pathlib
import signal
import time

import pytest

from disag_jax import training
from disag_jax.config import ConfigError
from disag_jax.preemption import StopRequest
from disag_jax.saved_checkpoint import saved_steps
from disag_jax.step import Stepper
from tests import launching, support
from tests.launching import PAIR, TIMEOUT_SECONDS, finish, read_records

# From SIGTERM to the end: a second until all know of it, some steps, and the save. It takes about
# three on an idle machine.
STOP_SECONDS = 30


@pytest.fixture
def config_file(tmp_path):
    return launching.write_config(tmp_path)


@pytest.mark.timeout(2 * TIMEOUT_SECONDS)
def test_sigterm_to_one_of_two_processes_stops_both_at_one_step(config_file, tmp_path):
    """Checkpoints are off: this one is written all the same."""
    workdir = tmp_path / "run"
    arguments = (*PAIR, "--config.run.checkpoint_every=0")
    endless = (*arguments, "--config.run.num_steps=100000")
    running = launching.start_all(config_file, workdir, 2, *endless, devices=2)
    launching.wait_for_step(workdir, 3, running)
    running[1].send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    for out, error, code in finish(running):
        assert code == 0, (out[-2000:], error[-4000:])
    took = time.monotonic() - signalled
    print(f"from SIGTERM to the end of both: {took:.1f} s")
    assert took < STOP_SECONDS
    (step,) = saved_steps(workdir / "checkpoints")
    first = read_records(workdir)
    assert [record["step"] for record in first if "loss" in record] == list(range(1, step + 1))
    more = (*endless, "--resume", f"--stop_after={step + 2}")
    again = launching.launch(config_file, workdir, 2, *more, devices=2)[len(first) :]
    assert [record["step"] for record in again if "loss" in record] == [step + 1, step + 2]


def test_sigterm_after_the_last_step_does_not_lose_it(small_run, monkeypatch):
    config, workdir = small_run
    support.make_plain(config)
    config.run.num_steps, config.run.eval_every, evaluate = 2, 0, Stepper.evaluate

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(Stepper, "evaluate", signalled)
    assert training.train(config, workdir)["step"] == 2
    assert saved_steps(pathlib.Path(workdir, "checkpoints")) == [2]


def test_sigterm_to_a_single_process(small_run, monkeypatch):
    config, workdir = small_run
    train_step = Stepper.train_step

    def signalled_in_step_3(self, state, batch):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, state, batch)

    monkeypatch.setattr(Stepper, "train_step", signalled_in_step_3)
    handler = signal.getsignal(signal.SIGTERM)
    assert training.train(config, workdir) is None
    assert signal.getsignal(signal.SIGTERM) is handler
    assert saved_steps(pathlib.Path(workdir, "checkpoints")) == [2, 3]
    with pytest.raises(ConfigError, match="--stop_after = 3 must be after the start, step 3"):
        training.train(config, workdir, resume=True, stop_after=3)


def test_a_run_that_cannot_stop_yet_is_told_again():
    stop = StopRequest(stop_after=3)
    assert [stop.reached(step) for step in (2, 3, 4)] == [False, True, True]
