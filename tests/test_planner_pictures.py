"""Pictures of a plan: what they show is the simulated step, and nothing is written on bad input."""

import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure

from configs import balanced, qwen3_235b
from disag_jax import plan
from disag_jax.config import PlacementKind, Recompute, SplitConfig
from disag_jax.errors import ConfigError
from disag_jax.planner import hardware, pictures
from disag_jax.planner.loss_shares import with_share
from disag_jax.planner.prediction import predict
from disag_jax.planner.search import Fixed, candidates, fastest_of_ratios, search


def test_page_is_drawn(prediction, tmp_path):
    path = tmp_path / "plan.png"
    pictures.write_page(prediction, str(path), {})
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
    same = str(tmp_path / "here.png"), str(tmp_path / "none" / ".." / "here.png")
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"--plot = .* must be another file than --timeline"):
        plan.main(config, "h100", 2, Fixed(), None, *same)
    assert not (tmp_path / "here.png").exists()
    with pytest.raises(ConfigError, match="num_devices = 1"):
        plan.main(config, "h100", 1, Fixed(), None, str(good))
    assert not good.exists() and capsys.readouterr().out == ""
    prediction = predict(config, hardware.load("h100"))
    with pytest.raises(ConfigError, match=r"--plot = .* must be writable"):
        pictures.write_page(prediction, str(tmp_path / "page.unknown"), {})


def drawn_ratios(axes) -> dict[str, list[tuple[float, float]]]:
    """(attention's share of a stage, microseconds per token) of the points of each hop."""
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axes.lines
        if line.get_label().startswith("hop")
    }


def test_ratios_are_those_that_fit_under_the_load_that_was_given():
    config = balanced.get_config()
    config.split = SplitConfig(attention_workers=2, expert_workers=4)
    device = dataclasses.replace(hardware.load("h100"), memory_gibibytes=42)
    tokens = config.batch.tokens_per_worker
    fixed = Fixed(1, 1, 2, 4, tokens_per_worker=tokens, recompute=config.run.recompute)
    ratios = fastest_of_ratios(config.validate(), device, 6, fixed, 1.5)
    axes = Figure().add_subplot()
    pictures._draw_ratios(axes, predict(config, device, 1.5), ratios)
    fixed = Fixed(replicas=1, stages=1, tokens_per_worker=tokens)
    tried = [
        predict(one, device, 1.5)
        for one in candidates(config, 6, PlacementKind.DISAGGREGATED, fixed)
    ]
    fitting, least = {}, {}
    for one in tried:
        if one.fits:
            split, chunk = one.config.split, config.run.loss_chunk
            shares = (chunks * chunk / tokens for chunks in range(1, tokens // chunk + 1))
            unequal = (predict(with_share(one.config, share), device, 1.5) for share in shares)
            for points, speeds in (
                (fitting, [one.tokens_per_second]),
                (least, [other.tokens_per_second for other in (one, *unequal)]),
            ):
                point = split.attention_workers / 6, 1e6 / max(speeds)
                points.setdefault(f"hop {split.hop}", []).append(point)
    assert 0 < sum(map(len, fitting.values())) < len(tried)
    drawn = drawn_ratios(axes)
    assert drawn.keys() == fitting.keys()
    for hop in fitting:
        # With the share of the loss that is best, or nearly.
        slowest, fastest = (np.array(sorted(points[hop])) for points in (fitting, least))
        np.testing.assert_allclose(np.array(drawn[hop])[:, 0], slowest[:, 0])
        assert (np.array(drawn[hop]) <= slowest * (1 + 1e-9)).all()
        np.testing.assert_allclose(drawn[hop], fastest, rtol=0.01)


def test_ratios_of_a_pick_under_whose_recomputing_and_batch_few_fit():
    """The plan of docs/planner.md for 128 H800: the pick is a twin."""
    config, device = qwen3_235b.get_config(), hardware.load("h800")
    pick, apart = (
        search(config, device, 128, kind, Fixed(stages=32)).config
        for kind in (PlacementKind.COLOCATED, PlacementKind.DISAGGREGATED)
    )
    assert pick.run.recompute is not apart.run.recompute
    axes = Figure().add_subplot()
    pictures._draw_ratios(axes, predict(pick, device), fastest_of_ratios(config, device, 128))
    points = [point for hop in drawn_ratios(axes).values() for point in hop]
    assert len({share for share, _ in points}) > 3 and not axes.texts
    # The best of all is among them.
    assert (apart.split.attention_workers, apart.split.expert_workers) == (1, 3)
    assert min(points, key=lambda point: point[1]) == pytest.approx(
        (1 / 4, 1e6 / predict(apart, device).tokens_per_second)
    )


def test_where_no_ratio_fits_the_panel_says_so():
    config, device = qwen3_235b.get_config(), hardware.load("h800")
    fixed = Fixed(stages=32, recompute=Recompute.NONE)
    axes = Figure().add_subplot()
    ratios = fastest_of_ratios(config, device, 128, fixed)
    pictures._draw_ratios(axes, predict(config, device), ratios)
    assert not drawn_ratios(axes) and axes.texts[0].get_text() == "none fits"
