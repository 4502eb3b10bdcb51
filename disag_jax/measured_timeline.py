"""The timeline of a step that ran, from its trace: the same spans as the planner predicts.

After `train.py --profile_steps` has traced steps, `write` draws the last of them into
WORKDIR/profile (of several processes each its own devices), beside the prediction where
`--hardware` says what to predict for.

Operations carry the names of the code (`jax.named_scope`). The loop is three scans called warm-up,
steady and cool-down; what runs once in every period of one of them, such as reading the table, says
when each period began, and the schedule's table which micro-batch and layer a period's unit was.
"""

import collections
import dataclasses
import pathlib
import re

import numpy as np

from disag_jax import trace
from disag_jax.errors import RunError
from disag_jax.planner import timeline
from disag_jax.planner.prediction import Prediction
from disag_jax.planner.timeline import BEFORE_LOOP, WAIT, Span, loss_name, unit_name
from disag_jax.schedule import Schedule
from disag_jax.step import Stepper
from disag_jax.trace import Operation
from mesh.placement import Meshes, Placement
from mesh.roles import Role

PIPELINE, UPDATE = "jit_training_pipeline", "jit_update_"

INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]+)"')
# An operation of a period itself, not of something within that may run more or less often.
LOOP = re.compile(r"/(warm-up|steady|cool-down)/while/body(?:/closed_call)?(?P<rest>.*)$")
INNER = re.compile(r"/(cond|while)(/|$)")
UNIT = re.compile(r"/(?:attention|expert)_(forward|backward)(?:/|$)")
LOSS = re.compile(r"/loss(?:/|$)")
TRANSFER = re.compile(r"/(?:m2n|all_to_all)_(forward|backward)(?:/|$)")
GRAPH = "command_buffer"
ASYNC_START = re.compile(r"-start(?=[.]|$)")
UNITS = ("forward", "backward", "loss")
IN_LOOP = (*UNITS, "transfer")
# What it is called, and the period that it is in: before the first, or from the last on.
OUTSIDE = {
    "gather_weights": (BEFORE_LOOP, 0),
    "reduce_gradients": ("reduce gradients", -1),
    "reduce_metrics": ("reduce gradients", -1),
}


@dataclasses.dataclass(frozen=True)
class Traced:
    """One step of a trace.

    Attributes:
      by_device: operations of the step's programs on each device, of the pipeline's last run.
      periods: nanoseconds at which each device's periods began [periods].
      begin: nanoseconds of the first operation on any device.
    """

    by_device: dict[int, list[Operation]]
    periods: dict[int, np.ndarray]
    begin: float


def scopes(program_text: str) -> dict[str, str]:
    """The name in the code of each operation of a compiled program in text form.

    What the text begins as `collective-permute-start.3` a trace may call `collective-permute.3`.
    """
    found = (INSTRUCTION.match(line) for line in program_text.splitlines())
    names = {one.group(1): one.group(2) for one in found if one}
    return {ASYNC_START.sub("", name): scope for name, scope in names.items()} | names


def graph_scopes(ran: trace.Operations, names: dict[str, str]) -> dict[str, str]:
    """The name in the code of each CUDA graph of a trace: what most of its kernels' time is for.

    XLA puts a phase's unit into one graph, and names kernels after operations; equal ones of
    several units share a kernel, so a single kernel says nothing.
    """
    by_kernel = {re.sub(r"[.-]", "_", name): scope for name, scope in names.items()}
    seconds = collections.defaultdict(collections.Counter)
    for one in (one for operations in ran.by_device.values() for one in operations):
        scope = by_kernel.get(one.kernel, "")
        part = UNIT.search(scope) or LOSS.search(scope)
        if one.name.startswith(GRAPH) and part:
            seconds[one.name][scope[: part.end()]] += one.end - one.begin
    return {graph: parts.most_common(1)[0][0] for graph, parts in seconds.items()}


def last_step(ran: trace.Operations, names: dict[str, str], schedule: Schedule) -> Traced:
    """Cuts the last step out of a trace; RunError if the schedule's periods are not in it.

    A step that ran again in a larger bucket has its last run.
    """
    if not ran.steps:
        raise RunError("the trace must hold a whole step")
    began = ran.steps[max(ran.steps)]
    by_device, periods = {}, {}
    for device, operations in sorted(ran.by_device.items()):
        pipeline = [one for one in operations if one.program == PIPELINE and one.begin >= began]
        if not pipeline:
            raise RunError(f"the trace must hold the last step's pipeline on device {device}")
        periods[device] = _periods(pipeline, names, schedule)
        pipeline = _last_run(pipeline, names, periods[device][0])
        # An update before it is of the step before.
        first = min(one.begin for one in pipeline)
        updates = [
            one for one in operations if one.program.startswith(UPDATE) and one.begin >= first
        ]
        by_device[device] = [*pipeline, *updates]
    begin = min(one.begin for operations in by_device.values() for one in operations)
    return Traced(by_device, periods, begin)


def _periods(pipeline: list[Operation], names: dict[str, str], schedule: Schedule) -> np.ndarray:
    """When each period began: the first of the operations that run once in each of them."""
    begins, in_graphs = collections.defaultdict(list), collections.defaultdict(list)
    for one in pipeline:
        loop = LOOP.search(names.get(one.name, ""))
        if one.name.startswith(GRAPH):
            in_graphs[one.name, one.kernel].append(one.begin)
        elif loop and not INNER.search(loop["rest"]):
            begins[loop.group(1), one.name].append(one.begin)
    found, before = [], -np.inf
    for segment in schedule.segments:
        count = segment.num_periods
        # A step that ran again has them several times; the last are those that count.
        anchors = [
            sorted(times)[-count:]
            for (name, _), times in begins.items()
            if name == segment.name and len(times) % count == 0
        ]
        if not anchors:
            raise RunError(f"the trace must hold the {count} periods of the {segment.name} loop")
        known = np.min(anchors, axis=0)
        # Most of a period may be in graphs, and before all that is not.
        earlier = (_once_before_each(known, before, times) for times in in_graphs.values())
        found.append(np.min([known, *(times for times in earlier if times is not None)], axis=0))
        before = known[-1]
    return np.concatenate(found)


def _once_before_each(known: np.ndarray, before: float, times: list[float]) -> np.ndarray | None:
    """The times that lie one by one before the known ones, all after `before`; None if not so."""
    times = np.sort(times)
    times = times[times <= known[-1]][-len(known) :]
    if len(times) < len(known) or np.any(times > known):
        return None
    return times if np.all(times > [before, *known[:-1]]) else None


def _last_run(pipeline: list[Operation], names: dict[str, str], loop: float) -> list[Operation]:
    """Without the runs before the last: all of its loop, and once each what is outside loops."""
    inside, outside = [], {}
    for one in sorted(pipeline, key=lambda one: one.begin):
        if not LOOP.search(names.get(one.name, "")):
            outside[one.name] = one
        elif one.begin >= loop:
            inside.append(one)
    return [*outside.values(), *inside]


def spans(
    traced: Traced, names: dict[str, str], schedule: Schedule, workers: dict[int, "Worker"]
) -> list[Span]:
    """Units, losses, waits, transfers and what is around the loop, of each device's worker.

    RunError if a unit ran where the table has none.
    """
    by_device = {
        device: _work(device, traced, names, schedule, workers[device])
        for device in traced.by_device
    }
    end = max(span.end for work in by_device.values() for span in work if span.kind in IN_LOOP)
    found = []
    for device, work in by_device.items():
        begin = 1e-9 * (traced.periods[device][0] - traced.begin)
        # A device may go on while others are in the loop.
        after = [s.begin for s in work if s.kind == "outside" and s.begin > begin]
        found += work + _waits(work, begin, min([end, *after]))
    return found


def _work(
    device: int, traced: Traced, names: dict[str, str], schedule: Schedule, worker: "Worker"
) -> list[Span]:
    """What one device did, in the order of beginning."""
    began, parts = traced.periods[device], collections.defaultdict(lambda: [np.inf, -np.inf])
    in_graphs = collections.defaultdict(lambda: True)
    for one in traced.by_device[device]:
        part = _part(one, names.get(one.name, ""), began)
        if part:
            extent = parts[part]
            extent[:] = min(extent[0], one.begin), max(extent[1], one.end)
            in_graphs[part] &= one.name.startswith(GRAPH)
    work = []
    for part, (begin, end) in parts.items():
        kind, name, period = part
        if kind in ("forward", "backward"):
            name = unit_name(schedule, kind, period, worker.stage, worker.role)
        elif kind == "loss":
            name = loss_name(schedule, period)
        if name is None and in_graphs[part]:
            # A graph begins in every period, with what is the same in all of them.
            continue
        if name is None:
            raise RunError(
                f"the trace has a {kind} of {worker.name}, stage {worker.stage}, in period "
                f"{period}, where the schedule has none"
            )
        seconds = (1e-9 * (begin - traced.begin), 1e-9 * (end - traced.begin))
        work.append(Span(worker.stage, worker.name, kind, name, *seconds))
    return sorted(work, key=lambda span: span.begin)


def _part(one: Operation, name: str, began: np.ndarray) -> tuple[str, str | None, int] | None:
    """(kind, name, period) of the span that an operation is of; None for what has no name here."""
    if one.program.startswith(UPDATE):
        return "outside", "optimizer", 0
    period = int(np.searchsorted(began, one.begin, side="right")) - 1
    if LOOP.search(name):
        if transfer := TRANSFER.search(name):
            return "transfer", f"{transfer.group(1)} transfer", period
        if unit := UNIT.search(name):
            return unit.group(1), None, period
        return ("loss", None, period) if LOSS.search(name) else None
    for scope, (what, at) in OUTSIDE.items():
        # Compilers move parts of it elsewhere, such as the zeros that a sum begins with.
        if f"/{scope}/" in f"{name}/" and period == range(-1, len(began))[at]:
            return "outside", what, 0
    return None


def _waits(work: list[Span], begin: float, end: float) -> list[Span]:
    """What is between one worker's units and losses, from the loop's beginning to its end."""
    units, found, at = [span for span in work if span.kind in UNITS], [], begin
    for span in units:
        if span.begin > at:
            found.append(
                dataclasses.replace(span, kind="wait", name=WAIT, begin=at, end=span.begin)
            )
        at = max(at, span.end)
    if end > at:
        found.append(dataclasses.replace(units[-1], kind="wait", name=WAIT, begin=at, end=end))
    return found


@dataclasses.dataclass(frozen=True)
class Worker:
    """Which worker a device is, as spans name it; role: whose table it follows."""

    stage: int
    role: Role
    name: str

    @classmethod
    def of(cls, placement: Placement, number: int) -> "Worker":
        """The worker of a device's place in the union mesh."""
        replica, worker = divmod(number, placement.workers)
        role = next(role for role in Role if placement.rank_of(worker, role) is not None)
        label = "worker" if placement.colocated else role.label
        size = {Role.ATTENTION: placement.attention_workers, Role.EXPERT: placement.expert_workers}
        if size[role] > 1:
            label = f"{label} {placement.rank_of(worker, role)}"
        if placement.replicas > 1:
            label = f"replica {replica} {label}"
        return cls(placement.stage_of(worker), role, label)


def workers_here(meshes: Meshes) -> dict[int, Worker]:
    """The workers of this process's devices, by the device's number in the process."""
    here = meshes.union.local_devices
    return {
        device.local_hardware_id: Worker.of(meshes.placement, number)
        for number, device in enumerate(meshes.union.devices.flat)
        if device in here
    }


def measured(directory, program_text: str, schedule: Schedule, meshes: Meshes) -> list[Span]:
    """The spans of the last step of the newest trace under a directory.

    program_text: the compiled training pipeline that the step ran.

    ConfigError where there is no trace, RunError where it is not one of this program.
    """
    names, ran = scopes(program_text), trace.operations(directory)
    names |= graph_scopes(ran, names)
    traced = last_step(ran, names, schedule)
    return spans(traced, names, schedule, workers_here(meshes))


def write(directory: pathlib.Path, stepper: Stepper, prediction: Prediction | None) -> list[str]:
    """Writes the measured timeline of a trace under a directory: timeline.json, timeline.png.

    Beside the predicted one of the same step, if given. Returns the paths; raises as `measured`,
    and ConfigError where a file cannot be written.
    """
    # Few runs draw, and what draws takes most of a second to import.
    from disag_jax.planner import pictures

    text = stepper.compiled_program(stepper.chooser.current).as_text()
    sources = {"measured": measured(directory, text, stepper.schedule, stepper.meshes)}
    if prediction is not None:
        sources["predicted"] = timeline.predicted(prediction)
    paths = [str(directory / f"timeline.{ending}") for ending in ("json", "png")]
    pictures.write_timelines(stepper.schedule, sources, *paths)
    return paths
