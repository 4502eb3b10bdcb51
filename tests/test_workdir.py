"""A run's directory: its config comes back from it, and it is not another run's."""

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys

import pytest

from disag_jax.config import Config, ConfigError, RouterScore, SplitConfig
from disag_jax.workdir import Workdir, config_from_dict
from tests import support

CONFIGS = sorted(
    path.stem for path in pathlib.Path(__file__).parent.parent.glob("configs/[!_]*.py")
)


def small_config(**model) -> Config:
    config = support.small_config(SplitConfig(stages=2), router_score=RouterScore.SIGMOID, **model)
    config.data.paths = ("a", "b")
    return config


def workdir_of(config: Config, path: pathlib.Path) -> Workdir:
    workdir = Workdir(str(path / "run"))
    workdir.open(config, resume=False)
    workdir.write_config(config)
    return workdir


def test_the_config_comes_back(tmp_path):
    config = small_config(capacity_factor=1.5)
    assert workdir_of(config, tmp_path).read_config() == config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_comes_back(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_an_absent_field_has_its_default():
    assert config_from_dict({"name": "old", "model": {"top_k": 3}}).model.top_k == 3
    assert config_from_dict({}) == Config()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"modle": {}}, r"config\.modle must be a field of Config: name, model, split"),
        ({"model": {"layers": 3}}, r"config\.model\.layers must be a field of ModelConfig: vocab"),
        ({"model": 3}, r"config\.model = 3 must hold the fields of ModelConfig"),
        ([], r"config = \[\] must hold the fields of Config"),
        ({"model": {"router_score": "best"}}, r"model\.router_score = 'best' must be one of"),
        ({"data": {"paths": "text"}}, r"data\.paths = 'text' must be a tuple of strings"),
        ({"model": {"top_k": 99}}, r"model\.top_k = 99 must be at most model\.num_experts"),
    ],
)
def test_a_wrong_config_is_named(values, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"config\.json: {message}"):
        Workdir(str(tmp_path)).read_config()


def test_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"workdir = '.*' must hold a run, but its config\.json"):
        Workdir(str(tmp_path)).read_config()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: Expecting property name"):
        Workdir(str(tmp_path)).read_config()


OTHER_RUNS = [
    ("model", "num_experts", 5, r"model\.num_experts = 5 must be 6, as in the run"),
    ("batch", "sequence_length", 16, r"batch\.sequence_length = 16 must be 8, as in"),
    ("run", "seed", 7, r"run\.seed = 7 must be 0, as in"),
    ("batch", "micro_batches", 5, r"micro_batches = 5 must make steps of 6 sequences, not 10, as"),
]


@pytest.mark.parametrize("section, field, value, message", OTHER_RUNS)
def test_another_run_does_not_go_on_here(section, field, value, message, tmp_path):
    workdir, config = workdir_of(small_config(), tmp_path), small_config()
    setattr(getattr(config, section), field, value)
    with pytest.raises(ConfigError, match=message):
        workdir.open(config, resume=True)
    assert workdir.read_config() == small_config()


def test_a_config_that_nests_too_deep_is_named(tmp_path):
    workdir = workdir_of(small_config(), tmp_path)
    workdir.config.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"config.json: maximum recursion depth"):
        workdir.read_config()


def test_a_run_goes_on_with_its_own_data(tmp_path):
    workdir, config = Workdir(str(tmp_path / "run")), small_config()
    workdir.open(config, resume=False, data_digest="0badcafe")
    workdir.write_config(config, "0badcafe")
    workdir.open(config, resume=True, data_digest="0badcafe")
    with pytest.raises(ConfigError, match=r"data .* must be that of the run .* 0badcafe, not 1"):
        workdir.open(config, resume=True, data_digest="1")
    workdir.data.unlink()
    workdir.open(config, resume=True, data_digest="1")


def test_another_split_goes_on(tmp_path):
    workdir, config = workdir_of(small_config(), tmp_path), small_config()
    config.split = SplitConfig(stages=1, attention_workers=3, expert_workers=2)
    config.batch.micro_batches = 1
    workdir.open(config, resume=True)
    assert workdir.read_config() == small_config(), "nothing is written before the run is sure"
    workdir.write_config(config)
    assert workdir.read_config() == config


def test_a_run_that_was_killed_before_its_first_step_can_begin_again(tmp_path):
    workdir = Workdir(str(tmp_path))
    workdir.checkpoints.mkdir()
    with workdir:
        workdir.open(small_config(), resume=False)
    (workdir.checkpoints / "2").mkdir()
    with pytest.raises(ConfigError, match="must be new: it holds another run's checkpoints"):
        workdir.open(small_config(), resume=False)


def test_a_directory_is_one_runs_at_a_time(tmp_path):
    config = small_config()
    first, refused = workdir_of(config, tmp_path), "must be free: another run is still writing"
    with first:
        for resume in (False, True):
            with pytest.raises(ConfigError, match=refused):
                Workdir(str(first.path)).open(config, resume=resume)
    # Free again, also where the one that had it was killed: the lock is its process's.
    command = "import sys; from disag_jax.workdir import Workdir; from tests import test_workdir;"
    command += f"workdir = Workdir({str(first.path)!r});"
    command += "workdir.open(test_workdir.small_config(), resume=True);"
    command += "print('taken', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "taken\n"
    with pytest.raises(ConfigError, match=refused):
        Workdir(str(first.path)).open(config, resume=True)
    other.kill()
    other.wait()
    with Workdir(str(first.path)) as again:
        again.open(config, resume=True)


@pytest.mark.parametrize("damaged", ["{", "{}", "[]"])
def test_data_that_cannot_be_compared_are_refused(tmp_path, damaged):
    config = small_config()
    with workdir_of(config, tmp_path) as workdir:
        workdir.data.write_text(damaged)
    with pytest.raises(ConfigError, match=r"data\.json must say which data the run had, but"):
        Workdir(str(workdir.path)).open(config, resume=True, data_digest="00")
    workdir.data.unlink()  # as of runs before there was such a file
    with Workdir(str(workdir.path)) as again:
        again.open(config, resume=True, data_digest="00")


def test_what_changes_when_a_run_goes_on_is_known(tmp_path):
    config = small_config()
    with workdir_of(config, tmp_path) as workdir:
        assert workdir.changed == []
    config.optimizer.peak_learning_rate, config.run.num_steps = 0.25, 7
    with Workdir(str(workdir.path)) as again:
        again.open(config, resume=True)
    assert [(name, now) for name, _, now in again.changed] == [
        ("optimizer.peak_learning_rate", 0.25), ("run.num_steps", 7),
    ]  # fmt: skip


def test_a_run_killed_before_its_first_step_is_resumed_from_its_beginning(tmp_path):
    config, path = small_config(), tmp_path / "run"
    with pytest.raises(ConfigError, match="must hold a run to resume"):
        Workdir(str(path)).open(config, resume=True)
    assert not path.exists()
    with Workdir(str(path)) as killed:
        killed.open(config, resume=False)
    with Workdir(str(path)) as again:
        again.open(config, resume=True)


@pytest.mark.parametrize("name", ["tensorboard", "profile"])
def test_a_file_in_the_place_of_a_directory_is_refused(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=f"{name}' must be a directory where it is there"):
        Workdir(str(tmp_path)).open(small_config(), resume=False)
