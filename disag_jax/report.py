"""Draws a run: loss, throughput, where a step's time goes, and the load of the experts.

`python -m disag_jax.report WORKDIR` reads WORKDIR/metrics.jsonl and writes WORKDIR/report.png.
"""

import json
import math
import pathlib

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from disag_jax.config import Config, ConfigError
from disag_jax.workdir import Workdir

FILE_NAME = "report.png"

# Stacked from below; the fields and colours of a step's parts.
PARTS = {
    "pipeline": ("pipeline_seconds", "#4c78a8"),
    "update": ("update_seconds", "#f58518"),
    "input wait": ("input_wait_seconds", "#e45756"),
    "host": ("host_seconds", "#b8b8b8"),
}
FEW_RECORDS = 8
TRAINING, HELD_OUT, BASELINE = "#4c78a8", "#e45756", "#707070"

# Loads above this share the darkest colour, or one bad start would leave the rest without contrast.
LOAD_PERCENTILE = 99


def draw(workdir: str) -> pathlib.Path:
    """Draws the run in a directory and returns the picture's path; ConfigError if there is none."""
    directory = Workdir(workdir)
    config = directory.read_config()
    steps, evaluations = read_records(directory.metrics)
    if not steps:
        raise ConfigError(f"workdir = {workdir!r} must hold a run that has logged a step")
    figure = make_figure(config, steps, evaluations)
    path = directory.path / FILE_NAME
    try:
        figure.savefig(path, dpi=140)
    except OSError as error:
        raise ConfigError(f"workdir = {workdir!r} must be writable: {error.strerror}") from error
    return path


def read_records(path: pathlib.Path) -> tuple[list[dict], list[dict]]:
    """The log records of training and of evaluations, each in the order of steps.

    A run that was resumed at an earlier step has logged some steps twice: the later course counts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return [], []
    steps, evaluations = [], []
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines) - 1:
                break  # still being written, or never finished
            raise ConfigError(f"{path}: line {number + 1} must be JSON: {error}") from error
        if "loss" in record:
            if steps and record["step"] <= steps[-1]["step"]:
                steps = [r for r in steps if r["step"] < record["step"]]
                evaluations = [r for r in evaluations if r["step"] < record["step"]]
            steps.append(record)
        elif "held_out_loss" in record:
            # The evaluation of a finished run is repeated by resuming it.
            evaluations = [r for r in evaluations if r["step"] < record["step"]] + [record]
    return steps, evaluations


def make_figure(config: Config, steps: list[dict], evaluations: list[dict]) -> Figure:
    """The picture of a run, from its records."""
    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "font.size": 9,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(12, 7.5), layout="constrained")
        figure.suptitle(_title(config, steps[-1]), x=0.01, ha="left", fontsize=12)
        (loss, speed), (load, parts) = figure.subplots(2, 2)
        _draw_loss(loss, steps, evaluations)
        _draw_speed(speed, steps)
        _draw_load(load, steps)
        _draw_parts(parts, steps)
        for axes in (loss, speed, load, parts):
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            axes.set_xlim(_edges(steps)[0], _edges(steps)[-1])
    return figure


def _title(config: Config, last: dict) -> str:
    split = config.split
    return (
        f"{config.name}: step {last['step']:,} of {config.run.num_steps:,}, "
        f"{split.replicas} x {split.stages} x ({split.attention_workers} attention + "
        f"{split.expert_workers} expert) workers, {config.tokens_per_step:,} tokens a step"
    )


def _draw_loss(axes, steps, evaluations):
    axes.set_title("Loss, nats per token")
    marker = _marker(steps)
    axes.plot(
        _column(steps, "step"), _column(steps, "loss"), marker, color=TRAINING, label="training"
    )
    if evaluations:
        at, values = _column(evaluations, "step"), _column(evaluations, "held_out_loss")
        label = f"held out, last {values[-1]:.3f}"
        axes.plot(at, values, "o-", ms=4, color=HELD_OUT, label=label, clip_on=False)
        baseline = evaluations[-1]["bigram_loss"]
        axes.axhline(baseline, ls="--", color=BASELINE, label=f"bigram model {baseline:.3f}")
    axes.legend()


def _draw_speed(axes, steps):
    values = _column(steps, "tokens_per_second")
    axes.set_title(f"Tokens per second, median {EngFormatter(places=1)(np.nanmedian(values))}")
    axes.plot(_column(steps, "step"), values, _marker(steps), color=TRAINING)
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.set_ylim(0, 1.1 * np.nanmax(values))
    # The right axis says the same in another unit.
    has_mfu = "mfu" in steps[-1]
    scale = np.nanmedian(_column(steps, "mfu" if has_mfu else "tflops_per_device") / values)
    right = axes.secondary_yaxis("right", functions=(lambda y: y * scale, lambda y: y / scale))
    right.set_ylabel("MFU" if has_mfu else "model TFLOP/s per device")
    if has_mfu:
        right.yaxis.set_major_formatter(PercentFormatter(1))


def _draw_parts(axes, steps):
    axes.set_title("Seconds per step")
    bottom, edges = np.zeros(len(steps)), _edges(steps)
    for label, (field, color) in PARTS.items():
        top = bottom + _column(steps, field)
        axes.stairs(top, edges, baseline=bottom, fill=True, color=color, label=label)
        bottom = top
    axes.set_ylim(0, 1.25 * np.nanmax(bottom))
    axes.legend(ncols=len(PARTS), loc="upper left")


def _draw_load(axes, steps):
    """A column per log record, a row per layer, the first on top."""
    load_LN = np.array([r["expert_load"] for r in steps]).T
    top = max(np.percentile(load_LN, LOAD_PERCENTILE), 1 + 1e-3)
    dead, cost = sum(steps[-1]["dead_experts"]), np.mean(steps[-1]["imbalance_cost"])
    axes.set_title(f"Expert load, max over mean; at the end {dead} dead, imbalance cost {cost:.0%}")
    layers = np.arange(len(load_LN) + 1) - 0.5
    image = axes.pcolormesh(_edges(steps), layers, load_LN, vmin=1, vmax=top, cmap="magma_r")
    axes.grid(False)
    axes.set_ylabel("layer")
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.figure.colorbar(image, ax=axes, extend="max" if load_LN.max() > top else "neither")


def _marker(steps: list[dict]) -> str:
    """A line; with points where they are few, since a line of one would not be seen."""
    return "o-" if len(steps) < FEW_RECORDS else "-"


def _column(records: list[dict], field: str) -> np.ndarray:
    return np.array([r.get(field, math.nan) for r in records], float)


def _edges(steps: list[dict]) -> np.ndarray:
    """Where the steps that each record speaks of begin and end."""
    at = _column(steps, "step")
    first = at[0] - (at[1] - at[0] if len(at) > 1 else 1)
    return np.concatenate([[max(first, 0)], at])


def main(*workdirs: str):
    """Draws the runs in some directories."""
    for workdir in workdirs:
        print(draw(workdir))


if __name__ == "__main__":
    from disag_jax import cli

    cli.run(main, arguments="workdir")
