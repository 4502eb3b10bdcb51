"""Real processes on this machine, joined over the loopback: same losses, and mistakes told."""

import functools
import shutil

import numpy as np
import pytest

from disag_jax import processes
from disag_jax.config import Config, ConfigError
from tests import launching
from tests.launching import (
    PAIR,
    REPOSITORY,
    TIMEOUT_SECONDS,
    finish,
    free_port,
    launch,
    losses,
    start,
)

MIXED = ("--config.split.stages=2", "--config.split.expert_workers=3")
# Half of the devices attention, half experts: with two processes each has one role only.
ONE_ROLE_EACH = (
    "--config.split.stages=1",
    "--config.split.attention_workers=4",
    "--config.split.expert_workers=4",
    "--config.batch.micro_batches=1",
)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return launching.write_config(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone(config_file, tmp_path_factory):
    """The records of one process with all devices, by the split's arguments."""

    @functools.cache
    def run(arguments):
        return launch(config_file, tmp_path_factory.mktemp("alone") / "run", 1, *arguments)

    return run


@pytest.mark.timeout(2 * TIMEOUT_SECONDS)
@pytest.mark.parametrize(
    "num_processes, arguments",
    [(2, MIXED), (2, ONE_ROLE_EACH), pytest.param(4, MIXED, marks=pytest.mark.slow)],
)
def test_losses_do_not_depend_on_the_processes(
    config_file, alone, tmp_path, num_processes, arguments
):
    arguments += ("--config.run.eval_batches=1",)
    several = launch(config_file, tmp_path / "several", num_processes, *arguments)
    expected = alone(arguments)
    assert losses(several) == pytest.approx(losses(expected), rel=1e-12)
    assert several[-1]["held_out_loss"] == pytest.approx(expected[-1]["held_out_loss"], rel=1e-12)


@pytest.mark.timeout(2 * TIMEOUT_SECONDS)
def test_a_checkpoint_of_two_processes_restores_in_one_on_another_split(config_file, tmp_path):
    workdir = tmp_path / "run"
    first = launch(config_file, workdir, 2, *ONE_ROLE_EACH)
    other = ("--config.split.stages=2", "--config.split.attention_workers=1")
    other += ("--config.split.expert_workers=3", "--config.batch.micro_batches=4")
    again = launch(config_file, workdir, 1, *other, "--resume_step=2")[len(first) :]
    assert [record["step"] for record in again if "loss" in record] == [3, 4]
    assert losses(again) == pytest.approx(losses(first)[2:], rel=1e-11)


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_different_configs_are_refused_and_the_field_named(config_file, tmp_path):
    port = free_port()
    running = [
        start(
            config_file,
            tmp_path / "run",
            4,
            f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={process}",
            f"--config.optimizer.weight_decay={0.1 + process}",
        )
        for process in range(2)
    ]
    for _, error, code in finish(running):
        assert code == 2, error
        assert "config.optimizer.weight_decay = " in error and "same in all processes" in error


OTHER_DATA = """
import dataclasses, runpy, sys
sys.path.insert(0, ".")
if "--process_id=1" in sys.argv:
    from disag_jax import text
    load = text.load
    def with_another_byte(*args):
        corpus = load(*args)
        train = corpus.train.copy()
        train[-100] ^= 1
        return dataclasses.replace(corpus, train=train)
    text.load = with_another_byte
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_data_that_differ_in_a_byte_are_refused(config_file, tmp_path):
    (tmp_path / "other.py").write_text(OTHER_DATA)
    running = launching.start_all(
        config_file, tmp_path / "run", 2, *PAIR, devices=2, script=str(tmp_path / "other.py")
    )
    for _, error, code in finish(running):
        assert code == 2 and "data: the checksum of training = " in error, error[-2000:]


DISAGREEMENTS = {
    "workdirs": ({}, {"--workdir": "{tmp}/other"}, "in --workdir = "),
    "flags": ({"--resume": "true"}, {}, "--resume = "),
    "files that one has not": (
        {"--config.data.sources": "('{tmp}/a.bin',)", "--config.data.paths": "()"},
        {"--config.data.sources": "('{tmp}/a.bin',)", "--config.data.paths": "()"},
        "must be a .bin or .npy file that exists",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DISAGREEMENTS)
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_what_one_process_alone_sees_ends_all(name, config_file, tmp_path):
    port, (*each, sentence) = free_port(), DISAGREEMENTS[name]
    running = []
    for process, more in enumerate(each):
        more = {"--workdir": "{tmp}/run", **more}
        workdir = more.pop("--workdir").format(tmp=tmp_path)
        joined = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={process}")
        flags = (f"{flag}={value.format(tmp=tmp_path)}" for flag, value in more.items())
        running.append(start(config_file, workdir, 4, *joined, *flags))
    for _, error, code in finish(running):
        assert code == 2 and sentence in error, (code, error[-2000:])


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_another_version_of_the_code_is_refused(config_file, tmp_path):
    """One whose configs have a field more."""
    copy = tmp_path / "copy"
    for package in ("configs", "disag_jax", "layers", "mesh"):
        shutil.copytree(REPOSITORY / package, copy / package)
    shutil.copy(REPOSITORY / "train.py", copy)
    sections = copy / "disag_jax/config_sections.py"
    field = "    straggler_factor: float = 1.5\n"
    assert sections.read_text().count(field) == 1
    sections.write_text(sections.read_text().replace(field, f"{field}    another: int = 3\n"))
    port, running = free_port(), []
    for process, script in enumerate(("train.py", str(copy / "train.py"))):
        joined = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={process}")
        running.append(start(config_file, tmp_path / "run", 4, *joined, script=script))
    for _, error, code in finish(running):
        assert code == 2 and "the code = 'jax " in error, error[-2000:]
        assert "must be the same in all processes" in error


SLURM = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize("shown, expected", [(None, None), ("3", [0]), ("0,1", None)])
def test_a_launch_by_slurm_joins_with_the_devices_shown(shown, expected, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    calls = []
    monkeypatch.setattr(
        processes.jax.distributed, "initialize", lambda *args, **more: calls.append((args, more))
    )
    processes.join(None, None, None, Config())
    ((args, more),) = calls
    assert args == (None, None, None) and more["local_device_ids"] == expected
    assert more["initialization_timeout"] == Config().run.start_timeout_seconds


def test_a_single_task_joins_nobody(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setattr(processes.jax.distributed, "initialize", pytest.fail)
    processes.join(None, None, None, Config())


@pytest.mark.timeout(60)
def test_an_mpi_launch_without_a_coordinator_is_told(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    ((_, error, code),) = finish([start(config_file, tmp_path / "run", 4)])
    assert code == 2 and "named by --coordinator, --num_processes and --process_id" in error, error


def test_an_error_of_one_process_is_raised_in_all(monkeypatch):
    """The others' part of `on_each`, in one process."""
    theirs = np.zeros(processes.SENTENCE_BYTES, np.uint8)
    theirs[:5] = np.frombuffer(b"wrong", np.uint8)
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        processes.multihost_utils, "process_allgather", lambda mine: np.stack([mine, theirs])
    )
    with pytest.raises(ConfigError, match=r"^wrong$"):
        processes.on_each(lambda: "fine here")
    theirs[:5] = 0
    assert processes.on_each(lambda: "fine here") == "fine here"


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_used_workdir_is_refused_by_all_processes(config_file, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    port = free_port()
    running = [
        start(
            config_file,
            tmp_path,
            4,
            f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={process}",
        )
        for process in range(2)
    ]
    for _, error, code in finish(running):
        assert code == 2 and "must be new: it holds another run's config.json" in error, error


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_unreachable_coordinator_is_named(config_file, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    alone = start(
        config_file,
        tmp_path / "run",
        4,
        f"--coordinator={address}",
        "--num_processes=2",
        "--process_id=1",
        "--config.run.start_timeout_seconds=3",
    )
    ((_, error, code),) = finish([alone])
    assert code == 2 and f"--coordinator = '{address}' must be reachable" in error, error


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_two_processes_with_one_id_are_refused(config_file, tmp_path):
    port = free_port()
    running = [
        start(
            config_file,
            tmp_path / "run",
            4,
            f"--coordinator=127.0.0.1:{port}",
            "--num_processes=3",
            f"--process_id={process}",
            "--config.run.start_timeout_seconds=10",
        )
        for process in (0, 1, 1)
    ]
    for _, error, code in finish(running):
        assert code != 0 and "every --process_id must be used once" in error, error


@pytest.mark.timeout(60)
def test_a_process_without_its_devices_ends_at_once(config_file, tmp_path):
    """The other one, which waits for those devices, does not keep it."""
    port = free_port()
    joined = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    other, without = (
        start(
            config_file, tmp_path / "run", devices, *joined, f"--process_id={process}",
            environment=environment,
        )
        for process, devices, environment in ((0, 1, {}), (1, 0, {"JAX_PLATFORMS": "none"}))
    )  # fmt: skip
    try:
        ((_, error, code),) = finish([without])
    finally:
        other.kill()
        other.communicate()
    assert code == 1
    assert "error: the devices of process 1, or of another one, do not start: " in error


@pytest.mark.timeout(60)
def test_processes_need_a_coordinator(config_file, tmp_path):
    ((_, error, code),) = finish([start(config_file, tmp_path / "run", 4, "--num_processes=2")])
    assert code == 2 and "--num_processes = 2 must come with --coordinator" in error, error


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("--num_processes=2",), "--process_id = None must be at least 0"),
        (("--num_processes=2", "--process_id=2"), "--process_id = 2 must be at least 0 and below"),
        (("--process_id=0",), "--num_processes = None must be 1 or more with --coordinator"),
    ],
)
@pytest.mark.timeout(60)
def test_numbers_of_processes(config_file, tmp_path, arguments, sentence):
    process = start(config_file, tmp_path / "run", 4, "--coordinator=127.0.0.1:1", *arguments)
    ((_, error, code),) = finish([process])
    assert code == 2 and sentence in error, error
