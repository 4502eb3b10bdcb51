"""The listing of a checkpoint agrees with the run that wrote it."""

import math
import pathlib
import shutil

import jax
import pytest

from disag_jax import inspect
from disag_jax.config import ConfigError
from tests import support


@pytest.fixture
def listing(trained_run) -> str:
    return inspect.describe(inspect.open_checkpoint(trained_run[1]))


def row(listing: str, first: str) -> list[str]:
    """The cells after the first one, of the only line that begins with it."""
    (line,) = [line for line in listing.splitlines() if line.startswith(f"{first}  ")]
    return line[len(first) :].replace(", ", ",").split()


def test_step_time_and_config(listing, trained_run):
    config, workdir = trained_run
    assert row(listing, "checkpoint") == [f"{workdir}/checkpoints/6"]
    assert row(listing, "step") == ["6", "(there", "are", "4,6)"]
    assert row(listing, "written")[2] == "UTC"
    assert row(listing, "config") == [config.name]
    assert "vocab_size 256, num_layers 2" in listing and "expert_workers 3" in listing


def test_leaves(listing):
    assert row(listing, "params.expert.experts.gate")[:3] == ["[2,7,16,12]", "float64", "21,504"]
    assert row(listing, "opt_state.expert.0.mu.experts.gate")[2] == "21,504"
    assert row(listing, "opt_state.expert.0.count")[:3] == ["[]", "int32", "4"]
    assert row(listing, "router_bias")[:3] == ["[2,7]", "float64", "112"]
    shares = [line.split()[-1] for line in listing.splitlines() if line.endswith("%")]
    assert sum(float(share[:-1]) for share in shares) == pytest.approx(100, abs=0.3)


def test_totals(listing, trained_run):
    params = support.oracle_params(trained_run[0])
    for group, tree in params.items():
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        assert row(listing, group) == [f"{n:,}" for n in (count, 8 * count, 16 * count + 4)]
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert row(listing, "total")[:2] == [f"{total:,}", f"{8 * total + 112:,}"]


def test_every_way_to_name_a_checkpoint(trained_run, tmp_path, monkeypatch):
    checkpoints = pathlib.Path(trained_run[1]) / "checkpoints"
    for path, step in ((checkpoints.parent, 6), (checkpoints, 6), (checkpoints / "4", 4)):
        assert inspect.open_checkpoint(str(path)).step == step
    # A run's directory may be named like a step.
    shutil.copytree(checkpoints.parent, tmp_path / "7")
    assert inspect.open_checkpoint(str(tmp_path / "7")).step == 6
    monkeypatch.chdir(checkpoints)
    assert inspect.open_checkpoint("4").step == 4


@pytest.mark.parametrize("path", ["", "none", "run", "3"])
def test_no_checkpoint(path, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"directory = '.*' must hold a checkpoint"):
        inspect.open_checkpoint(str(tmp_path / path))


def test_a_missing_step_lists_those_that_are_there(trained_run):
    with pytest.raises(ConfigError, match=r"step = 5 must be one of .*: 4, 6$"):
        inspect.open_checkpoint(f"{trained_run[1]}/checkpoints/5")


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "3").mkdir()
    with pytest.raises(ConfigError, match=r"checkpoint of step 3 in .* cannot be read"):
        inspect.open_checkpoint(str(tmp_path / "3"))


def test_the_command(trained_run, capsys):
    inspect.main(trained_run[1], f"{trained_run[1]}/checkpoints/4")
    assert capsys.readouterr().out.count("\ntotal ") == 2
