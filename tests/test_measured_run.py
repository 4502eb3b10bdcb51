"""What is read of a run that was measured: the steps that count, and why it failed."""

import json
import sys

import pytest

from disag_jax import launch, measured_run, memory, trace
from disag_jax.config import ConfigError, SplitConfig
from disag_jax.errors import RunError
from disag_jax.measured_run import DoesNotFit, Runner, measure
from tests import support


@pytest.fixture
def config():
    return support.small_config(SplitConfig(attention_workers=1, expert_workers=3), 4)


def logged(workdir, seconds: list[float], compiling: list[int] = ()):
    """A workdir in which steps of these seconds are logged, of which some compiled."""
    records = [
        {"step": n, "loss": 1.0, "step_seconds": s, "tokens_per_second": 1.0}
        | ({"compile_seconds": s} if n in compiling else {})
        for n, s in enumerate(seconds, 1)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return workdir


def test_steps_that_compile_do_not_count(config, tmp_path):
    workdir = logged(tmp_path, [60, 60, 2, 50, 4, 6], compiling=[1, 4])
    found = measure(config, workdir, 6, has_trace=False)
    assert found.step_seconds == 4
    assert found.tokens_per_second == config.tokens_per_step / 4
    flops = measured_run.flops_per_device(config, found.tokens_per_second)
    assert found.tflops_per_device == flops / 1e12


def test_too_few_steps_that_count_are_an_error(config, tmp_path):
    workdir = logged(tmp_path, [60, 60, 2, 50, 50, 50], compiling=[1, 4, 5, 6])
    with pytest.raises(RunError, match=r"1 of the steps 3 to 6 compiled nothing, and 2 at least"):
        measure(config, workdir, 6, has_trace=False)
    with pytest.raises(RunError, match=r"6 of 7 steps were trained"):
        measure(config, workdir, 7, has_trace=False)


@pytest.mark.parametrize("compiling", [[1], [1, 6]])
def test_a_trace_of_compiling_is_not_used(config, tmp_path, monkeypatch, compiling):
    times = {"gpu": trace.DeviceTime(span=2.0, compute=1.0, communication=1.0, exposed=0.5)}
    monkeypatch.setattr(trace, "device_times", lambda workdir: times)
    workdir = logged(tmp_path, [60, 60, 2, 4, 9, 9], compiling)
    found = measure(config, workdir, 6, has_trace=True)
    assert found.step_seconds == 3
    assert found.exposed_share == ({"gpu": 0.25} if compiling == [1] else {})


def test_simulated_devices_are_not_traced(config, tmp_path):
    for cpu_devices in (0, 8):
        command = Runner(tmp_path, cpu_devices, "default")._command(config, tmp_path / "x", 6)
        assert ("--profile_steps=4:6" in command) == (cpu_devices == 0)


def test_why_a_run_failed(config, tmp_path, monkeypatch):
    def fail(sentence, code):
        script = f"import sys; print({sentence!r}, file=sys.stderr); sys.exit({code})"
        monkeypatch.setattr(launch, "train_command", lambda *args: [sys.executable, "-c", script])
        with pytest.raises((ConfigError, RunError), match="one: ") as caught:
            Runner(tmp_path, 8, "default").run(config, "one", 6)
        return caught.type

    with pytest.raises(ConfigError) as refusal:
        memory.check({"worker": 2}, {"worker": 1})
    assert fail(f"error: {refusal.value}", 2) is DoesNotFit
    assert fail("error: split = 4 devices must equal the 3 cpu devices here", 2) is ConfigError
    assert fail("Killed", 1) is RunError
