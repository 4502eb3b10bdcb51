"""What each worker does in a step, as spans of time: predicted ones, and how either kind is drawn.

A run that is profiled measures the same spans (disag_jax/measured_timeline.py). Both count from the
step's first work on a device and have the same kinds and names, so that they can be laid side by
side: `write` makes a trace for Perfetto (ui.perfetto.dev), `draw` a panel of a picture.
"""

import dataclasses
import json
import pathlib

from disag_jax.planner.costs import Costs
from disag_jax.planner.prediction import Prediction, simulate_step, timing_of
from disag_jax.planner.simulator import make_table, transfer_times
from disag_jax.planner.sizes import Sizes
from disag_jax.schedule import IDLE, Schedule, schedule_of

COLOURS = {
    "forward": "#4c78a8", "backward": "#f58518", "loss": "#54a24b", "wait": "#d9d9d9",
    "transfer": "#b279a2", "outside": "#9d755d",
}  # fmt: skip
WAIT = "wait for transfers and others"
BEFORE_LOOP = "gather weights"

ROUNDING = 1e-9  # seconds by which spans that follow one another may seem to overlap

# Workers that a panel has room for, and periods of a step where that is enough.
SHOWN_WORKERS, SHOWN_PERIODS = 8, 40


@dataclasses.dataclass(frozen=True)
class Span:
    """Something that a worker, or a class of them, does; seconds from the beginning of the step.

    Attributes:
      worker: within the stage, such as "attention" for all of the role, or "attention 1".
      kind: of `COLOURS`; a transfer runs beside the others.
    """

    stage: int
    worker: str
    kind: str
    name: str
    begin: float
    end: float

    @property
    def track(self) -> str:
        """The worker, or its transfers."""
        return f"{self.worker} transfers" if self.kind == "transfer" else self.worker


def unit_name(schedule: Schedule, kind: str, period: int, stage: int, role: int) -> str | None:
    """What a forward or backward unit is called; None where the table has none."""
    micro_batch, row, _ = getattr(schedule, kind)[period, stage, role].tolist()
    if micro_batch == IDLE:
        return None
    return f"{kind} of micro-batch {micro_batch}, layer {row * schedule.stages + stage}"


def predicted(prediction: Prediction) -> list[Span]:
    """Every unit, loss, wait and transfer of a predicted step, and what is around its loop."""
    config, outside = prediction.config, dict(prediction.outside_loop)
    costs = Costs(Sizes.of(config, prediction.load_factor), prediction.hardware)
    schedule, run = schedule_of(config), simulate_step(costs, shorten=False)
    first = outside.pop(BEFORE_LOOP)
    workers = ["worker"] if config.split.colocated else ["attention", "expert"]
    found = []
    for column in range(run.begin.shape[1]):
        stage, role = divmod(column, len(workers))

        def add(kind, name, begin, end, stage=stage, worker=workers[role]):
            if end > begin:
                found.append(Span(stage, worker, kind, name, float(begin), float(end)))

        clocks = dataclasses.replace(
            run, **{name: first + getattr(run, name)[:, column] for name in _CLOCKS}
        )
        add("outside", BEFORE_LOOP, 0.0, first)
        _add_loop(add, schedule, clocks, stage, role)
        at = first + run.seconds
        for name, seconds in outside.items():
            add("outside", name, at, at + seconds)
            at += seconds
    table = make_table(
        config.model.num_layers, schedule.stages, schedule.micro_batches, schedule.hop,
        schedule.colocated,
    )  # fmt: skip
    for kind, _, begins, ends in transfer_times(table, timing_of(costs), run):
        for column, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            stage, role = divmod(column, len(workers))
            if end > begin:
                span = Span(stage, workers[role], "transfer", f"{kind} transfer",
                            float(first + begin), float(first + end))  # fmt: skip
                found.append(span)
    return found


_CLOCKS = (
    "begin",
    "forward_end",
    "backward_begin",
    "backward_end",
    "loss_begin",
    "loss_end",
    "end",
)


def _add_loop(add, schedule: Schedule, clocks, stage: int, role: int):
    """Adds one class's units, losses and waits; clocks [periods]."""
    for period in range(schedule.num_periods):
        for kind, begin, end, then in (
            ("forward", clocks.begin, clocks.forward_end, clocks.backward_begin),
            ("backward", clocks.backward_begin, clocks.backward_end, clocks.loss_begin),
        ):
            name = unit_name(schedule, kind, period, stage, role)
            # A twin's exchanges take time without a unit too.
            add(*((kind, name) if name else ("wait", WAIT)), begin[period], end[period])
            add("wait", WAIT, end[period], then[period])
        if schedule.loss[period] != IDLE:
            name = loss_name(schedule, period)
            add("loss", name, clocks.loss_begin[period], clocks.loss_end[period])
            add("wait", WAIT, clocks.loss_end[period], clocks.end[period])


def loss_name(schedule: Schedule, period: int) -> str | None:
    """What the loss of a period is called; None where none is due."""
    micro_batch = schedule.loss[period]
    return None if micro_batch == IDLE else f"loss of micro-batch {micro_batch}"


def write(sources: dict[str, list[Span]], path: pathlib.Path):
    """Writes spans as a trace, by who tells them: a process a stage, a thread a track.

    What begins before the track's last span has ended, as phases of an interleaved twin do, has a
    track beside it.
    """
    events = []
    for number, (source, spans) in enumerate(sources.items()):
        stages = 1 + max(span.stage for span in spans)
        tracks, ends = {}, {}
        for span in sorted(spans, key=lambda span: span.begin):
            process, track = number * stages + span.stage, span.track
            # Perfetto shows no span that ends after the one in which it begins.
            if span.begin < ends.get((process, track), 0.0) - ROUNDING:
                track += " beside"
            ends[process, track] = span.end
            thread = tracks.setdefault((process, span.stage, track), len(tracks))
            events.append(
                {"ph": "X", "pid": process, "tid": thread, "name": span.name, "cat": span.kind,
                 "ts": 1e6 * span.begin, "dur": 1e6 * (span.end - span.begin)}
            )  # fmt: skip
        for (process, stage, track), thread in tracks.items():
            names = (("process_name", f"stage {stage}, {source}"), ("thread_name", track))
            events += [
                {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": {"name": name}}
                for kind, name in names
            ]
    path.write_text(json.dumps({"traceEvents": events}))


def window(schedule: Schedule, spans: list[Span]) -> tuple[float, float]:
    """Seconds that a panel shows: around the first loss, where warm-up meets steady state.

    A forward and a backward unit of the workers that are shown are in it, however far they are.
    """
    loop = [span for span in spans if span.kind in ("forward", "backward", "loss")]
    begin, end = min(span.begin for span in loop), max(span.end for span in loop)
    period = (end - begin) / schedule.num_periods
    first = min(span.begin for span in loop if span.kind == "loss")
    left = max(begin, first - SHOWN_PERIODS / 4 * period)
    right = min(end, left + SHOWN_PERIODS * period)
    shown = set(shown_workers(spans))
    for kind in ("forward", "backward"):
        units = [span for span in loop if span.kind == kind and _worker(span) in shown]
        if units:
            nearest = min(units, key=lambda unit: abs(unit.begin - first))
            left, right = min(left, nearest.begin), max(right, nearest.end)
    return left, right


def shown_workers(spans: list[Span]) -> list[tuple[int, str]]:
    """(stage, worker) of those that a panel has room for.

    Whole stages, from the first to the last as far apart as can be; where two of them are too
    many, workers.
    """
    workers = _workers(spans)
    stages = sorted({stage for stage, _ in workers})
    room = SHOWN_WORKERS // max(sum(one == stage for one, _ in workers) for stage in stages)
    if room < 2:
        return _spread(workers, SHOWN_WORKERS)
    kept = _spread(stages, room)
    return [worker for worker in workers if worker[0] in kept]


def _worker(span: Span) -> tuple[int, str]:
    return span.stage, span.worker


def _workers(spans: list[Span]) -> list[tuple[int, str]]:
    """All (stage, worker), stage by stage, in the order in which a stage's spans have them."""
    return sorted(dict.fromkeys(map(_worker, spans)), key=lambda worker: worker[0])


def _spread(items: list, most: int) -> list:
    """At most so many of the items, first and last included, about as far from each other."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def draw(axes, spans: list[Span], shown: tuple[float, float]):
    """Draws spans of `shown_workers` within `shown`, transfers as a line under the others."""
    begin, end = shown
    rows = {worker: row for row, worker in enumerate(shown_workers(spans))}
    bars: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for span in spans:
        row = rows.get(_worker(span))
        if row is not None and span.end > begin and span.begin < end:
            bars.setdefault((row, span.kind), []).append((span.begin, span.end - span.begin))
    for (row, kind), some in bars.items():
        place = (row + 0.325, 0.15) if kind == "transfer" else (row - 0.4, 0.7)
        axes.broken_barh(some, place, color=COLOURS[kind], edgecolor="white", linewidth=0.3)
    axes.set_xlim(begin, end)
    axes.set_yticks(range(len(rows)), [f"{worker}, stage {stage}" for stage, worker in rows])
    axes.invert_yaxis()
    axes.set_xlabel("seconds from the beginning of the step")
    count = len(_workers(spans))
    if len(rows) < count:
        axes.set_ylabel(f"{len(rows)} of {count} workers")


def add_legend(axes):
    """Says which kind of span has which colour."""
    from matplotlib.patches import Patch  # slow to import, and few runs draw

    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    axes.legend(handles=handles, ncols=len(handles), loc="lower right", bbox_to_anchor=(1, 1))
