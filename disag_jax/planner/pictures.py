"""Pictures of a plan: a timeline for Perfetto, and a page of three panels."""

import dataclasses
import json
import pathlib

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from disag_jax.config import PlacementKind
from disag_jax.errors import ConfigError
from disag_jax.planner.costs import Costs
from disag_jax.planner.prediction import Prediction, predict, simulate_step
from disag_jax.planner.roofline import demand_of
from disag_jax.planner.search import Fixed, candidates
from disag_jax.planner.simulator import Run
from disag_jax.planner.sizes import Sizes
from disag_jax.planner.topology import StageLinks
from disag_jax.schedule import IDLE, schedule_of

COLOURS = {"forward": "#4c78a8", "backward": "#f58518", "loss": "#54a24b", "wait": "#d9d9d9"}
ATTENTION, EXPERT = "#4c78a8", "#e45756"

# Classes of workers and seconds of a step that the page has room for.
SHOWN_CLASSES, SHOWN_PERIODS = 8, 40


@dataclasses.dataclass(frozen=True)
class Span:
    """Something that a class of workers does: seconds from the beginning of the loop."""

    stage: int
    role: str
    kind: str
    name: str
    begin: float
    end: float


def spans(prediction: Prediction) -> list[Span]:
    """Every unit, loss and wait of a predicted step, by stage and role."""
    config = prediction.config
    schedule, run = schedule_of(config), _whole_run(prediction)
    roles = ["worker"] if config.split.colocated else ["attention", "expert"]
    found = []
    for column in range(run.begin.shape[1]):
        stage, role = divmod(column, len(roles))
        for period in range(schedule.num_periods):
            for kind, table, begin, end in (
                ("forward", schedule.forward, run.begin, run.forward_end),
                ("backward", schedule.backward, run.backward_begin, run.backward_end),
            ):
                micro_batch, row, _ = table[period, stage, role].tolist()
                if micro_batch != IDLE:
                    layer = row * schedule.stages + stage
                    name = f"{kind} of micro-batch {micro_batch}, layer {layer}"
                    found.append(
                        Span(stage, roles[role], kind, name, begin[period, column],
                             end[period, column])
                    )  # fmt: skip
            waits = (
                (run.forward_end, run.backward_begin),
                (run.backward_end, run.loss_begin),
            )
            for begin, end in waits:
                if end[period, column] > begin[period, column]:
                    found.append(
                        Span(stage, roles[role], "wait", "wait for transfers and others",
                             begin[period, column], end[period, column])
                    )  # fmt: skip
            if schedule.loss[period] != IDLE:
                name = f"loss of micro-batch {schedule.loss[period]}"
                found.append(
                    Span(stage, roles[role], "loss", name, run.loss_begin[period, column],
                         run.end[period, column])
                )  # fmt: skip
    return found


def write_timeline(prediction: Prediction, path: str):
    """Writes the spans as a trace that Perfetto (ui.perfetto.dev) opens: a track for each class."""
    events, tracks = [], {}
    for span in spans(prediction):
        track = tracks.setdefault((span.stage, span.role), len(tracks))
        events.append(
            {"ph": "X", "pid": span.stage, "tid": track, "name": span.name, "cat": span.kind,
             "ts": 1e6 * span.begin, "dur": 1e6 * (span.end - span.begin)}
        )  # fmt: skip
    for (stage, role), track in tracks.items():
        names = (("process_name", f"stage {stage}"), ("thread_name", role))
        events += [
            {"ph": "M", "pid": stage, "tid": track, "name": kind, "args": {"name": name}}
            for kind, name in names
        ]
    _write(path, lambda file: file.write_text(json.dumps({"traceEvents": events})), "timeline")


def write_page(prediction: Prediction, path: str, load_factor: float | None = None):
    """Draws timeline, roofline, and step time against the ratio of the roles; PNG or PDF.

    load_factor: as `predict` takes it, for the other ratios.
    """
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
             "legend.frameon": False, "font.size": 9}  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(12, 7.5), layout="constrained")
        grid = figure.add_gridspec(2, 2)
        split = prediction.config.split
        figure.suptitle(
            f"{prediction.config.name} on {split.num_devices} x {prediction.hardware.name}, "
            f"predicted: {prediction.step_seconds:.3f} s a step, MFU {prediction.mfu:.1%}",
            x=0.01, ha="left", fontsize=12,
        )  # fmt: skip
        _draw_timeline(figure.add_subplot(grid[0, :]), prediction)
        _draw_roofline(figure.add_subplot(grid[1, 0]), prediction)
        _draw_ratios(figure.add_subplot(grid[1, 1]), prediction, load_factor)
        _write(path, lambda file: figure.savefig(file, dpi=140), "plot")


def check_writable(path: str, flag: str):
    """ConfigError unless a file of this name can be drawn and be there; nothing is written."""
    file = pathlib.Path(path).resolve()
    if not file.parent.is_dir() or file.is_dir():
        raise ConfigError(f"--{flag} = {path!r} must be in a directory that exists, and be none")
    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if flag == "plot" and file.suffix.lower().removeprefix(".") not in kinds:
        raise ConfigError(f"--plot = {path!r} must end in one of {', '.join(kinds)}")


def _whole_run(prediction: Prediction) -> Run:
    """The clocks with no wave left out."""
    sizes = Sizes.of(prediction.config, prediction.load_factor)
    return simulate_step(Costs(sizes, prediction.hardware), shorten=False)


def _draw_timeline(axes, prediction: Prediction):
    """The first classes of workers, from the first loss on: where warm-up meets steady state."""
    run = prediction.run
    first = schedule_of(prediction.config).first_backward
    last = min(first + SHOWN_PERIODS, len(run.begin)) - 1
    begin, end = run.begin[max(0, first - SHOWN_PERIODS // 4)].min(), run.end[last].max()
    labels = {}
    for span in spans(prediction):
        label = f"{span.role} {span.stage}"
        if label not in labels and len(labels) == SHOWN_CLASSES:
            break
        row = labels.setdefault(label, len(labels))
        if span.end > begin and span.begin < end:
            axes.barh(
                row, span.end - span.begin, left=span.begin, height=0.8,
                color=COLOURS[span.kind], edgecolor="white", linewidth=0.3,
            )  # fmt: skip
    axes.set_xlim(begin, end)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("seconds from the beginning of the loop")
    axes.set_title("Units of work, around the first losses")
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    axes.legend(handles=handles, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))


def _draw_roofline(axes, prediction: Prediction):
    """Both roles' model FLOP/s per device against their FLOPs per byte sent."""
    config, hardware = prediction.config, prediction.hardware
    split = config.split
    demand = demand_of(config, split.expert_workers)
    placement = Sizes.of(config).placement
    link = StageLinks.of(placement, hardware).pipeline.many_to_many
    bandwidth = 1e9 * link.gigabytes_per_second * link.efficiency
    peak = 1e12 * hardware.product_tflops * hardware.product_efficiency
    copies = split.replicas * split.stages
    experts = split.attention_workers if split.colocated else split.expert_workers
    points = {
        "attention": (demand.attention, copies * split.attention_workers, ATTENTION),
        "experts": (demand.expert, copies * experts, EXPERT),
    }
    intensities = [flops / demand.transfer for flops, *_ in points.values()]
    low, high = min(*intensities, peak / bandwidth) / 4, max(*intensities, peak / bandwidth) * 4
    x = np.geomspace(low, high, 200)
    axes.loglog(x, np.minimum(peak, bandwidth * x) / 1e12, color="#707070")
    for (name, (flops, devices, colour)), at in zip(points.items(), intensities, strict=True):
        reached = flops * prediction.tokens_per_second / devices / 1e12
        axes.plot(at, reached, "o", color=colour, label=f"{name}, {reached:.0f} TFLOP/s")
    axes.set_xlabel("FLOPs per byte sent to the other role")
    axes.set_ylabel("TFLOP/s per device")
    axes.set_title("Roofline of the links")
    axes.legend(loc="lower right")


def _draw_ratios(axes, prediction: Prediction, load_factor: float | None):
    """Time per token of every division of a stage into attention and experts that fits."""
    config, split = prediction.config, prediction.config.split
    fixed = Fixed(
        replicas=split.replicas, stages=split.stages,
        tokens_per_worker=config.batch.tokens_per_worker,
    )  # fmt: skip
    by_hop: dict[int, list[tuple[float, float]]] = {}
    kind = PlacementKind.DISAGGREGATED
    for one in candidates(config, split.num_devices, kind, fixed):
        found = predict(one, prediction.hardware, load_factor)
        if not found.fits:
            continue
        workers = one.split.attention_workers + one.split.expert_workers
        share = one.split.attention_workers / workers
        by_hop.setdefault(one.split.hop, []).append((share, 1e6 / found.tokens_per_second))
    for hop, points in by_hop.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", ms=4, label=f"hop {hop}")
    axes.axhline(1e6 / prediction.tokens_per_second, ls="--", color="#707070", label="the pick")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("attention workers' share of a stage")
    axes.set_ylabel("microseconds per token")
    axes.set_title("Step time against the ratio of attention to experts")
    axes.legend()


def _write(path: str, write, flag: str):
    try:
        write(pathlib.Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--{flag} = {path!r} must be writable: {error}") from error
