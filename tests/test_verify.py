"""Bitwise resume, by the command that users have; and that the command notices a bit."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from configs import tiny
from disag_jax import verify
from disag_jax.errors import USER_ERROR, RunError
from tests import launching
from tests.launching import PAIR, REPOSITORY, TIMEOUT_SECONDS

# Everything that must be in a checkpoint: the router bias, dropping, the transport's bucket (which
# the first steps overflow), and a learning rate that moves.
EVERYTHING = (
    "--config.model.bias_update_rate=0.01",
    "--config.model.capacity_factor=1.25",
    "--config.model.num_shared_experts=1",
    "--config.split.bucket_factors=(1.0, 1.2)",
    "--config.split.expert_workers=2",
    "--config.model.top_k=1",
    "--config.model.normalize_gates=False",
    "--config.run.num_steps=8",
)
NUM_STEPS = 6


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """(workdir, what the command printed)."""
    directory = tmp_path_factory.mktemp("verify")
    config_file = launching.write_config(directory)
    command = [
        sys.executable, "-m", "disag_jax.verify", "resume", f"--config={config_file}",
        f"--workdir={directory}/runs", "--cpu_devices=3", f"--steps={NUM_STEPS}",
        *PAIR, *EVERYTHING,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return directory / "runs", done.stdout


@pytest.mark.timeout(2 * TIMEOUT_SECONDS)
def test_a_resumed_run_is_equal_bit_for_bit(verified):
    workdir, printed = verified
    assert printed.startswith(f"resume: the metrics of {NUM_STEPS} steps and the ")
    steps = [r for r in launching.read_records(workdir / "halves") if "loss" in r]
    assert [record["step"] for record in steps] == list(range(1, NUM_STEPS + 1))
    assert any(record["bucket_reruns"] for record in steps), "the test must overflow a bucket"
    assert any(sum(record["dropped_pairs"]) for record in steps), "the test must drop"


@pytest.mark.parametrize("what", ["metrics", "checkpoint", "a lost step"])
def test_the_last_bit_counts(verified, what, tmp_path):
    workdir = tmp_path / "halves"
    shutil.copytree(verified[0] / "halves", workdir)
    if what == "metrics":
        path = workdir / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[-2]["gradient_norm"] *= 1 + 2**-52
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        message = rf"step {NUM_STEPS}: gradient_norm = .* must be .* as without a stop"
    elif what == "a lost step":
        path = workdir / "metrics.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
        message = rf"must have logged the steps 1 to {NUM_STEPS}$"
    else:
        shutil.copytree(
            workdir / "checkpoints/3/arrays",
            workdir / f"checkpoints/{NUM_STEPS}/arrays",
            dirs_exist_ok=True,
        )
        message = r"of the checkpoints of step 6 must be equal bit by bit"
    with pytest.raises(RunError, match=message):
        verify.compare(verified[0] / "whole", workdir, NUM_STEPS)


def test_without_a_workdir_a_check_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify.tempfile, "tempdir", str(tmp_path))

    def train_and_compare(config, directory, num_steps, *flags):
        (directory / "whole").mkdir()
        return f"{directory}, {num_steps} steps, {flags}"

    monkeypatch.setattr(verify, "verify_resume", train_and_compare)
    verify.main("resume", tiny.get_config(), None, 4, ["--cpu_devices=8"])
    assert f"resume: {tmp_path}/disag_jax-verify-" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_without_a_workdir_a_check_that_fails_names_its_runs(tmp_path):
    """The command as it is written; the config has more devices than are simulated."""
    command = [sys.executable, "-m", "disag_jax.verify", "resume", "--config", "configs/tiny.py"]
    done = subprocess.run(
        [*command, "--cpu_devices=1"],
        cwd=REPOSITORY, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == USER_ERROR, done.stderr
    (left,) = tmp_path.glob("disag_jax-verify-*")
    named, error = done.stderr.splitlines()[-2:]
    assert pathlib.Path(named.removeprefix("the runs are in ")) == left
    assert error.startswith("error: split = 8 devices ")
    assert (left / "whole.json").exists()
