"""The comparison of the placements: fair twins, equal losses, and what it says if they differ."""

import dataclasses
import json

import numpy as np
import pytest

from configs import balanced, tiny
from disag_jax import compare
from disag_jax.config import ConfigError, Dtype, Overlap, PlacementKind, SplitConfig
from disag_jax.errors import RunError
from tests import support


@pytest.mark.parametrize("make", [tiny.get_config, balanced.get_config])
def test_the_twin_trains_the_same_batch_on_the_same_devices(make):
    config = make()
    twin = compare.twin_of(config)
    assert twin.split.placement is PlacementKind.COLOCATED
    assert twin.split.num_devices == config.split.num_devices
    assert twin.tokens_per_step == config.tokens_per_step
    same = ("model", "optimizer", "data", "run")
    assert all(getattr(twin, name) == getattr(config, name) for name in same)
    assert config.split.placement is PlacementKind.DISAGGREGATED


def test_twin_of_the_tiny_config():
    twin = compare.twin_of(tiny.get_config())
    assert (twin.split.stages, twin.split.attention_workers, twin.split.expert_workers) == (2, 4, 4)
    assert (twin.batch.tokens_per_worker, twin.batch.micro_batches) == (256, 2)
    assert compare.twin_of(tiny.get_config(), expert_workers=2).split.expert_workers == 2


def test_the_twin_overlaps_what_it_is_told_to():
    assert compare.twin_of(tiny.get_config()).split.overlap is Overlap.NONE
    twin = compare.twin_of(tiny.get_config(), overlap=Overlap.CHUNKED, forward_chunks=2)
    assert twin.split.overlap is Overlap.CHUNKED
    assert (twin.split.forward_chunks, twin.split.backward_chunks) == (2, 1)
    with pytest.raises(ConfigError, match=r"split.forward_chunks = 2 must be 1 unless"):
        compare.twin_of(tiny.get_config(), overlap=Overlap.INTERLEAVED, forward_chunks=2)


def test_sequences_that_do_not_divide_are_refused():
    config = support.small_config(SplitConfig(attention_workers=1, expert_workers=3), 3)
    with pytest.raises(ConfigError, match=r"batch.micro_batches = 3 must make whole sequences"):
        compare.twin_of(config)


def test_candidates_keep_the_step():
    config = balanced.get_config()
    tried = compare.candidates(config, (8192, 16_384, 20_000))
    assert [c.batch.tokens_per_worker for c in tried] == [8192, 16_384]
    assert {c.tokens_per_step for c in tried} == {config.tokens_per_step}
    assert compare.candidates(config, ()) == tried
    assert compare.candidates(config, (20_000,)) == []


def test_micro_batch_sizes_are_those_of_a_placement():
    """Of four devices, one of them attention's, the twin's workers have a quarter of the tokens."""
    config = support.small_config(SplitConfig(attention_workers=1, expert_workers=3), 4)
    twin, own = compare.twin_of(config), config.batch.tokens_per_worker
    both = compare.candidates_of_both(config, twin, (own, 4 * own))
    assert [[c.batch.tokens_per_worker for c in tried] for tried in both] == [[own, 4 * own], [own]]
    for size in (-own, own + 1, 8 * own):
        with pytest.raises(ConfigError, match=rf"--tokens_per_worker = {size} must be whole"):
            compare.candidates_of_both(config, twin, (own, size))
    with pytest.raises(ConfigError, match=rf"= {4 * own} must hold .* {own} tokens of a colocated"):
        compare.candidates_of_both(config, twin, (4 * own,))


class FakeRunner:
    """Runs that take as long per token as told, or fail, by their names."""

    def __init__(self, speeds: dict[str, float | None]):
        self.speeds = speeds

    def run(self, config, name, num_steps):
        if self.speeds[name] is None:
            raise RunError(f"{name}: no memory")
        found = measurement([1.0] * num_steps)
        return dataclasses.replace(found, split=name, tokens_per_second=self.speeds[name])


def test_each_placement_is_measured_at_its_fastest_size(capsys):
    config = balanced.get_config()
    twin = compare.twin_of(config)
    speeds = {
        "disaggregated_8192": 3.0, "disaggregated_16384": 2.0,
        "colocated_8192": 1.0, "colocated_16384": None,
    }  # fmt: skip
    both = compare.candidates_of_both(config, twin, (8192, 16_384))
    found = compare.compare(FakeRunner(speeds), both, 6)
    assert [m.split for m in found] == ["disaggregated_8192", "colocated_8192"]
    printed = capsys.readouterr().out
    assert "disaggregated_16384: 2 tokens/s" in printed and "no memory" in printed
    speeds["colocated_8192"] = None
    with pytest.raises(RunError, match=r"colocated: no micro-batch size of 8192, 16384"):
        compare.compare(FakeRunner(speeds), both, 6)
    with pytest.raises(RunError, match="disaggregated: no memory"):
        one_size = compare.candidates_of_both(config, twin, (16_384,))
        compare.compare(FakeRunner({"disaggregated": None}), one_size, 6)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("compare")
    (directory / "text.txt").write_text("".join(f"line {n}, {n * n}\n" for n in range(800)))
    config = support.small_config(SplitConfig(attention_workers=1, expert_workers=3), 4,
                                  vocab_size=256, num_experts=7)  # fmt: skip
    config.data.paths = (str(directory / "text.txt"),)
    return config


@pytest.mark.timeout(240)
def test_both_placements_have_the_same_losses(small_file, tmp_path, capsys):
    workdir = tmp_path / "compare"
    sizes = (small_file.batch.tokens_per_worker,)
    compare.main(small_file, str(workdir), 6, 4, "default", sizes, None)
    result = json.loads((workdir / "comparison.json").read_text())
    assert result["largest_loss_difference"] < result["tolerance"] == 1e-9
    first, second = result["measurements"]
    assert (first["placement"], second["placement"]) == ("disaggregated", "colocated")
    assert len(first["losses"]) == 6 and first["losses"][-1] < first["losses"][0]
    assert min(first["tokens_per_second"], second["tokens_per_second"]) > 0
    assert (workdir / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens/s" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"must be a new or empty directory"):
        compare.main(small_file, str(workdir), 6, 4, "default", (), None)


def measurement(losses):
    return compare.Measurement(
        "x", "1", 1, 1, losses, 1.0, 1.0, 1.0, peak_memory_gib={}, exposed_share={}, hidden_share={}
    )


def test_different_losses_are_an_error(small_file, tmp_path, monkeypatch):
    found = measurement([2.0, 1.0]), measurement([2.0, 1.0 + 1e-8])
    monkeypatch.setattr(compare, "compare", lambda *args: found)
    with pytest.raises(RunError, match=r"losses differ by 1.00e-08, more than 1e-09"):
        compare.main(small_file, str(tmp_path / "new"), 6, 4, "default", (), None)


def test_nan_losses_are_an_error(small_file, tmp_path, monkeypatch):
    found = measurement([2.0, np.nan]), measurement([2.0, np.nan])
    monkeypatch.setattr(compare, "compare", lambda *args: found)
    with pytest.raises(RunError, match=r"losses differ"):
        compare.main(small_file, str(tmp_path / "new"), 6, 4, "default", (), None)


def test_every_dtype_has_a_tolerance():
    assert set(compare.TOLERANCES) == set(Dtype)


@pytest.mark.parametrize(
    "change, steps, message",
    [
        ({"placement": PlacementKind.COLOCATED}, 9, "split.placement = colocated must be"),
        ({}, 4, "--steps = 4 must be more than 4"),
    ],
)
def test_bad_input(tmp_path, change, steps, message):
    config = tiny.get_config()
    config.split = dataclasses.replace(config.split, **change)
    if change:
        config.split = dataclasses.replace(config.split, attention_workers=3)
    with pytest.raises(ConfigError, match=message):
        compare.main(config, str(tmp_path), steps, 8, "default", (), None)


def test_another_seed_is_no_rounding():
    """Losses of the balanced shape's first steps, and of a tiny model's from two seeds."""
    placements = [10.8081, 9.3676, 7.0916], [10.8081, 9.3684, 7.0880]
    seeds = [5.4844, 5.5042, 5.4936], [5.5415, 5.5241, 5.5359]
    tolerance = compare.TOLERANCES[Dtype.BFLOAT16]
    assert compare.largest_difference(*placements) < tolerance
    assert compare.largest_difference(*seeds) > tolerance


def test_a_failed_run_is_told_in_its_own_words(small_file, tmp_path):
    runner = compare.Runner(tmp_path, cpu_devices=3, network="default")
    with pytest.raises(ConfigError, match=r"one: split = 4 devices .* must equal the 3 cpu"):
        runner.run(small_file, "one", 6)
