"""A lost, stopped, failed or stuck process ends the run, and is named."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import jax
import pytest

from disag_jax import processes, watchdog
from disag_jax.config import Config, RunConfig
from disag_jax.errors import RUN_ERROR, RunError
from disag_jax.saved_checkpoint import saved_steps
from disag_jax.watchdog import Watchdog
from tests import launching
from tests.launching import PAIR, TIMEOUT_SECONDS, finish

# Long enough for a busy machine to give a sign of life.
HEARTBEAT_SECONDS = 8
ENDLESS = (
    *PAIR,
    "--config.run.num_steps=100000",
    "--config.run.checkpoint_every=2",
    f"--config.run.heartbeat_timeout_seconds={HEARTBEAT_SECONDS}",
)


@pytest.mark.timeout(2 * TIMEOUT_SECONDS)
@pytest.mark.parametrize(
    "process, number",
    [
        (1, signal.SIGSTOP),
        (0, signal.SIGKILL),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_lost_process_is_named_and_the_run_can_go_on(tmp_path, process, number):
    config_file, workdir = launching.write_config(tmp_path), tmp_path / "run"
    running = launching.start_all(config_file, workdir, 2, *ENDLESS, devices=2)
    try:
        launching.wait_for_step(workdir, 5, running)
        running[process].send_signal(number)
        lost_at = time.monotonic()
        ((_, error, code),) = finish([running[1 - process]])
        took = time.monotonic() - lost_at
    finally:
        for each in running:
            each.kill()
            each.communicate()
    print(f"process {process}, {number.name}: the other ended after {took:.1f} s, code {code}")
    assert code != 0 and took < 2 * HEARTBEAT_SECONDS
    assert f"error: process {process} is lost" in error, error[-3000:]
    assert f"; the last good checkpoint is of step {read_step(error)} in {workdir}" in error
    newest = saved_steps(workdir / "checkpoints")[-1]
    assert newest - read_step(error) in (0, 2), "one more may have been under way"
    if (process, number) == (1, signal.SIGSTOP):
        more = (*ENDLESS, "--resume", f"--stop_after={newest + 1}")
        records = launching.launch(config_file, workdir, 2, *more, devices=2)
        assert records[-2]["step"] == newest + 1


def read_step(error: str) -> int:
    return int(error.partition("the last good checkpoint is of step ")[2].split()[0])


class Store:
    """As much of JAX's key-value store as is used."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, name, value, allow_overwrite):
        assert allow_overwrite
        self.values[name] = value

    def key_value_try_get(self, name):
        if name not in self.values:
            raise jax.errors.JaxRuntimeError("NOT_FOUND: no such key")
        return self.values[name]

    def key_value_dir_get(self, prefix):
        return [(n, value) for n, value in self.values.items() if n.startswith(f"{prefix}/")]


class Ended(Exception):
    """In place of the end of the process."""


@pytest.fixture
def run_of_two(monkeypatch):
    """Makes watchdogs of either process of a run of two, which share a store and end softly."""
    store, ends = Store(), []
    monkeypatch.setattr(processes, "key_value_store", lambda: store)
    monkeypatch.setattr(processes, "coordinator_address", lambda: ("127.0.0.1", 1))
    monkeypatch.setattr(watchdog.jax, "process_count", lambda: 2)
    monkeypatch.setattr(watchdog, "GRACE", 0.2)

    def make(process, **run):
        monkeypatch.setattr(watchdog.jax, "process_index", lambda: process)
        made = Watchdog(Config(run=RunConfig(**run)))
        # Threads call it, and so does the main thread at its end.
        monkeypatch.setattr(made, "_end", ends.append)
        return made

    return make, ends


def says(process, status):
    """Writes its sign by hand."""
    processes.key_value_store().key_value_set(
        f"watchdog/signs/{process}", json.dumps([1, status, "step 3"]), allow_overwrite=True
    )


def wait_for(ends, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not ends and time.monotonic() < deadline:
        time.sleep(0.01)
    return ends[0]


def test_a_process_that_never_begins_is_lost(run_of_two):
    make, ends = run_of_two
    with make(0, heartbeat_timeout_seconds=1):
        assert wait_for(ends).startswith("process 1 is lost")


def test_process_0_may_be_done_before_the_others(run_of_two):
    make, ends = run_of_two
    says(0, "done")
    with make(1, heartbeat_timeout_seconds=1):
        time.sleep(1.5)
    assert ends == []


def test_process_0_is_lost_where_it_does_not_answer(run_of_two):
    make, ends = run_of_two
    with make(1, heartbeat_timeout_seconds=1):
        assert wait_for(ends).startswith("process 0 is lost")


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_a_broken_connection_waits_for_the_name_of_the_lost_process(run_of_two, kind):
    make, ends = run_of_two
    with pytest.raises(kind), make(0, heartbeat_timeout_seconds=1):
        raise kind("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    assert ends[0].startswith("process 1 is lost")


def test_one_that_fails_alone_is_named_with_its_reason(run_of_two):
    make, ends = run_of_two
    with make(0, heartbeat_timeout_seconds=2):
        says(1, "the reason")
        assert wait_for(ends) == "process 1 failed: the reason"


def test_one_that_fails_alone_ends_itself(run_of_two):
    make, ends = run_of_two
    says(1, "running")
    with pytest.raises(RunError), make(0, heartbeat_timeout_seconds=5):
        raise RunError("mine alone")
    assert ends == ["mine alone"]


def test_a_failure_of_all_is_left_to_the_commands(run_of_two):
    make, ends = run_of_two
    says(1, "the same")
    with pytest.raises(RunError), make(0, heartbeat_timeout_seconds=100):
        raise RunError("the same")
    assert ends == []


def test_a_stuck_process_says_where(monkeypatch):
    ends = []
    stuck = Watchdog(Config(run=RunConfig(heartbeat_timeout_seconds=2, stall_timeout_seconds=1)))
    monkeypatch.setattr(stuck, "_end", ends.append)
    with stuck:
        stuck.at("step 7")
        sentence = wait_for(ends)
    assert sentence == (
        "nothing has moved for run.stall_timeout_seconds = 1: process 0 is at step 7"
    )


@pytest.mark.parametrize("standard_error", [subprocess.PIPE, "/dev/full"])
def test_ending_does_not_wait_for_the_main_thread(tmp_path, standard_error):
    """The real end, in a process of its own whose main thread sleeps."""
    program = (
        "import time\n"
        "from disag_jax.config import Config, RunConfig\n"
        "from disag_jax.watchdog import Watchdog\n"
        "run = RunConfig(heartbeat_timeout_seconds=2, stall_timeout_seconds=1)\n"
        "with Watchdog(Config(run=run)) as dog:\n"
        "    dog.last_good('the last good checkpoint is of step 4')\n"
        "    time.sleep(1000)\n"
    )
    with contextlib.ExitStack() as stack:
        if standard_error != subprocess.PIPE:
            standard_error = stack.enter_context(open(standard_error, "w"))
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=launching.REPOSITORY, stderr=standard_error, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == RUN_ERROR
    if done.stderr is not None:
        assert done.stderr.endswith("at the start; the last good checkpoint is of step 4\n")
