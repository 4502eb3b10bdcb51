"""Pictures of a plan: what they show is the simulated step, and nothing is written on bad input."""

import dataclasses
import itertools

import pytest
from matplotlib.figure import Figure

from configs import balanced, qwen3_235b
from disag_jax import plan
from disag_jax.config import PlacementKind, SplitConfig
from disag_jax.errors import ConfigError
from disag_jax.planner import hardware, pictures
from disag_jax.planner.prediction import predict
from disag_jax.planner.search import PLACEMENTS, Fixed, candidates, search


def test_page_is_drawn(prediction, tmp_path):
    path = tmp_path / "plan.png"
    apart = None if prediction.config.split.colocated else prediction.config
    pictures.write_page(prediction, str(path), apart)
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
        pictures.write_page(prediction, str(tmp_path / "page.unknown"), config)


def drawn_ratios(axes) -> dict[float, list[float]]:
    """Microseconds per token by attention's share of a stage."""
    found = {}
    for line in axes.lines:
        if not line.get_label().startswith("the pick"):
            for share, time in zip(line.get_xdata(), line.get_ydata(), strict=True):
                found.setdefault(share, []).append(time)
    return found


def test_ratios_are_those_that_fit_under_the_load_that_was_given():
    config = balanced.get_config()
    config.split = SplitConfig(attention_workers=2, expert_workers=4)
    device = dataclasses.replace(hardware.load("h100"), memory_gibibytes=42)
    best = predict(config.validate(), device, 1.5)
    axes = Figure().add_subplot()
    pictures._draw_ratios(axes, best, best.config, config.run.recompute, 1.5)
    fixed = Fixed(replicas=1, stages=1, tokens_per_worker=config.batch.tokens_per_worker)
    tried = [
        predict(one, device, 1.5)
        for one in candidates(config, 6, PlacementKind.DISAGGREGATED, fixed)
    ]
    fitting = [1e6 / one.tokens_per_second for one in tried if one.fits]
    assert 0 < len(fitting) < len(tried)
    times = sorted(itertools.chain(*drawn_ratios(axes).values()))
    assert times == pytest.approx(sorted(fitting))


def test_ratios_of_a_pick_under_whose_recomputing_none_fits():
    """The plan of README.md for 128 H800, its stages held so that the searches are quick."""
    config, device = qwen3_235b.get_config(), hardware.load("h800")
    fixed = Fixed(replicas=1, stages=32)
    best = {kind: search(config, device, 128, kind, fixed).config for kind in PLACEMENTS}
    pick = predict(best[PlacementKind.COLOCATED], device)
    apart = best[PlacementKind.DISAGGREGATED]
    assert pick.config.run.recompute is not apart.run.recompute
    axes = Figure().add_subplot()
    pictures._draw_ratios(axes, pick, apart)
    found = drawn_ratios(axes)
    share = apart.split.attention_workers / 4
    assert min(found[share]) == pytest.approx(1e6 / predict(apart, device).tokens_per_second)
    assert min(itertools.chain(*found.values())) == min(found[share])
    assert not axes.texts
    # Only as much is recomputed as the user says: nothing is left.
    axes = Figure().add_subplot()
    pictures._draw_ratios(axes, pick, apart, pick.config.run.recompute)
    assert not drawn_ratios(axes) and axes.texts[0].get_text() == "none fits"
    axes = Figure().add_subplot()
    pictures._draw_ratios(axes, pick, None)
    assert axes.texts[0].get_text() == "none fits"
