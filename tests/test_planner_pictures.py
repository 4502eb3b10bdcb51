"""Pictures of a plan: what they show is the simulated step, and nothing is written on bad input."""

import dataclasses

import pytest
from matplotlib.figure import Figure

from configs import balanced
from disag_jax import plan
from disag_jax.config import PlacementKind, SplitConfig
from disag_jax.errors import ConfigError
from disag_jax.planner import hardware, pictures
from disag_jax.planner.prediction import predict
from disag_jax.planner.search import Fixed, candidates


def test_page_is_drawn(prediction, tmp_path):
    path = tmp_path / "plan.png"
    pictures.write_page(prediction, str(path))
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_bad_paths_are_refused_before_anything_is_written(tmp_path, capsys):
    config, good = balanced.get_config(), tmp_path / "good.json"
    with pytest.raises(ConfigError, match=r"--plot = .* must be in a directory that exists"):
        plan.main(config, "h100", 2, Fixed(), None, str(good), str(tmp_path / "none" / "x.png"))
    for name in ("page.unknown", "page"):
        with pytest.raises(ConfigError, match=rf"--plot = .*{name}' must end in one of .*, png, "):
            plan.main(config, "h100", 2, Fixed(), None, str(good), str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"--timeline = .* must be in a directory .* be none"):
        plan.main(config, "h100", 2, Fixed(), None, str(tmp_path))
    with pytest.raises(ConfigError, match="num_devices = 1"):
        plan.main(config, "h100", 1, Fixed(), None, str(good))
    assert not good.exists() and capsys.readouterr().out == ""
    prediction = predict(config, hardware.load("h100"))
    with pytest.raises(ConfigError, match=r"--plot = .* must be writable"):
        pictures.write_page(prediction, str(tmp_path / "page.unknown"))


def test_ratios_are_those_that_fit_under_the_load_that_was_given():
    config = balanced.get_config()
    config.split = SplitConfig(attention_workers=2, expert_workers=4)
    device = dataclasses.replace(hardware.load("h100"), memory_gibibytes=42)
    best = predict(config.validate(), device, 1.5)
    axes = Figure().add_subplot()
    pictures._draw_ratios(axes, best, 1.5)
    fixed = Fixed(replicas=1, stages=1, tokens_per_worker=config.batch.tokens_per_worker)
    tried = [
        predict(one, device, 1.5)
        for one in candidates(config, 6, PlacementKind.DISAGGREGATED, fixed)
    ]
    fitting = [1e6 / one.tokens_per_second for one in tried if one.fits]
    assert 0 < len(fitting) < len(tried)
    drawn = [y for line in axes.lines if line.get_label() != "the pick" for y in line.get_ydata()]
    assert sorted(drawn) == sorted(fitting)
