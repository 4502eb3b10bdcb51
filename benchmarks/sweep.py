"""Where disaggregation starts to win: both placements and every overlap of the twin, over a grid.

  python -m benchmarks.sweep --config C --hardware H --out sweep.json --plot sweep.png
  python -m benchmarks.sweep --config C --hardware H --out slow.json --network=sockets

In benchmarks/README.md C is configs/balanced.py, H h100x2_nvlink, for sockets a profile over them.
A cell is a sequence length, a width of experts and a top-k: the config's own, and those of the grid
that fit the memory. In each, AF-Pipe's best split of one stage and its twin (all devices
share the experts, on the same batches) train a few steps: the twin blocking, in chunks of the
degrees that the model finds best, and interleaved. Where all experts of a stage fit one device, so
does the best co-located split that shares none and has no all-to-all. Results in `--out` are gone
on with; no case begins after `--seconds`. Exit code 1 unless in every cell losses agree, and the
planner's claims hold (`check`).

A cell's communication over compute is by the hardware's times, not measured in the run: all four
exchanges of a layer over its four units, of the blocking twin.
"""

import collections
import copy
import dataclasses
import itertools
import pathlib

import rich.console
import rich.table

from benchmarks import cases as cases_lib
from benchmarks.cases import Case
from disag_jax import processes
from disag_jax.compare import TOLERANCES, twin_of
from disag_jax.config import Config, ConfigError, Overlap, PlacementKind
from disag_jax.planner import overlaps, search
from disag_jax.planner.hardware import Hardware
from disag_jax.planner.pictures import check_writable
from disag_jax.planner.prediction import predict

# The share of cells in which the planner must choose the faster placement, and by which share its
# choice may be slower elsewhere.
LEAST_RIGHT, CHOICE_TOLERANCE = 0.9, 0.05

# AF-Pipe's least speed over the blocking twin's, where communication over compute is in this range,
# and over the best co-located split's in the config's own cell over the default network.
LEAST_SPEED_UP, BALANCED = 1.6, (0.8, 1.25)
LEAST_OF_BEST = 0.95

AF_PIPE = "af-pipe"
# Co-located in stages and replicas of one device each.
UNSHARED = "unshared"


@dataclasses.dataclass(frozen=True)
class Cell(Case):
    """A placement in a cell of the grid; its group names the cell.

    Attributes:
      expert_width, top_k: as in ModelConfig.
      way: `AF_PIPE`, what the twin overlaps, or `UNSHARED`.
      communication_over_compute: of the cell's blocking twin, predicted.
      is_own: whether the cell is the config's, over the default network.
    """

    expert_width: int
    top_k: int
    way: str
    communication_over_compute: float
    is_own: bool


def sweep_cases(
    config: Config, hardware: Hardware, num_devices: int, lengths, widths, top_ks
) -> tuple[list[Cell], list[str]]:
    """AF-Pipe and its rivals in each cell, and the cells that do not fit, in words."""
    cases, left_out = [], []
    own = config.batch.sequence_length, config.model.expert_width, config.model.top_k
    cells = dict.fromkeys([own, *itertools.product(lengths, widths, top_ks)])
    for length, width, top_k in cells:
        base = in_cell(config, num_devices, length, width, top_k)
        alike = search.Fixed(
            tokens_per_worker=base.batch.tokens_per_worker,
            tokens_per_step=base.tokens_per_step, recompute=config.run.recompute,
        )  # fmt: skip
        fixed = dataclasses.replace(alike, replicas=1, stages=1)
        unshared = dataclasses.replace(alike, expert_workers=1)
        kind = PlacementKind.DISAGGREGATED
        found = search.search(base, hardware, num_devices, kind, fixed)
        group = f"{config.model.num_layers} layers, sequence {length}, width {width}, top-k {top_k}"
        if found is None:
            why = search.refusal(base, hardware, num_devices, fixed, placements=(kind,))
            left_out.append(f"{group}: {why}")
            continue
        twins = twins_of(found.config, hardware)
        ratio = communication_over_compute(twins[0], hardware)
        ways = [(AF_PIPE, found.config), *((twin.split.overlap.value, twin) for twin in twins)]
        rival = search.search(base, hardware, num_devices, PlacementKind.COLOCATED, unshared)
        if rival is not None:
            ways.append((UNSHARED, rival.config.validate()))
        for way, one in ways:
            cases.append(
                Cell.of(
                    group, one, hardware, expert_width=width, top_k=top_k, way=way,
                    communication_over_compute=ratio,
                    is_own=(length, width, top_k) == own and hardware.network == "default",
                )
            )  # fmt: skip
    return cases, left_out


def in_cell(config: Config, num_devices: int, length: int, width: int, top_k: int) -> Config:
    """The config in a cell, with its tokens for each device or one sequence if that is longer."""
    for flag, value in (("length", length), ("expert_width", width), ("top_k", top_k)):
        if value < 1:
            raise ConfigError(f"--{flag} = {value} must be greater than 0")
    changed, batch = copy.deepcopy(config), config.batch
    changed.model = dataclasses.replace(config.model, expert_width=width, top_k=top_k)
    changed.split = dataclasses.replace(config.split, replicas=1, stages=1)
    workers = config.split.attention_workers + config.split.expert_workers
    of_worker = batch.micro_batches * batch.tokens_per_worker * num_devices // workers
    tokens = max(length, batch.tokens_per_worker // length * length)
    changed.batch = dataclasses.replace(
        batch,
        sequence_length=length,
        tokens_per_worker=tokens,
        micro_batches=max(1, of_worker // tokens),
    )
    return changed.validate()


def twins_of(config: Config, hardware: Hardware) -> list[Config]:
    """The blocking twin of a disaggregated config, the chunked and the interleaved one."""
    blocking, *overlapping = overlaps.ways(twin_of(config))
    found = [blocking]
    for twin in overlapping:
        if twin.split.overlap is Overlap.CHUNKED:
            # Where one piece is best, the fewest chunks show by how much.
            twin = overlaps.with_best_degrees(twin, hardware) or twin
        found.append(twin.validate())
    return found


def communication_over_compute(twin: Config, hardware: Hardware) -> float:
    """Seconds of a layer's four exchanges over those of its units, by the hardware's times."""
    found = predict(twin, hardware)
    exchanges = 2 * sum(s for name, s in found.transfers.items() if name.startswith("all-to-all"))
    return exchanges / sum(s for name, s in found.unit_seconds.items() if name != "loss")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a cell shows: measured results by way, and the fastest of either placement.

    Attributes:
      measured, predicted: the way that is faster than all others.
      slower: seconds of the predicted way over those of the measured one, minus 1.
    """

    name: str
    by_way: dict[str, dict]
    measured: str
    predicted: str

    @property
    def is_right(self) -> bool:
        """Whether the planner chose the placement that is the faster one."""
        return (self.measured == AF_PIPE) == (self.predicted == AF_PIPE)

    @property
    def slower(self) -> float:
        return self.by_way[self.predicted]["seconds"] / self.by_way[self.measured]["seconds"] - 1

    def speed_up(self, field: str) -> float:
        """AF-Pipe's speed over the best co-located one, by "seconds" or "predicted_seconds"."""
        others = [r[field] for way, r in self.by_way.items() if way != AF_PIPE]
        return min(others) / self.by_way[AF_PIPE][field]


def outcomes(results: list[dict]) -> list[Outcome]:
    """Those of the cells in which AF-Pipe and something co-located were measured."""
    cells = collections.defaultdict(dict)
    for result in results:
        cells[result["group"]][result["way"]] = result
    return [
        Outcome(
            name, by_way,
            *(min(by_way, key=lambda way, f=f, cell=by_way: cell[way][f])
              for f in ("seconds", "predicted_seconds")),
        )
        for name, by_way in cells.items()
        if AF_PIPE in by_way and len(by_way) > 1
    ]  # fmt: skip


def is_balanced(one: Outcome) -> bool:
    """Whether a cell's blocking twin communicates about as long as it computes."""
    low, high = BALANCED
    ratio = one.by_way[AF_PIPE]["communication_over_compute"]
    return Overlap.NONE.value in one.by_way and low <= ratio <= high


def check(results: list[dict], tolerance: float) -> list[str]:
    """What does not hold, in sentences."""
    wrong = cases_lib.differing_losses(results, tolerance, "group")
    found = outcomes(results)
    right = sum(one.is_right for one in found)
    if not right >= LEAST_RIGHT * len(found):
        wrong.append(
            f"the planner must choose the faster placement in {LEAST_RIGHT:.0%} of the cells: it "
            f"did in {right} of {len(found)}"
        )
    for one in found:
        if not one.is_right and not one.slower <= CHOICE_TOLERANCE:
            wrong.append(
                f"{one.name}: the planner's choice, {one.predicted}, is {one.slower:.0%} slower "
                f"than {one.measured}"
            )
        if one.by_way[AF_PIPE]["is_own"] and not one.speed_up("seconds") >= LEAST_OF_BEST:
            wrong.append(
                f"{one.name}: AF-Pipe must be {LEAST_OF_BEST} times as fast as the best "
                f"co-located split, and is {one.speed_up('seconds'):.2f}"
            )
        if not is_balanced(one):
            continue
        speed_up = one.by_way[Overlap.NONE.value]["seconds"] / one.by_way[AF_PIPE]["seconds"]
        if not speed_up >= LEAST_SPEED_UP:
            wrong.append(
                f"{one.name}: AF-Pipe must be {LEAST_SPEED_UP} times as fast as the blocking twin, "
                f"and is {speed_up:.2f}"
            )
    return wrong


def table(results: list[dict]) -> rich.table.Table:
    """The results, each cell's winners marked."""
    made = rich.table.Table(title="AF-Pipe and its twins")
    names = (
        "cell", "way", "split", "s", "predicted", "GiB, predicted", "comm/comp",
        "AF/best co-located, predicted",
    )  # fmt: skip
    for name in names:
        made.add_column(name, justify="left" if name in names[:3] else "right")
    by_name = {one.name: one for one in outcomes(results)}
    for r in results:
        cell = by_name.get(r["group"])
        marks, speed = "", ""
        if cell:
            marks += " <- fastest" if r["way"] == cell.measured else ""
            marks += " <- predicted" if r["way"] == cell.predicted else ""
            if r["way"] == AF_PIPE:
                measured, predicted = map(cell.speed_up, ("seconds", "predicted_seconds"))
                speed = f"{measured:.2f}, {predicted:.2f}"
        made.add_row(
            r["group"],
            r["way"] + marks,
            r["name"],
            f"{r['seconds']:.3f}",
            f"{r['predicted_seconds']:.3f} ({r['predicted_seconds'] / r['seconds'] - 1:+.0%})",
            f"{r['gib']:.1f}, {r['predicted_gib']:.1f}",
            f"{r['communication_over_compute']:.2f}",
            speed,
        )
    return made


def draw(results: list[dict], path: pathlib.Path):
    """AF-Pipe's speed over the best co-located, measured and predicted, and where they are equal.

    A column for each top-k. Above, speeds against the sequence length, a colour for each width;
    below, in the plane of both, the crossing line between the cells that were measured.
    """
    from matplotlib.figure import Figure

    columns = collections.defaultdict(dict)
    for one in outcomes(results):
        ours = one.by_way[AF_PIPE]
        speeds = one.speed_up("seconds"), one.speed_up("predicted_seconds")
        columns[ours["top_k"]][ours["expert_width"], ours["sequence_length"]] = speeds
    if not columns:
        return
    figure = Figure(figsize=(5 * len(columns), 7), layout="constrained")
    panels = figure.subplots(2, len(columns), sharey="row", squeeze=False)
    for (top_k, cells), (speeds, plane) in zip(sorted(columns.items()), panels.T, strict=True):
        _draw_speeds(speeds, cells)
        _draw_crossing(plane, cells)
        speeds.set_title(f"top-k {top_k}")
        plane.set_xlabel("sequence length, tokens")
    panels[0, 0].set_ylabel("AF-Pipe's speed over the best co-located")
    panels[1, 0].set_ylabel("width of an expert")
    figure.savefig(path, dpi=140)


def _draw_speeds(axes, cells: dict[tuple[int, int], tuple[float, float]]):
    for number, width in enumerate(sorted({width for width, _ in cells})):
        lengths = sorted(length for w, length in cells if w == width)
        measured, predicted = zip(*(cells[width, length] for length in lengths), strict=True)
        axes.plot(lengths, measured, "o-", color=f"C{number}", label=f"width {width}, measured")
        axes.plot(lengths, predicted, "x--", color=f"C{number}", label="predicted")
    axes.axhline(1.0, color="#707070", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False, fontsize=8)


def _draw_crossing(axes, cells: dict[tuple[int, int], tuple[float, float]]):
    """Points where AF-Pipe won (filled) and lost, and the lines between them."""
    for (width, length), (measured, _) in cells.items():
        axes.plot(length, width, "o", color="C3", fillstyle="full" if measured > 1 else "none")
    widths, lengths = (sorted({cell[i] for cell in cells}) for i in range(2))
    is_whole = len(cells) == len(widths) * len(lengths) and min(len(widths), len(lengths)) > 1
    for field, style in enumerate(("solid", "dashed")):
        grid = [[cells[w, s][field] for s in lengths] for w in widths] if is_whole else [[1, 1]]
        # A line is there only where some cells win and others lose.
        if min(map(min, grid)) < 1 < max(map(max, grid)):
            axes.contour(lengths, widths, grid, levels=[1.0], colors="C3", linestyles=style)
    axes.set_title("filled: AF-Pipe won; line: measured, dashed: predicted", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)


def main(
    config: Config, hardware: str, network: str, out: str, grid, layers: int,
    micro_batches: int | None, plot: str | None, seconds: float, threads: int,
):  # fmt: skip
    """Measures what is missing in `out`, prints, draws and checks.

    grid: (sequence lengths, expert widths, top-ks).
    """
    if plot:
        check_writable(plot, "plot")
    num_devices = cases_lib.check_start(config, out)
    known = cases_lib.hardware_here(hardware, num_devices, network)
    config = copy.deepcopy(config)
    config.model.num_layers = layers
    config.batch.micro_batches = micro_batches or config.batch.micro_batches
    cases, left_out = sweep_cases(config, known, num_devices, *grid)
    processes.say(*(f"left out: {cell}" for cell in left_out))
    results, missing = cases_lib.run(cases, pathlib.Path(out), seconds, threads, known)
    if processes.is_first():
        rich.console.Console(width=160).print(table(results))
    if plot:
        processes.on_first(lambda: draw(results, pathlib.Path(plot)))
    found = outcomes(results)
    processes.say(
        f"placement chosen right in {sum(one.is_right for one in found)} of {len(found)} cells",
        f"communication over compute from {BALANCED[0]} to {BALANCED[1]}, where AF-Pipe must be "
        f"{LEAST_SPEED_UP} times as fast as the blocking twin, in "
        f"{sum(map(is_balanced, found))} of them",
    )
    wrong = check(results, TOLERANCES[config.run.compute_dtype])
    cases_lib.conclude(wrong, missing, "losses agree; the planner's claims hold")


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli

    _FLAGS = cases_lib.Flags()
    _LENGTHS = flags.DEFINE_multi_integer("length", [4096, 16_384], "sequence lengths")
    _WIDTHS = flags.DEFINE_multi_integer("expert_width", [704, 2816], "widths of an expert")
    _TOP_KS = flags.DEFINE_multi_integer("top_k", [2, 8], "experts of a token")
    _LAYERS = flags.DEFINE_integer("layers", 2, "layers of the model", lower_bound=1)
    _MICRO_BATCHES = flags.DEFINE_integer(
        "micro_batches", None, "a step's, of AF-Pipe on as many devices as the config has; by "
        "default the config's", lower_bound=1,
    )  # fmt: skip
    _PLOT = flags.DEFINE_string("plot", None, "PNG file to draw")

    def _run():
        main(
            *_FLAGS.start(), (_LENGTHS.value, _WIDTHS.value, _TOP_KS.value),
            _LAYERS.value, _MICRO_BATCHES.value, _PLOT.value,
            _FLAGS.seconds.value, _FLAGS.threads.value,
        )  # fmt: skip

    cli.run(_run)
