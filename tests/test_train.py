"""The command and the run: end to end, resumed, and with the mistakes that users make."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from configs import tiny
from disag_jax import startup_report, training
from disag_jax.bad_numbers import NonFiniteLossError
from disag_jax.config import ConfigError, Dtype, PlacementKind, SplitConfig
from disag_jax.saved_checkpoint import saved_steps
from disag_jax.schedule import IDLE, schedule_of
from disag_jax.step import Stepper
from layers import target
from tests import support

REPOSITORY = pathlib.Path(__file__).parent.parent


def records(workdir) -> list[dict]:
    return [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").open()]


def test_run_then_resume_gives_the_same_next_losses(small_run, capsys):
    config, workdir = small_run
    result = training.train(config, workdir, profile_steps=range(4, 5))
    saves = [r for r in records(workdir) if "checkpoint_seconds" in r]
    assert [r["step"] for r in saves] == [2, 4, 6] and saves[0]["checkpoint_seconds"] > 0
    printed = capsys.readouterr().out
    for fact in ("split", "experts 0-1", "parameters", "periods a step", "held-out loss", "bigram"):
        assert fact in printed
    steps = [r for r in records(workdir) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 7))
    assert steps[-1]["loss"] < steps[0]["loss"]
    for field in ("expert_load", "dead_experts", "dropped_pairs", "tokens_per_second"):
        assert field in steps[0]
    parts = ("input_wait", "pipeline", "update", "host")
    for record in steps:
        seconds = [record[f"{part}_seconds"] for part in parts]
        assert min(seconds) > 0 and sum(seconds) == pytest.approx(record["step_seconds"])
    assert "compile_seconds" in steps[0] and "compile_seconds" not in steps[-1]
    assert result == records(workdir)[-1]
    assert result["perplexity"] == pytest.approx(np.exp(result["held_out_loss"]))
    assert result["bits_per_byte"] == pytest.approx(result["held_out_loss"] / np.log(2))
    assert list(pathlib.Path(workdir).glob("tensorboard/events*"))
    (trace,) = pathlib.Path(workdir).glob("profile/plugins/profile/*/*.xplane.pb")
    for scope in (b"attention_forward", b"expert_forward", b"m2n_forward", b"input_wait"):
        assert scope in trace.read_bytes()
    assert "timeline  of the last step traced" in printed
    assert_timeline_is_of_the_schedule(config, pathlib.Path(workdir) / "profile")

    with pytest.raises(ConfigError, match=r"step = 3 must be one of the checkpoints .*: 2, 4, 6$"):
        training.train(config, workdir, resume=True, step=3)
    shorter = dataclasses.replace(config, run=dataclasses.replace(config.run, num_steps=5))
    with pytest.raises(
        ConfigError, match=r"run.num_steps = 5 must be at least 6, the step of the ch"
    ):
        training.train(shorter, workdir, resume=True)
    written = len(records(workdir))
    with pytest.raises(ConfigError, match=r"compute_dtype = float64 must be bfloat16 for a pre"):
        training.train(config, workdir, resume=True, step=4, hardware="h100")
    assert len(records(workdir)) == written
    capsys.readouterr()
    training.train(config, workdir, resume=True, step=4)
    assert "resumed   from step 4\n" in capsys.readouterr().out
    again = [r for r in records(workdir)[written:] if "loss" in r]
    assert [r["step"] for r in again] == [5, 6]
    for first, second in zip(steps[4:], again, strict=True):
        assert first["loss"] == second["loss"] and first["gradient_norm"] == second["gradient_norm"]
    assert training.train(config, workdir, resume=True) == result


def assert_timeline_is_of_the_schedule(config, directory):
    """Each worker ran its row of the table in its order, and nothing else."""
    events = json.loads((directory / "timeline.json").read_text())["traceEvents"]
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    schedule, split = schedule_of(config), config.split
    workers = split.attention_workers + split.expert_workers
    own = [track for track, name in tracks.items() if "transfers" not in name]
    # On the CPU transfers of both directions overlap: some have a track beside the other.
    assert len(own) == split.stages * workers and len(tracks) >= 2 * len(own)
    for track in own:
        done = [e for e in events if (e["pid"], e["tid"]) == track and e["ph"] == "X"]
        done.sort(key=lambda e: e["ts"])
        role = int(tracks[track].startswith("expert"))
        for kind in ("forward", "backward"):
            table = getattr(schedule, kind)[:, track[0], role].tolist()
            assert [e["name"] for e in done if e["cat"] == kind] == [
                f"{kind} of micro-batch {micro_batch}, layer {row * split.stages + track[0]}"
                for micro_batch, row, _ in table
                if micro_batch != IDLE
            ]
        assert [e["name"] for e in done if e["cat"] == "loss"] == [
            f"loss of micro-batch {i}" for i in range(config.batch.micro_batches)
        ]
        outside = {e["name"] for e in done if e["cat"] == "outside"}
        assert outside == {"gather weights", "reduce gradients", "optimizer"}
    assert (directory / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_nan_loss_stops_the_run_and_says_the_step(small_run, monkeypatch, capsys):
    """Step 2 alone is bad, then all from step 4."""
    config, workdir = small_run
    change(config, "run", max_skipped_steps=3, log_every=2)
    train_step = Stepper.train_step

    def diverge(self, state, batch):
        if state.step not in (1, 3, 4, 5):
            return train_step(self, state, batch)
        vocabulary = {name: x * np.nan for name, x in state.vocabulary.items()}
        after, metrics = train_step(self, dataclasses.replace(state, vocabulary=vocabulary), batch)
        return dataclasses.replace(after, vocabulary=state.vocabulary), metrics

    monkeypatch.setattr(Stepper, "train_step", diverge)
    with pytest.raises(NonFiniteLossError, match=r"step 6: loss = nan .*skipped .* = 3 in a row"):
        training.train(config, workdir)
    assert "step 5: loss = nan" in capsys.readouterr().out
    skips = [record for record in records(workdir) if "skipped_steps" in record]
    assert [(r["step"], r["skipped_steps"]) for r in skips] == [(2, 1), (4, 2), (5, 3), (6, 4)]
    assert len(skips[0]["non_finite_expert"]) == config.model.num_layers
    assert all("loss" not in record for record in skips)
    # That of step 2 waited for a good step; those of 4 and 6 would have taken the place of older.
    assert saved_steps(pathlib.Path(workdir, "checkpoints")) == [3]


def change(config, section, **fields):
    setattr(config, section, dataclasses.replace(getattr(config, section), **fields))


def test_device_count(small_run):
    config, workdir = small_run
    change(config, "split", expert_workers=2)
    with pytest.raises(ConfigError, match=r"split = 6 devices .* must equal the 8 cpu devices"):
        training.train(config, workdir)


def test_missing_text(small_run):
    config, workdir = small_run
    change(config, "data", paths=("/no/such/text",))
    with pytest.raises(ConfigError, match=r"data\.paths = '/no/such/text' must"):
        training.train(config, workdir)


def test_token_outside_the_vocabulary(small_run):
    config, workdir = small_run
    change(config, "model", vocab_size=100)
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 100 must"):
        training.train(config, workdir)


def test_text_too_short(small_run, tmp_path):
    config, workdir = small_run
    (tmp_path / "short.txt").write_text("a\nb\n")
    change(config, "data", paths=(str(tmp_path / "short.txt"),))
    with pytest.raises(ConfigError, match="fewer than one sequence"):
        training.train(config, workdir)


def test_used_workdir(small_run):
    config, workdir = small_run
    pathlib.Path(workdir).mkdir()
    (pathlib.Path(workdir) / "config.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"workdir = .* must be new: it holds another run's config.json"
    ):
        training.train(config, workdir)


def test_unwritable_workdir(small_run, tmp_path):
    config, _ = small_run
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"workdir = .* must be a writable directory"):
        training.train(config, str(tmp_path / "file" / "run"))


def test_one_checkpoint_is_too_few(small_run):
    config, workdir = small_run
    config.run.keep_checkpoints = 1
    with pytest.raises(ConfigError, match="keep_checkpoints = 1 must be 2 or more: whether the"):
        training.train(config, workdir)


def test_resume_needs_a_run(small_run):
    config, workdir = small_run
    with pytest.raises(ConfigError, match="must hold a run to resume"):
        training.train(config, workdir, resume=True)


def test_resume_with_another_model(small_run):
    config, workdir = small_run
    pathlib.Path(workdir).mkdir()
    before = dataclasses.asdict(config)
    before["model"]["num_layers"] = 7
    (pathlib.Path(workdir) / "config.json").write_text(json.dumps(before))
    with pytest.raises(ConfigError, match=r"model\.num_layers = 2 must be 7"):
        training.train(config, workdir, resume=True)


@pytest.mark.parametrize("queues, warns", [("1", True), ("32", False)])
def test_few_hardware_queues_are_a_warning_on_gpus(queues, warns, monkeypatch):
    stepper = support.make_stepper(support.small_config(SplitConfig()))
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", queues)
    warning = "CUDA_DEVICE_MAX_CONNECTIONS = 1 of the environment should be 32"
    assert warning not in startup_report.start_up(stepper, "text")
    monkeypatch.setattr(target, "is_gpu", lambda: True)
    assert (warning in startup_report.start_up(stepper, "text")) == warns


@pytest.mark.parametrize("micro_batches, warns", [(4, False), (5, True), (8, False)])
def test_uneven_waves_are_a_warning_with_the_idle_share(micro_batches, warns):
    split = SplitConfig(stages=2, attention_workers=1, expert_workers=3)
    stepper = support.make_stepper(support.small_config(split, micro_batches))
    said = startup_report.start_up(stepper, "text")
    warning = f"batch.micro_batches = {micro_batches} should be a multiple of 2 * split.stages"
    assert (warning in said) == warns
    if warns:
        assert f"the idle share is {stepper.schedule.idle_share:.3f}" in said


COMMAND_MISTAKES = {
    "unknown field": (
        ["--config.model.num_layer=3"],
        "config.model.num_layer = '3' must be a field of ModelConfig: vocab_size, num_layers",
    ),
    "unknown section": (["--config.modle.top_k=3"], "config.modle.top_k = '3' must be a field of"),
    "wrong type": (
        ["--config.model.num_layers=few"],
        "config.model.num_layers = 'few' must be an integer",
    ),
    "no number": (
        ["--config.optimizer.peak_learning_rate=high"],
        "config.optimizer.peak_learning_rate = 'high' must be a number",
    ),
    "not a choice": (["--config.model.router_score=best"], "softmax|sigmoid"),
    "broken rule": (["--config.model.top_k=13"], "model.top_k = 13 must be at most"),
    "stray argument": (["configs/tiny.py"], "argument 'configs/tiny.py' must be a flag"),
    "dry run of no split": (
        ["--dry_run", "--hardware=h100", "--config.split.placement=auto"],
        "split.placement = 'auto' must be disaggregated or colocated for --dry_run, which compiles "
        "one split: `python -m disag_jax.plan` finds one",
    ),
    "missing file": (
        ["--config=configs/none.py"],
        "--config = 'configs/none.py' must be a Python file whose get_config() returns a Config",
    ),
    "missing file, a word of its own": (
        ["--config", "none.py"],
        "--config = 'none.py' must be a Python file whose get_config() returns a Config",
    ),
}


@pytest.mark.parametrize("name", COMMAND_MISTAKES)
@pytest.mark.timeout(60)
def test_command_tells_a_mistake_in_one_sentence(name, tmp_path):
    arguments, sentence = COMMAND_MISTAKES[name]
    command = [
        sys.executable, "train.py", f"--workdir={tmp_path}/run", "--cpu_devices=8",
        *([] if name.startswith("missing file") else ["--config=configs/tiny.py"]), *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_tiny_config_is_the_promised_split():
    config = tiny.get_config().validate()
    split = config.split
    assert (split.stages, split.attention_workers, split.expert_workers) == (2, 1, 3)
    assert split.num_devices == 8 and config.model.num_experts == 12


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """As much of a device as is looked at before meshes are made."""

    platform: str
    device_kind: str


def meshes_on(devices, monkeypatch, **changes):
    config = tiny.get_config()
    for section, fields in changes.items():
        setattr(config, section, dataclasses.replace(getattr(config, section), **fields))
    monkeypatch.setattr(training.jax, "devices", lambda: devices)
    return training.make_meshes(config.validate())


def test_no_accelerator_is_said_with_what_to_do(monkeypatch):
    with pytest.raises(ConfigError, match=r"must equal the 1 cpu devices here: no accelerator"):
        meshes_on([FakeDevice("cpu", "cpu")], monkeypatch)
    with pytest.raises(ConfigError, match=r"--cpu_devices = 0 must be 1 or more here: no accel"):
        training.check_accelerator()
    monkeypatch.setattr(training.jax, "devices", lambda: [FakeDevice("gpu", "H100")])
    training.check_accelerator()


def test_gpus_of_several_kinds_are_refused(monkeypatch):
    devices = [FakeDevice("gpu", "H100")] * 7 + [FakeDevice("gpu", "A100")]
    with pytest.raises(ConfigError, match=r"must be of one kind, not A100, H100"):
        meshes_on(devices, monkeypatch)


def test_head_dims_that_cudnn_refuses_are_refused(monkeypatch):
    devices = [FakeDevice("gpu", "H100")] * 8
    changes = {"model": {"head_dim": 12}, "run": {"compute_dtype": Dtype.BFLOAT16}}
    with pytest.raises(ConfigError, match=r"model.head_dim = 12 must be a multiple of 8 on GPUs"):
        meshes_on(devices, monkeypatch, **changes)


def test_colocated_mappings_must_fit_the_devices(monkeypatch):
    devices = [FakeDevice("gpu", "H100")] * 8
    three = {"placement": PlacementKind.COLOCATED, "attention_workers": 3, "expert_workers": 3}
    with pytest.raises(ConfigError, match=r"split = 6 devices .* must equal the 8 gpu devices"):
        meshes_on(devices, monkeypatch, split=three)
