"""Slow workers, slow hosts and slow steps are noticed and named."""

import dataclasses
import signal
import time

import pytest

from disag_jax.config import SplitConfig
from disag_jax.stragglers import (
    ENOUGH_RECORDS,
    LEAST_STEPS,
    SLOW_SAMPLES,
    Stragglers,
    slow_hosts,
)
from tests import launching, support
from tests.launching import PAIR, TIMEOUT_SECONDS

# train.py, but in process 1 the disk is slow: each batch takes a fifth of a second.
SLOW_INPUT = """
import runpy, sys, time
sys.path.insert(0, ".")
if "--process_id=1" in sys.argv:
    from disag_jax import batches
    rows = batches.Batches.rows
    def slowly(*args):
        time.sleep(0.2)
        return rows(*args)
    batches.Batches.rows = slowly
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_a_process_with_a_slow_disk_is_named(tmp_path):
    config_file, workdir = launching.write_config(tmp_path), tmp_path / "run"
    (tmp_path / "slow.py").write_text(SLOW_INPUT)
    # Process 1 reads only if it has an attention worker.
    arguments = ("--config.split.placement=colocated", "--config.split.attention_workers=2")
    arguments += ("--config.run.log_every=3", "--config.run.num_steps=6")
    arguments += ("--config.run.checkpoint_every=0", "--config.data.prefetch_steps=0")
    # Two cores are no H100: its prediction is exceeded.
    arguments += ("--config.run.compute_dtype=bfloat16", "--hardware=h100")
    running = launching.start_all(
        config_file, workdir, 2, *PAIR, *arguments, devices=2, script=str(tmp_path / "slow.py")
    )
    (out, error, code), _ = launching.finish(running)
    assert code == 0, error[-3000:]
    assert "warning: step 6: process 1 is slow: its host takes 0.2" in out, out
    assert "process 0 is slow" not in out
    record = [r for r in launching.read_records(workdir) if "host_seconds_of" in r][-1]
    assert f"times the {record['expected_step_seconds']:.3g} s that were expected" in out, out
    assert record["host_seconds_of"]["process1"] > 0.15 > record["host_seconds_of"]["process0"]


# train.py, but the device of process 1 has fifty times the work in every sample.
SLOW_DEVICE = """
import runpy, sys
sys.path.insert(0, ".")
if "--process_id=1" in sys.argv:
    from disag_jax import stragglers
    seconds = stragglers._seconds
    def fifty_times(function, argument):
        return seconds(lambda argument: [function(argument) for _ in range(50)], argument)
    stragglers._seconds = fifty_times
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_a_process_with_a_slow_device_is_named(tmp_path):
    """By the worker that it holds: the times are measured, gathered and compared as in any run."""
    config_file, workdir = launching.write_config(tmp_path), tmp_path / "run"
    (tmp_path / "slow.py").write_text(SLOW_DEVICE)
    num_steps = LEAST_STEPS * SLOW_SAMPLES
    arguments = (f"--config.run.log_every={LEAST_STEPS}", f"--config.run.num_steps={num_steps}")
    arguments += ("--config.run.checkpoint_every=0",)
    running = launching.start_all(
        config_file, workdir, 2, *PAIR, *arguments, devices=2, script=str(tmp_path / "slow.py")
    )
    (out, error, code), _ = launching.finish(running)
    assert code == 0, error[-3000:]
    samples = [r["worker_milliseconds"] for r in launching.read_records(workdir) if "loss" in r]
    print(samples)
    assert f"warning: step {num_steps}: replica0_stage0_expert0 is slow: it took " in out, samples
    assert f" ms, {SLOW_SAMPLES} times in a row" in out
    assert "attention0 is slow" not in out


@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT_SECONDS)
def test_a_process_that_is_stopped_again_and_again_shows_as_slow_steps(tmp_path):
    """Its name is not promised: samples fit between two stops, and hosts are equally slow."""
    config_file, workdir = launching.write_config(tmp_path), tmp_path / "run"
    arguments = (f"--config.run.log_every={LEAST_STEPS}", "--config.run.num_steps=100000")
    arguments += ("--config.run.checkpoint_every=0",)
    running = launching.start_all(config_file, workdir, 2, *PAIR, *arguments, devices=2)
    # Enough records that the median stays that of steps without stops.
    usual = LEAST_STEPS * (ENOUGH_RECORDS + 4)
    launching.wait_for_step(workdir, usual, running)
    deadline = time.monotonic() + TIMEOUT_SECONDS / 2
    while not any(r["step"] >= usual + 4 * LEAST_STEPS for r in launching.read_records(workdir)):
        assert time.monotonic() < deadline
        running[1].send_signal(signal.SIGSTOP)
        time.sleep(0.4)
        running[1].send_signal(signal.SIGCONT)
        time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)
    (out, error, code), _ = launching.finish(running)
    assert code == 0, error[-3000:]
    # All of these steps were under the stops.
    stopped = range(usual + 2 * LEAST_STEPS, usual + 4 * LEAST_STEPS + 1)
    records = [r for r in launching.read_records(workdir) if r["step"] in stopped]
    times_expected = [f"{r['step_seconds'] / r['expected_step_seconds']:.1f}" for r in records]
    print(f"steps took {', '.join(times_expected)} times the expected")
    for record in records:
        expected = record["expected_step_seconds"]
        assert f"warning: step {record['step']}: a step took " in out, out
        assert f" times the {expected:.3g} s that were expected" in out, out


@pytest.mark.parametrize(
    "hosts, step_seconds, slow",
    [
        ([0.1], 0.2, []),
        ([0.01, 0.02], 1.0, []),
        ([0.01, 0.5], 1.0, [1]),
        ([0.01, 0.01, 0.02, 0.6], 1.0, [3]),
        ([0.5, 0.5, 0.5], 1.0, []),
    ],
)
def test_a_slow_host_counts_by_what_it_costs_a_step(hosts, step_seconds, slow):
    warnings = slow_hosts(hosts, step_seconds, factor=1.5)
    assert [int(warning.split()[1]) for warning in warnings] == slow


@pytest.fixture(scope="module")
def stepper():
    return support.make_stepper(support.small_config(SplitConfig(expert_workers=2), 1))


def record_of(step_seconds, **more):
    return {"step_seconds": step_seconds, "input_wait_seconds": 0.0, "host_seconds": 0.0, **more}


def test_every_worker_is_sampled(stepper):
    fields, _ = Stragglers(stepper.config, stepper.meshes).sample(record_of(1.0))
    names = ["replica0_stage0_attention0", "replica0_stage0_expert0", "replica0_stage0_expert1"]
    assert list(fields["worker_milliseconds"]) == names
    assert min(fields["worker_milliseconds"].values()) > 0


@pytest.mark.parametrize("log_every, due", [(1, [10, 20]), (4, [3, 6]), (10, [1, 2]), (50, [1, 2])])
def test_samples_are_ten_steps_apart_or_more(stepper, log_every, due):
    config = dataclasses.replace(
        stepper.config, run=dataclasses.replace(stepper.config.run, log_every=log_every)
    )
    watch = Stragglers(config, stepper.meshes)
    assert [n for n in range(1, due[-1] + 1) if watch.is_due()] == due


def test_a_worker_that_stays_slow_is_named(stepper, monkeypatch):
    watch = Stragglers(stepper.config, stepper.meshes)
    times = {"attention0": 1.0, "expert0": 1.1, "expert1": 1.7}

    def warnings():
        monkeypatch.setattr(watch, "_gather", lambda _: (times, [0.0]))
        return watch.sample(record_of(1.0))[1]

    assert [warnings(), warnings()] == [[], []]
    times["expert1"] = 1.0  # something else was on its host
    assert warnings() == []
    times["expert1"] = 1.7
    assert [warnings() for _ in range(4)] == [
        [],
        [],
        ["expert1 is slow: it took 1.7 ms for what takes the others 1.1 ms, 3 times in a row"],
        [],
    ]


def slow_steps(watch: Stragglers, *records):
    return [[w for w in watch.sample(r)[1] if w.startswith("a step")] for r in records]


def test_a_step_slower_than_the_median_of_the_run_is_reported(stepper):
    watch = Stragglers(stepper.config, stepper.meshes)
    compiling = record_of(9.0, compile_seconds=9.0)
    usual = [record_of(1.0 + i / 10) for i in range(3)]
    assert slow_steps(watch, compiling, *usual, record_of(1.6)) == [[]] * 5
    assert slow_steps(watch, record_of(2.2)) == [
        ["a step took 2.2 s, 1.9 times the 1.15 s that were expected"]
    ]


def test_a_prediction_takes_the_place_of_the_median(stepper):
    watch = Stragglers(stepper.config, stepper.meshes, predicted_step_seconds=0.5)
    assert slow_steps(watch, record_of(0.7), record_of(0.8)) == [
        [],
        ["a step took 0.8 s, 1.6 times the 0.5 s that were expected"],
    ]
