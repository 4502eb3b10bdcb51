"""The picture of a run shows the records; a directory without a run is told in one sentence."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from disag_jax import report
from disag_jax.config import Config, ConfigError
from disag_jax.workdir import Workdir

REPOSITORY = pathlib.Path(__file__).parent.parent


def step_record(step, loss=2.0, **fields):
    return {
        "step": step,
        "loss": loss,
        "tokens_per_second": 1000.0,
        "tflops_per_device": 0.5,
        "step_seconds": 1.0,
        "input_wait_seconds": 0.1,
        "pipeline_seconds": 0.6,
        "update_seconds": 0.2,
        "host_seconds": 0.1,
        "expert_load": [1.0 + step / 10, 2.0, 1.5],
        "dead_experts": [0, 1, 0],
        "imbalance_cost": [0.1, 0.2, 0.3],
        **fields,
    }


def evaluation_record(step, loss=2.5):
    return {"step": step, "held_out_loss": loss, "bigram_loss": 2.4}


RECORDS = [
    step_record(5, 3.0), step_record(10, 2.5), evaluation_record(10), step_record(15),
    evaluation_record(15, 2.3),
]  # fmt: skip


def make_run(path, lines) -> str:
    """A workdir with these records, or lines as they are."""
    directory = Workdir(str(path))
    directory.open(Config(), resume=False)
    directory.write_config(Config())
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    directory.metrics.write_text("\n".join(text))
    return str(path)


def read(path, lines):
    return report.read_records(Workdir(make_run(path, lines)).metrics)


def test_picture_is_written_into_the_workdir(tmp_path):
    path = report.draw(make_run(tmp_path / "run", RECORDS))
    assert path == tmp_path / "run" / "report.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_picture_shows_the_records():
    steps = [r for r in RECORDS if "loss" in r]
    figure = report.make_figure(Config(), steps, [r for r in RECORDS if "held_out_loss" in r])
    loss, speed, load, parts = figure.axes[:4]
    lines = [list(line.get_ydata()) for line in loss.get_lines()]
    assert lines == [[3.0, 2.5, 2.0], [2.5, 2.3], [2.4, 2.4]]
    assert speed.get_lines()[0].get_ydata().tolist() == [1000.0] * 3
    (mesh,) = load.collections
    assert mesh.get_array().tolist() == np.transpose([r["expert_load"] for r in steps]).tolist()
    tops = [patch.get_data().values.tolist() for patch in parts.patches]
    assert np.allclose(tops, np.cumsum([[0.6] * 3, [0.2] * 3, [0.1] * 3, [0.1] * 3], axis=0))


@pytest.mark.parametrize(
    "records",
    [
        [step_record(1)],
        [step_record(1, mfu=0.4), step_record(2, mfu=0.5)],
        [step_record(5, expert_load=[1.0, 1.0, 1.0])],
    ],
    ids=["one step", "with MFU", "even load"],
)
def test_other_runs_can_be_drawn(records, tmp_path):
    report.draw(make_run(tmp_path, records))


def test_of_a_resumed_run_the_later_course_counts(tmp_path):
    again = [step_record(10, 1.0), evaluation_record(10, 1.5)]
    steps, evaluations = read(tmp_path, [*RECORDS, *again])
    assert [(r["step"], r["loss"]) for r in steps] == [(5, 3.0), (10, 1.0)]
    assert [(r["step"], r["held_out_loss"]) for r in evaluations] == [(10, 1.5)]


def test_a_line_still_being_written_is_left_out(tmp_path):
    steps, _ = read(tmp_path, [step_record(5), '{"step": 6, "lo'])
    assert [r["step"] for r in steps] == [5]


def test_damaged_line(tmp_path):
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 2 must be JSON"):
        read(tmp_path, [step_record(5), "{", step_record(6)])


def test_run_without_a_step(tmp_path):
    with pytest.raises(ConfigError, match="must hold a run that has logged a step"):
        report.draw(make_run(tmp_path, []))


@pytest.mark.timeout(60)
def test_command(tmp_path):
    command = [sys.executable, "-m", "disag_jax.report"]
    run = make_run(tmp_path / "run", RECORDS)
    done = subprocess.run([*command, run], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"{run}/report.png")
    for mistake in ([], [str(tmp_path / "none")]):
        done = subprocess.run([*command, *mistake], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
