"""Checks of a config on the machine at hand that a promise holds for it.

  python -m disag_jax.verify resume --config configs/tiny.py --cpu_devices 8

`resume` trains once without a break and once with a stop and a resumption half way, as commands of
their own, and compares what came out bit for bit: the metrics of every step, and all arrays of the
last checkpoint, optimizer state included. On GPUs it wants `--deterministic`. The runs are in
`--workdir`, or else in a temporary directory that is left, and named, only where the check fails.
"""

import contextlib
import copy
import dataclasses
import pathlib
import shutil
import subprocess
import sys
import tempfile

from disag_jax import launch
from disag_jax.config import Config, ConfigError
from disag_jax.errors import USER_ERROR, RunError
from disag_jax.report import read_records
from disag_jax.saved_checkpoint import SavedCheckpoint
from disag_jax.workdir import Workdir, new_directory

CHECKS = ("resume",)
# Fields of a record that say how fast the machine was.
SPEED = (
    "tokens_per_second", "tflops_per_device", "mfu", "peak_memory_gib", "worker_milliseconds",
    "host_seconds_of",
)  # fmt: skip


def verify_resume(config: Config, directory: pathlib.Path, num_steps: int, *flags: str) -> str:
    """Trains `num_steps` whole and in two halves; what was compared, in words.

    RunError if a bit differs. `flags` are more of `train.py`, such as "--cpu_devices=8".
    """
    config = copy.deepcopy(config)
    config.run = dataclasses.replace(config.run, log_every=1, eval_batches=0, checkpoint_every=0)
    whole, halves = directory / "whole", directory / "halves"
    _train(config, whole, f"--stop_after={num_steps}", *flags)
    _train(config, halves, f"--stop_after={num_steps // 2}", *flags)
    _train(config, halves, "--resume", f"--stop_after={num_steps}", *flags)
    return compare(whole, halves, num_steps)


def compare(whole: pathlib.Path, halves: pathlib.Path, num_steps: int) -> str:
    """Compares the runs of two workdirs up to a step, as `verify_resume` does."""
    records = [read_records(Workdir(str(path)).metrics)[0] for path in (whole, halves)]
    steps = [[record["step"] for record in of_run] for of_run in records]
    if not steps[0] == steps[1] == list(range(1, num_steps + 1)):
        raise RunError(f"{whole} and {halves} must have logged the steps 1 to {num_steps}")
    for first, second in zip(*records, strict=True):
        for field in first.keys() | second.keys():
            if field not in SPEED and not field.endswith("_seconds"):
                _require_equal(first.get(field), second.get(field), first["step"], field)
    saved = [SavedCheckpoint.open(path / "checkpoints", num_steps) for path in (whole, halves)]
    for name in saved[0].leaves:
        first, second = (checkpoint.read(name).tobytes() for checkpoint in saved)
        if first != second:
            raise RunError(
                f"{name} of the checkpoints of step {num_steps} must be equal bit by bit"
            )
    return (
        f"the metrics of {num_steps} steps and the {len(saved[0].leaves)} arrays of the last "
        "checkpoint are equal bit for bit"
    )


def _require_equal(first, second, step: int, field: str):
    # Python writes and reads the shortest decimals that stand for a float's exact bits.
    if first != second:
        raise RunError(
            f"step {step}: {field} = {second} of the resumed run must be {first}, as without a stop"
        )


def _train(config: Config, workdir: pathlib.Path, *flags: str):
    command = launch.train_command(config, workdir, *flags)
    with tempfile.TemporaryFile("w+") as errors:
        code = launch.run(command, stdout=subprocess.DEVNULL, stderr=errors)
        errors.seek(0)
        said = launch.last_line(errors.read()).removeprefix("error: ")
        if code == USER_ERROR:
            raise ConfigError(said)
        if code:
            raise RunError(f"{' '.join(flags)}: {said}")


def main(check: str, config: Config, workdir: str | None, num_steps: int, flags: list[str]):
    """Runs one of CHECKS; RunError if it fails.

    workdir: for the runs that are compared, which stay there; None is a temporary directory.
    """
    if check not in CHECKS:
        raise ConfigError(f"check = {check!r} must be one of {', '.join(CHECKS)}")
    config.validate()
    if num_steps % 2 or not 2 <= num_steps <= config.run.num_steps:
        raise ConfigError(
            f"--steps = {num_steps} must be even and at most run.num_steps = {config.run.num_steps}"
        )
    with (
        _temporary_directory()
        if workdir is None
        else contextlib.nullcontext(new_directory(workdir)) as directory
    ):
        print(f"{check}: {verify_resume(config, directory, num_steps, *flags)}")


@contextlib.contextmanager
def _temporary_directory():
    """A directory that is removed at the end; after an error it stays, to be looked into."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="disag_jax-verify-"))
    try:
        yield directory
    except BaseException:
        print(f"the runs are in {directory}", file=sys.stderr)
        raise
    shutil.rmtree(directory)


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli

    _CONFIG = cli.define_config_flag()
    _WORKDIR = flags.DEFINE_string(
        "workdir", None, "directory for the runs that are compared; default: a temporary one"
    )
    _STEPS = flags.DEFINE_integer("steps", 6, "optimizer steps; the stop is after half of them")
    _CPU_DEVICES = cli.define_cpu_devices_flag()
    _DETERMINISTIC = flags.DEFINE_bool("deterministic", False, "as of train.py, for GPUs")
    flags.mark_flags_as_required(["config"])

    def _run(check):
        more = [f"--cpu_devices={_CPU_DEVICES.value}"]
        more += ["--deterministic"] if _DETERMINISTIC.value else []
        main(check, _CONFIG.value, _WORKDIR.value, _STEPS.value, more)

    cli.run(_run, arguments="check")
