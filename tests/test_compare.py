"""The comparison of the placements: fair twins, equal losses, and what it says if they differ."""

import copy
import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import balanced, tiny
from disag_jax import compare
from disag_jax.bench_step import run_steps
from disag_jax.config import ConfigError, Dtype, Overlap, PlacementKind, SplitConfig
from disag_jax.errors import RunError
from disag_jax.measured_run import DoesNotFit, Measurement
from tests import launching, support


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
    with pytest.raises(ConfigError, match=r"--twin_experts = 0 must be 1 or more"):
        compare.twin_of(tiny.get_config(), expert_workers=0)


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
    assert compare.candidates(config, (20_000,)) == []


def test_sizes_that_are_tried_by_default():
    """The config's own, half of it and double, where a pipeline of four micro-batches is left."""
    config = support.small_config(SplitConfig(), 8)
    own = config.batch.tokens_per_worker
    sizes = {8: [own // 2, own, 2 * own], 4: [own // 2, own], 7: [own // 2, own], 1: [own]}
    for config.batch.micro_batches, expected in sizes.items():
        tried = compare.candidates(config, ())
        assert [c.batch.tokens_per_worker for c in tried] == expected
        assert {c.tokens_per_step for c in tried} == {config.tokens_per_step}


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


def test_a_size_that_the_chunks_do_not_divide_is_left_out():
    config = support.small_config(SplitConfig(attention_workers=1, expert_workers=1), 16)
    own = config.batch.tokens_per_worker
    twin = compare.twin_of(config, overlap=Overlap.CHUNKED, forward_chunks=own)
    tried = compare.candidates(twin, ())
    assert [c.batch.tokens_per_worker for c in tried] == [own, 2 * own]


class FakeRunner:
    """Runs whose steps take as long as told, or do not fit, by their names."""

    def __init__(self, seconds: dict[str, float | None]):
        self.seconds, self.names = seconds, []

    def run(self, config, name, num_steps):
        self.names.append(name)
        if self.seconds[name] is None:
            raise DoesNotFit(f"{name}: no memory")
        found = measurement([1.0] * num_steps)
        return dataclasses.replace(found, split=name, step_seconds=self.seconds[name])


def test_each_placement_is_measured_at_its_sizes(capsys):
    config = balanced.get_config()
    twin = compare.twin_of(config)
    seconds = {
        "disaggregated_8192": 2.0, "disaggregated_16384": 3.0,
        "colocated_8192": 4.0, "colocated_16384": None,
    }  # fmt: skip
    both = compare.candidates_of_both(config, twin, (8192, 16_384))
    found = compare.compare(FakeRunner(seconds), both, 6, grows=False)
    assert [[m.split for m in of_one] for of_one in found] == [
        ["disaggregated_8192", "disaggregated_16384"], ["colocated_8192"],
    ]  # fmt: skip
    assert compare.fastest(found[0]).split == "disaggregated_8192"
    printed = capsys.readouterr().out
    batches = config.tokens_per_step // 16_384 // config.split.attention_workers
    assert f"running disaggregated, {batches} x 16,384 tokens" in printed
    assert "colocated_16384: no memory" in printed
    seconds["colocated_8192"] = None
    with pytest.raises(RunError, match=r"colocated: no micro-batch size of 8192, 16384 fits"):
        compare.compare(FakeRunner(seconds), both, 6, grows=False)


@pytest.mark.parametrize(
    "seconds, last",
    [
        ([9, 8, 7, 6, 5], 4),  # 32 micro-batches are 4 then
        ([9, 8, 7, 7.5, 1], 3),  # slower
        ([9, 8, 9, 1, 1], 2),
        ([9, 8, 7, None, 1], 3),  # no memory
        ([9, None, 1, 1, 1], 1),
    ],
)
def test_sizes_grow_while_they_fit_and_are_faster(seconds, last):
    config = support.small_config(SplitConfig(), 32)
    own = config.batch.tokens_per_worker
    names = [f"disaggregated_{own * 2**n // 2}" for n in range(5)]
    runner = FakeRunner(dict(zip(names, seconds, strict=True)))
    compare.measure_sizes(runner, compare.candidates(config, ()), 6, grows=True)
    assert runner.names == names[: last + 1]


def test_a_run_that_fails_ends_the_comparison():
    """Only too little memory has the next size tried."""

    class Failing:
        def run(self, config, name, num_steps):
            raise ConfigError("data.paths = ('/nope',) must exist")

    tried = compare.candidates(balanced.get_config(), ())
    with pytest.raises(ConfigError, match="/nope"):
        compare.measure_sizes(Failing(), tried, 6, grows=True)


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
    assert (result["devices"], result["jax"]) == ("4 x cpu", jax.__version__)
    assert result["config"]["batch"]["micro_batches"] == 4 and result["num_steps"] == 6
    assert [one["placement"] for one in result["candidates"]] == ["disaggregated", "colocated"]
    first, second = result["measurements"]
    assert (first["placement"], second["placement"]) == ("disaggregated", "colocated")
    assert len(first["losses"]) == 6 and first["losses"][-1] < first["losses"][0]
    assert min(first["tokens_per_second"], second["tokens_per_second"]) > 0
    assert (workdir / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens/s" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"must be a new or empty directory"):
        compare.main(small_file, str(workdir), 6, 4, "default", (), None)


def measurement(losses):
    return Measurement(
        "x", "1", 1, 1, losses, 1.0, 1.0, 1.0, peak_memory_gib={}, exposed_share={}, hidden_share={}
    )


def test_different_losses_are_an_error(small_file, tmp_path, monkeypatch):
    """Those of a candidate that is not the fastest too."""
    slower = dataclasses.replace(measurement([2.0, 1.0 + 1e-8]), step_seconds=2.0)
    found = [measurement([2.0, 1.0])], [measurement([2.0, 1.0]), slower]
    monkeypatch.setattr(compare, "compare", lambda *args, **kwargs: found)
    with pytest.raises(RunError, match=r"losses differ by 1.00e-08, more than 1e-09"):
        compare.main(small_file, str(tmp_path / "new"), 6, 4, "default", (), None)
    kept = json.loads((tmp_path / "new" / "comparison.json").read_text())
    assert len(kept["measurements"]) == 2 and len(kept["candidates"]) == 3


def test_nan_losses_are_an_error(small_file, tmp_path, monkeypatch):
    found = [measurement([2.0, np.nan])], [measurement([2.0, np.nan])]
    monkeypatch.setattr(compare, "compare", lambda *args, **kwargs: found)
    with pytest.raises(RunError, match=r"losses differ"):
        compare.main(small_file, str(tmp_path / "new"), 6, 4, "default", (), None)


def test_every_dtype_has_a_tolerance():
    assert set(compare.TOLERANCES) == set(Dtype)


@pytest.mark.parametrize(
    "change, steps, message",
    [
        ({"placement": PlacementKind.COLOCATED}, 9, "split.placement = colocated must be"),
        ({}, 5, "--steps = 5 must be 6 or more"),
    ],
)
def test_bad_input(tmp_path, change, steps, message):
    config = tiny.get_config()
    config.split = dataclasses.replace(config.split, **change)
    if change:
        config.split = dataclasses.replace(config.split, attention_workers=3)
    with pytest.raises(ConfigError, match=message):
        compare.main(config, str(tmp_path), steps, 8, "default", (), None)


def test_gpus_networks_are_none_of_simulated_devices(tmp_path):
    with pytest.raises(ConfigError, match=r"--network = sockets must be default with --cpu_dev"):
        compare.main(tiny.get_config(), str(tmp_path), 6, 8, "sockets", (), None)


@pytest.mark.parametrize(
    "cpu_devices, paths, message",
    [
        (3, None, "split = 4 devices .* must equal the 3 cpu devices here"),
        (4, ("/nope",), "data.paths = .*/nope"),
    ],
)
def test_nothing_is_written_without_devices_and_data(
    small_file, tmp_path, cpu_devices, paths, message
):
    config = copy.deepcopy(small_file)
    config.data.paths = paths or config.data.paths
    with pytest.raises(ConfigError, match=message):
        compare.main(config, str(tmp_path / "new"), 6, cpu_devices, "default", (), None)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--workdir=README.md"], "workdir = 'README.md' must be a new or empty directory"),
        (["--workdir=/proc/nope", "--cpu_devices=8"], "workdir = '/proc/nope' must be a writable"),
        (["--workdir=/tmp/new", "--cpu_devices=-8"], "flag --cpu_devices=-8: -8 is not"),
        (["--workdir=/tmp/new", "--twin_experts=0"], "--twin_experts = 0 must be 1 or more"),
        ([], "--workdir = None must be given"),
    ],
)
def test_mistakes_are_told_in_a_sentence(flags, message):
    command = [sys.executable, "-m", "disag_jax.compare", "--config=configs/tiny.py", *flags]
    found = subprocess.run(
        command, cwd=launching.REPOSITORY, capture_output=True, text=True, timeout=100
    )
    assert found.returncode == 2
    assert f"error: {message}" in found.stderr and "Traceback" not in found.stderr


def test_another_seed_is_no_rounding(small_file):
    """In bfloat16 the placements' losses are within the tolerance, those of two seeds are not."""

    def losses(config, seed=0):
        config = copy.deepcopy(config)
        config.run.compute_dtype, config.run.seed = Dtype.BFLOAT16, seed
        _, metrics = run_steps(support.make_stepper(config), 3)
        return [float(of_step["loss"]) for of_step in metrics]

    tolerance = compare.TOLERANCES[Dtype.BFLOAT16]
    own = losses(small_file)
    assert compare.largest_difference(own, losses(compare.twin_of(small_file))) < tolerance
    assert compare.largest_difference(own, losses(small_file, seed=1)) > tolerance
