"""The benchmark command: every measurement on small shapes, its files, and what it says moved."""

import dataclasses

import pytest

from disag_jax import bench, bench_transfer
from disag_jax.config import ConfigError, Dtype, PlacementKind, SplitConfig
from disag_jax.timing import Figure, figure_of
from tests import support

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
        "step": ("step", "attention backward"),
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
