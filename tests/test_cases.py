"""Measuring cases: what is gone on with, what there is no time for, whose losses must agree."""

import dataclasses
import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from benchmarks import cases as cases_lib
from benchmarks.cases import Case
from configs import balanced
from disag_jax.bench_step import NothingTimed
from disag_jax.errors import ConfigError, RunError
from disag_jax.planner import hardware

H100 = hardware.load("h100")


def case(number):
    config = balanced.get_config()
    return Case(f"group {number // 2}", f"split {number}", "disaggregated", 1.0, 60.0, config)


@pytest.fixture
def measured(monkeypatch):
    """The names in the order in which they were compiled and measured; no device does anything."""
    done = []
    monkeypatch.setattr(cases_lib, "stepper_of", lambda one: f"stepper of {one.name}")

    def measure(one, stepper):
        assert stepper == f"stepper of {one.name}"
        done.append(one.name)
        return {"seconds": 0.5}

    monkeypatch.setattr(cases_lib, "measure", measure)
    return done


def test_every_case_is_measured_once_and_kept(measured, tmp_path):
    out, cases = tmp_path / "out.json", [case(number) for number in range(5)]
    first, late = cases_lib.run(cases[:3], out, seconds=60, threads=2, hardware=H100)
    assert (len(first), late) == (3, "")
    results, late = cases_lib.run(cases, out, seconds=60, threads=2, hardware=H100)
    assert measured == [f"split {number}" for number in range(5)] and late == ""
    assert results == json.loads(out.read_text())
    assert [r["name"] for r in results] == measured


def test_no_case_begins_when_time_is_over(measured, tmp_path, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(cases_lib.time, "perf_counter", lambda: next(now))
    cases, out = [case(number) for number in range(5)], tmp_path / "out.json"
    results, late = cases_lib.run(cases, out, seconds=5, threads=2, hardware=H100)
    assert 0 < len(results) < 5
    left = [one for one in cases if one.name not in measured]
    assert (
        late
        == "no time was left for "
        + "; ".join(f"{one.group}: {one.name}" for one in left)
        + ": go on with the same --out"
    )
    again, late = cases_lib.run(cases, out, seconds=1000, threads=2, hardware=H100)
    assert [r["name"] for r in again] == [one.name for one in cases] and late == ""


def test_a_text_that_is_too_short_is_found_before_anything_is_compiled(measured, tmp_path):
    long = case(1)
    long.config.batch.sequence_length = 10**9
    with pytest.raises(ConfigError, match="sequence_length"):
        cases_lib.run([case(0), long], tmp_path / "out.json", seconds=60, threads=2, hardware=H100)
    assert measured == []


def test_a_case_that_fails_is_said_and_the_others_are_measured(measured, tmp_path, monkeypatch):
    works = cases_lib.measure

    def measure(one, stepper):
        if one.name == "split 1":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nand more lines")
        return works(one, stepper)

    monkeypatch.setattr(cases_lib, "measure", measure)
    cases, out = [case(number) for number in range(3)], tmp_path / "out.json"
    results, missing = cases_lib.run(cases, out, seconds=60, threads=2, hardware=H100)
    assert [r["name"] for r in results] == ["split 0", "split 2"] == measured
    assert missing == "group 0: split 1 failed: RESOURCE_EXHAUSTED: 9 GiB"
    monkeypatch.setattr(cases_lib, "measure", works)
    results, missing = cases_lib.run(cases, out, seconds=60, threads=2, hardware=H100)
    assert len(results) == 3 and missing == ""


def test_a_case_that_does_not_end_ends_the_process_and_is_left_out_next_time(measured, tmp_path):
    out = tmp_path / "out.json"
    script = f"""
import pathlib, time
from benchmarks import cases
from tests.test_cases import H100, case
cases.CASE_SECONDS = 1
cases.stepper_of = lambda one: one.name
def measure(one, stepper):
    time.sleep(60 if one.name == "split 1" else 0)
    return {{"seconds": 0.5}}
cases.measure = measure
cases.run([case(number) for number in range(3)], pathlib.Path({str(out)!r}), 60, 1, H100)
"""
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 1 and "in measure" in found.stderr, found.stderr[-2000:]
    results, missing = cases_lib.run(
        [case(n) for n in range(3)], out, seconds=60, threads=1, hardware=H100
    )
    assert [r["name"] for r in results] == ["split 0", "split 2"] and measured == ["split 2"]
    assert missing == "group 0: split 1 did not end in an earlier run"
    # It is said again, and what there is stays.
    assert cases_lib.run([case(n) for n in range(3)], out, 60, 1, hardware=H100) == (
        results,
        missing,
    )


def test_steps_that_compile_are_not_timed(monkeypatch):
    steps = {"loss": 1.0, "expert_counts": np.ones((1, 4))}
    compiled = [True, False, True, False, False]
    stepper = types.SimpleNamespace(
        check_memory=lambda: None, manager=None, chooser=types.SimpleNamespace(current=None),
        compiled_program=lambda bucket: None,
    )  # fmt: skip
    monkeypatch.setattr(cases_lib, "needed_bytes", lambda manager, program: {"worker": 2**30})

    def run_steps(stepper, num_steps):
        return [60.0, 5.0, 60.0, 3.0, 5.0], [steps | {"compiled": one} for one in compiled]

    monkeypatch.setattr(cases_lib, "run_steps", run_steps)
    assert cases_lib.measure(case(0), stepper)["seconds"] == 4.0
    compiled[3:] = True, True
    with pytest.raises(NothingTimed, match="each of the 3 steps to be timed compiled"):
        cases_lib.measure(case(0), stepper)


def test_a_case_without_a_timed_step_is_said(measured, tmp_path, monkeypatch):
    def measure(one, stepper):
        raise NothingTimed("all compiled")

    monkeypatch.setattr(cases_lib, "measure", measure)
    _, missing = cases_lib.run([case(0)], tmp_path / "out.json", 60, 1, hardware=H100)
    assert missing == "group 0: split 0 failed: all compiled"


def test_results_of_something_else_are_not_gone_on_with(measured, tmp_path):
    out, cases = tmp_path / "out.json", [case(0), case(1)]
    kept, _ = cases_lib.run(cases, out, seconds=60, threads=2, hardware=H100)
    # Of other cases of the same devices and network they stay.
    assert cases_lib.run([case(2)], out, 60, 2, hardware=H100)[0][:2] == kept
    over_sockets = dataclasses.replace(H100, network="sockets")
    with pytest.raises(ConfigError, match=r"--out = .*network = 'default' must be 'sockets'; name"):
        cases_lib.run([case(3)], out, 60, 2, hardware=over_sockets)
    other = case(1)
    other.config.optimizer.peak_learning_rate = 1.0
    with pytest.raises(ConfigError, match="group 0, split 1: config = "):
        cases_lib.run([case(0), other], out, 60, 2, hardware=H100)
    assert measured == ["split 0", "split 1", "split 2"]


def test_what_is_measured_is_predicted_anew_for_other_hardware(measured, tmp_path):
    out = tmp_path / "out.json"
    cases_lib.run([case(0), case(1)], out, seconds=60, threads=2, hardware=H100)
    slower = dataclasses.replace(H100, product_efficiency=0.5)
    now = dataclasses.replace(case(0), predicted_seconds=2.0)
    (result,), _ = cases_lib.run([now], out, 60, 2, hardware=slower)
    assert result["seconds"] == 0.5 and result["predicted_seconds"] == 2.0
    assert result["predicted_tokens_per_second"] == now.config.tokens_per_step / 2.0
    # The other one's prediction is of the hardware before: kept in the file alone.
    names = [(kept["name"], kept["hardware"]) for kept in json.loads(out.read_text())]
    assert names[0] == ("split 0", result["hardware"]) and names[1][0] == "split 1"
    assert names[1][1] != result["hardware"]
    assert len(cases_lib.run([now, case(1)], out, 60, 2, hardware=slower)[0]) == 2
    assert measured == ["split 0", "split 1"]


def test_predictions_are_for_the_network_that_is_used():
    """On one host all devices are a node's, however few a profile knew."""
    pair = cases_lib.hardware_here("h100x2_nvlink", 8, "default")
    assert pair.devices_per_node == 8 and pair.intra_node
    with pytest.raises(ConfigError, match=r"network = 'default' must be --network = 'sockets'"):
        cases_lib.hardware_here("h100x2_nvlink", 2, "sockets")


def test_losses_are_compared_where_the_keys_are_equal():
    def result(name, key, losses):
        return {"name": name, "cell": key, "losses": losses}

    same = [result("a", 1, [2.0, 1.0]), result("b", 1, [2.0, 1.001]), result("c", 2, [7.0, 6.0])]
    assert cases_lib.differing_losses(same, 1e-2, "cell") == []
    assert cases_lib.differing_losses(same, 1e-4, "cell") == ["cell 1: losses of a and b differ"]
    broken = [same[0], result("b", 1, [2.0, float("nan")])]
    assert cases_lib.differing_losses(broken, 1e-2, "cell") == ["cell 1: losses of a and b differ"]


def test_what_is_wrong_ends_a_benchmark(capsys):
    cases_lib.conclude([], "", "all holds")
    assert capsys.readouterr().out == "all holds\n"
    with pytest.raises(RunError, match="this; that; no time"):
        cases_lib.conclude(["this", "that"], "no time", "all holds")


def test_a_bad_start_is_refused(tmp_path):
    config = balanced.get_config()
    with pytest.raises(ConfigError, match=r"--out = '.*' must be in a directory that exists"):
        cases_lib.check_start(config, str(tmp_path / "none" / "out.json"))
    assert cases_lib.check_start(config, str(tmp_path / "out.json")) > 1
    out = str(tmp_path / "out.json")
    assert cases_lib.check_start(config, out, 2) == 2
    for wanted in (1, len(jax.devices()) + 1):
        with pytest.raises(ConfigError, match=rf"devices = {wanted} must be from 2"):
            cases_lib.check_start(config, out, wanted)
