"""Pictures of a plan, a timeline and a page of three panels; and of a step beside its plan."""

import pathlib
from fractions import Fraction

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from disag_jax.errors import ConfigError
from disag_jax.planner import timeline
from disag_jax.planner.prediction import Prediction
from disag_jax.planner.roofline import demand_of
from disag_jax.planner.search import Found
from disag_jax.planner.sizes import Sizes
from disag_jax.planner.topology import StageLinks
from disag_jax.schedule import Schedule, schedule_of

ATTENTION, EXPERT = "#4c78a8", "#e45756"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
         "legend.frameon": False, "font.size": 9}  # fmt: skip


def write_timeline(prediction: Prediction, path: str):
    """Writes a predicted step as a trace that Perfetto (ui.perfetto.dev) opens."""
    spans = timeline.predicted(prediction)
    _write(path, lambda file: timeline.write({"predicted": spans}, file), "timeline")


def write_timelines(
    schedule: Schedule, sources: dict[str, list[timeline.Span]], trace: str, plot: str
):
    """Writes and draws the spans of one step by who tells them, one under the other on one axis.

    trace, plot: files for Perfetto and for the picture; ConfigError if one cannot be written.
    """
    _write(trace, lambda file: timeline.write(sources, file), "timeline")
    windows = [timeline.window(schedule, spans) for spans in sources.values()]
    shown = min(begin for begin, _ in windows), max(end for _, end in windows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.5 * len(sources)), layout="constrained")
        panels = figure.subplots(len(sources), sharex=True, squeeze=False)[:, 0]
        for axes, (source, spans) in zip(panels, sources.items(), strict=True):
            timeline.draw(axes, spans, shown)
            last = max(span.end for span in spans)
            axes.label_outer()
            axes.set_title(f"{source}, around the first losses of a step of {last:.3f} s")
        timeline.add_legend(panels[0])
        _write(plot, lambda file: figure.savefig(file, dpi=140), "plot")


def write_page(prediction: Prediction, path: str, ratios: dict[tuple[int, Fraction], Found]):
    """Draws timeline, roofline, and step time against the ratio of the roles; PNG or PDF.

    ratios: `search.fastest_of_ratios` of the same devices.
    """
    with matplotlib.rc_context(STYLE):
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
        _draw_ratios(figure.add_subplot(grid[1, 1]), prediction, ratios)
        _write(path, lambda file: figure.savefig(file, dpi=140), "plot")


def check_writable(path: str, flag: str):
    """ConfigError unless a file of this name can be drawn and be there; nothing is written."""
    file = pathlib.Path(path).resolve()
    if not file.parent.is_dir() or file.is_dir():
        raise ConfigError(f"--{flag} = {path!r} must be in a directory that exists, and be none")
    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if flag == "plot" and file.suffix.lower().removeprefix(".") not in kinds:
        raise ConfigError(f"--plot = {path!r} must end in one of {', '.join(kinds)}")


def _draw_timeline(axes, prediction: Prediction):
    spans = timeline.predicted(prediction)
    timeline.draw(axes, spans, timeline.window(schedule_of(prediction.config), spans))
    timeline.add_legend(axes)
    axes.set_title("Units of work, around the first losses")


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
    axes.legend(loc="upper left")


def _draw_ratios(axes, pick: Prediction, ratios: dict[tuple[int, Fraction], Found]):
    """Time per token of the fastest split of each ratio of attention to experts that fits."""
    by_hop: dict[int, list[tuple[float, float]]] = {}
    for (hop, share), found in sorted(ratios.items()):
        by_hop.setdefault(hop, []).append((float(share), 1e6 * found.seconds_per_token))
    for hop, points in by_hop.items():
        axes.plot(*zip(*points, strict=True), "o-", ms=4, label=f"hop {hop}")
    if not by_hop:
        axes.text(0.5, 0.5, "none fits", ha="center", transform=axes.transAxes)
    label = f"the pick, {pick.config.split.placement}"
    axes.axhline(1e6 / pick.tokens_per_second, ls="--", color="#707070", label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("attention workers' share of a stage")
    axes.set_ylabel("microseconds per token")
    axes.set_title("Fastest disaggregated split of each ratio of attention to experts")
    axes.legend()


def _write(path: str, write, flag: str):
    try:
        write(pathlib.Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--{flag} = {path!r} must be writable: {error}") from error
