"""The benchmark command: every measurement on small shapes, its files, and what it says moved."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import types

import pytest

from disag_jax import bench, bench_step, bench_transfer, bench_units, timing
from disag_jax.config import ConfigError, Dtype, PlacementKind, SplitConfig
from disag_jax.timing import Figure, figure_of
from tests import launching, support

SPLITS = {
    "disaggregated": SplitConfig(stages=2, attention_workers=1, expert_workers=3),
    "colocated": SplitConfig(
        stages=2, attention_workers=4, expert_workers=4, placement=PlacementKind.COLOCATED
    ),
}


@pytest.fixture
def config(request, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {n}, {n * n}\n" for n in range(800)))
    config = support.small_config(SPLITS[request.param], 2, vocab_size=256, num_shared_experts=1)
    config.data.paths = (str(tmp_path / "text.txt"),)
    config.run.compute_dtype = Dtype.BFLOAT16
    return config


@pytest.mark.parametrize("config", SPLITS, indirect=True)
def test_every_measurement_runs_and_is_kept(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_transfer, "SLOT_MIB", (0.25, 1))
    wanted = {
        "units": ("attention forward", "expert backward", "loss, share of a worker"),
        "step": ("matrix product", "attention backward", "step"),
        "transfer": ("slots of 1 MiB",),
    }
    for what, names in wanted.items():
        path = str(tmp_path / f"{what}.json")
        bench.main(what, config, path, None, "h100" if what == "step" else None)
        figures = bench.read(path, what, config)
        assert all(figure.milliseconds > 0 for figure in figures)
        for name in names:
            assert any(name in figure.name for figure in figures), (name, figures)
        printed = capsys.readouterr().out
        assert names[0] in printed
        assert ("predicted for h100: " in printed) == (what == "step")
    with pytest.raises(ConfigError, match=r"step.json', what = 'step' must be 'units', as now"):
        bench.read(str(tmp_path / "step.json"), "units", config)
    config.run.log_every += 1  # no time depends on it
    bench.read(str(tmp_path / "step.json"), "step", config)
    config.optimizer.weight_decay += 1  # an optimizer's does not change a unit's
    bench.read(str(tmp_path / "units.json"), "units", config)
    with pytest.raises(ConfigError, match=r"config.optimizer.weight_decay = .* must be .*, as now"):
        bench.read(str(tmp_path / "step.json"), "step", config)
    config.optimizer.weight_decay -= 1
    config.batch.micro_batches += 1
    with pytest.raises(ConfigError, match=r"config.batch.micro_batches = 2 must be 3, as now"):
        bench.read(str(tmp_path / "step.json"), "step", config)


def test_a_prediction_stands_beside_steps_only():
    with pytest.raises(ConfigError, match=r"--hardware = 'h100' must stand with step, not units"):
        bench.main("units", support.small_config(SPLITS["disaggregated"]), None, None, "h100")


def test_figures_are_medians_with_their_spread():
    figure = figure_of("x", [0.010, 0.012, 0.011], floor_milliseconds=5.5)
    assert figure.milliseconds == pytest.approx(11)
    assert figure.noise == pytest.approx(2 / 11)
    assert figure.share_of_floor == pytest.approx(0.5)


def test_changes_are_beyond_the_noise_of_both():
    before = [Figure("a", 10, 0.05), Figure("b", 10, 0.01), Figure("gone", 1, 0)]
    now = [Figure("a", 11, 0.06), Figure("b", 9, 0.01), Figure("c", 1, 0)]
    assert bench.changes(before, now) == [
        "b: 10.000 -> 9.000 ms (-10.0%)", "c: new", "gone: not measured now",
    ]  # fmt: skip
    assert bench.changes(now, now) == []


@pytest.mark.parametrize("text", ["", "{}", '{"figures": [{"x": 1}]}', "[]"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"--compare = .* must be a file that --out wrote"):
        bench.read(str(path), "units", support.small_config(SPLITS["disaggregated"], 2))


def test_an_unknown_measurement_is_refused(tmp_path):
    config = support.small_config(SPLITS["disaggregated"], 2)
    with pytest.raises(ConfigError, match=r"'speed' must be one of units, step, transfer"):
        bench.main("speed", config, None, None)


def test_a_worker_that_has_nothing_to_exchange_is_not_timed():
    config = support.small_config(SplitConfig(placement=PlacementKind.COLOCATED))
    with pytest.raises(ConfigError, match=r"split.expert_workers = 1 must be greater than 1 with"):
        bench_transfer.measure(config)


def test_a_workers_own_slot_is_not_sent(monkeypatch):
    monkeypatch.setattr(bench_transfer, "SLOT_MIB", (1,))
    figure = Figure("x", 1.0, 0.0)
    monkeypatch.setattr(
        bench_transfer, "time_iterations",
        lambda name, _: dataclasses.replace(figure, name=name, extra={}),
    )  # fmt: skip
    apart = SplitConfig(stages=2, attention_workers=2, expert_workers=2)
    for split, sent in ((SPLITS["colocated"], 3), (apart, 2)):
        (found,) = bench_transfer.measure(support.small_config(split))
        rate = float(found.extra["a worker, each way"].split()[0])
        assert rate == pytest.approx(sent * 2**20 / 1e6, rel=5e-3)


def test_fields_that_an_old_file_lacks_have_their_defaults(tmp_path):
    config, path = support.small_config(SPLITS["disaggregated"], 2), tmp_path / "old.json"
    bench.write(str(path), "units", config, [Figure("a", 10, 0.05)])
    record = json.loads(path.read_text())
    assert config.split.loss_share is None
    del record["config"]["split"]["loss_share"]
    path.write_text(json.dumps(record))
    assert bench.read(str(path), "units", config) == [Figure("a", 10, 0.05)]


@pytest.mark.parametrize("milliseconds", ["0", "null", "NaN", '"x"'])
def test_a_figure_of_no_time_is_refused(tmp_path, milliseconds):
    config, path = support.small_config(SPLITS["disaggregated"], 2), tmp_path / "old.json"
    bench.write(str(path), "units", config, [Figure("a", 10, 0.05)])
    path.write_text(
        path.read_text().replace('"milliseconds": 10', f'"milliseconds": {milliseconds}')
    )
    with pytest.raises(ConfigError, match=r"--compare = .* must be a file that --out wrote"):
        bench.read(str(path), "units", config)


def test_what_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_units, "measure", lambda config: pytest.fail("measured"))
    config = support.small_config(SPLITS["disaggregated"], 2)
    with pytest.raises(ConfigError, match=r"--out = .* must be in a directory that exists"):
        bench.main("units", config, str(tmp_path / "none" / "x.json"), None)
    with pytest.raises(ConfigError, match=r"--out = .* must be a file"):
        bench.main("units", config, str(tmp_path), None)


def test_figures_that_cannot_be_written_leave_those_of_before(tmp_path, monkeypatch):
    config, path = support.small_config(SPLITS["disaggregated"], 2), tmp_path / "x.json"
    bench.write(str(path), "units", config, [Figure("a", 10, 0.05)])

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"--out = .* must be writable: No space left"):
        bench.write(str(path), "units", config, [])
    assert bench.read(str(path), "units", config) == [Figure("a", 10, 0.05)]


def test_wrong_devices_are_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(bench_step, "measure_rates", lambda config: pytest.fail("measured"))
    config = support.small_config(SplitConfig(attention_workers=3, expert_workers=3), 2)
    with pytest.raises(ConfigError, match=r"split = 6 devices .* must equal the 8 cpu devices"):
        bench.main("step", config, None, None)


def test_steps_that_compile_are_not_timed(monkeypatch):
    """Nor are the rates dropped that the floors come from."""
    config = support.small_config(SPLITS["disaggregated"], 2)
    rates, units = [Figure("product", 1, 0)], [Figure("unit", 1, 0, loaded_milliseconds=2)]
    fakes = {
        "Stepper": lambda config, meshes: types.SimpleNamespace(
            meshes=None, check_memory=lambda: None, schedule=types.SimpleNamespace(idle_share=0)
        ),
        "measure_rates": lambda config: (None, rates),
        "measure_units": lambda config, rates: units,
        "peak_memory": lambda meshes: {},
        "work_bound": lambda config, idle_share, units: 1e3 * units[0].milliseconds,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(bench_step, name, fake)

    def measured(compiling):
        def run_steps(stepper, num_steps, waits):
            seconds = [60.0 if n in compiling else 4.0 for n in range(num_steps)]
            metrics = [
                {"compiled": n in compiling, "pipeline_seconds": 1.0} for n in range(num_steps)
            ]
            return seconds, metrics

        monkeypatch.setattr(bench_step, "run_steps", run_steps)
        return bench_step.measure(config)

    begin, end = bench_step.WARM_UP, bench_step.WARM_UP + bench_step.STEPS
    product, unit, step, update = measured({0, begin, end})
    assert (product, unit) == (*rates, *units)
    assert (step.milliseconds, step.noise) == (4000, 0)
    assert step.share_of_floor == 0.25
    assert step.extra["bound of units under load"] == "2000.0 ms, 50%"
    assert (update.milliseconds, update.noise) == (3000, 0)
    with pytest.raises(bench_step.NothingTimed, match=rf"each of the {end - begin} steps to be"):
        measured(range(begin, end))


def test_small_rates_are_told(monkeypatch):
    unit, rates = object.__new__(bench_units.UnitBench), bench_units.Rates(1e12, 1e12)
    monkeypatch.setattr(unit, "_work", lambda name: (1e6, 1.0), raising=False)
    monkeypatch.setattr(bench_units, "time_calls", lambda name, call, **_: Figure(name, 10.0, 0))
    found = unit.time("attention forward", None, rates)
    assert found.extra == {"rate": "0.0001 TFLOP/s"}
    assert found.loaded_milliseconds is None  # a CPU


def test_a_call_is_timed_under_load_when_the_clock_has_fallen(monkeypatch):
    """Of a device that takes 10 ms at first and 13 once it has been busy for a second."""
    now = [0.0]

    def call():
        now[0] += 0.010 if now[0] < 1 else 0.013

    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    figure = timing.time_calls("x", call)
    loaded = timing.time_under_load(figure, call)
    assert (figure.milliseconds, loaded.milliseconds) == pytest.approx((10, 10))
    assert loaded.loaded_milliseconds == pytest.approx(13)
    assert now[0] == pytest.approx(timing.LOAD_SECONDS + 2, abs=0.5)
    assert bench_step.under_load(loaded).milliseconds == pytest.approx(13)
    assert bench_step.under_load(figure) == figure


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["units", "step", "--config=configs/tiny.py"], "argument 'step' must not be there: one"),
        (["--config=configs/tiny.py"], "a measurement (units, step or transfer) must be named"),
        (["units"], "--config = None must be given"),
        (["units", "--config=configs/tiny.py", "--cpu_devices=-1"], "flag --cpu_devices=-1: -1 is"),
        (["units", "--config=configs/tiny.py"], "--cpu_devices = 0 must be 1 or more here"),
        (["step", "--config=configs/tiny.py", "--cpu_devices=7"], "split = 8 devices"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, message):
    command = [sys.executable, "-m", "disag_jax.bench", *arguments]
    one_cpu = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    found = subprocess.run(
        command, cwd=launching.REPOSITORY, env=one_cpu, capture_output=True, text=True, timeout=100
    )
    assert found.returncode == 2
    assert f"error: {message}" in found.stderr and "Traceback" not in found.stderr
