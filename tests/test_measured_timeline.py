"""The measured timeline tells what ran when: from hand-made traces, whose every time is known."""

import dataclasses
import json
import random

import numpy as np
import pytest

from configs import balanced
from disag_jax import measured_timeline
from disag_jax.config import PlacementKind, SplitConfig
from disag_jax.errors import RunError
from disag_jax.geometry import placement_of
from disag_jax.measured_timeline import PIPELINE, UNITS, Worker
from disag_jax.planner import hardware, pictures, timeline
from disag_jax.planner.prediction import predict
from disag_jax.planner.timeline import Span
from disag_jax.schedule import IDLE, Column, schedule_of
from disag_jax.shared_loss import tokens_of_workers
from disag_jax.trace import Operation, Operations
from mesh.roles import Role

SPLITS = {
    "unequal": SplitConfig(stages=2, attention_workers=1, expert_workers=3),
    "two hops": SplitConfig(attention_workers=2, expert_workers=1, hop=2),
    "colocated": SplitConfig(
        stages=2, attention_workers=2, expert_workers=2, placement=PlacementKind.COLOCATED
    ),
    "replicas": SplitConfig(replicas=2, attention_workers=1, expert_workers=1),
}
# Of a period, what each thing takes of its length of 100: (begin, end).
TIMES = {
    "backward_transfer": (1, 9), "forward": (5, 25), "forward_transfer": (30, 50),
    "backward": (31, 60), "loss": (70, 90),
}  # fmt: skip
BEFORE, RUN, PERIOD = 1000, 100_000, 100


@pytest.fixture(params=SPLITS)
def config(request):
    config = balanced.get_config()
    config.split, config.model.num_layers = SPLITS[request.param], 4
    config.batch.micro_batches = 9
    return config.validate()


class HandMade:
    """A trace of a config's schedule in which the times of everything are `TIMES`."""

    def __init__(self, config, num_runs: int = 1):
        self.config, self.schedule = config, schedule_of(config)
        self.placement = placement_of(config)
        self.workers = {d: Worker.of(self.placement, d) for d in range(self.placement.num_devices)}
        self.names, self.spans = {}, []
        self.by_device = {device: self._device(device, num_runs) for device in self.workers}

    def operations(self) -> Operations:
        return Operations(self.by_device, {6: 0.0, 7: 100.0})

    def _device(self, device: int, num_runs: int) -> list[Operation]:
        worker, found = self.workers[device], [Operation("jit_update_expert", "add", 101, 102)]
        for run in range(num_runs):
            found += self._run(worker, BEFORE + RUN * run, is_last=run == num_runs - 1)
        end = found[-1].end
        found += [
            self._operation("norms", "shard_map/reduce_gradients/psum", end, end + 10),
            Operation("jit_update_vocabulary", "add", end + 20, end + 30),
            Operation("jit_update_attention", "add", end + 30, end + 50),
            Operation("jit_other", "add", end + 60, end + 70),
        ]
        self._span(worker, "outside", "reduce gradients", end, end + 10)
        self._span(worker, "outside", "optimizer", end + 20, end + 50)
        random.Random(device).shuffle(found)
        return found

    def _run(self, worker: Worker, begin: int, is_last: bool) -> list[Operation]:
        gather = self._operation("gather", "shard_map/gather_weights/x", begin, begin + 50)
        # A part that a compiler moved to the front.
        zeros = self._operation("zeros", "shard_map/reduce_gradients/zeros", begin, begin + 1)
        found = [gather, zeros]
        if is_last:
            self._span(worker, "outside", "gather weights", begin, begin + 50)
        for segment in self.schedule.segments:
            for period in range(segment.begin, segment.end):
                at = begin + 50 + PERIOD * period
                found += self._period(worker, segment, period, at, is_last)
        return found

    def _has_loss(self, worker: Worker) -> bool:
        """Whether it owns tokens of a loss, or helps with them."""
        split, model = self.config.split, self.config.model
        _, helpers, _ = tokens_of_workers(
            self.config.batch.tokens_per_worker, split.loss_share, placement_of(self.config)
        )
        owns = worker.role is Role.ATTENTION or split.colocated
        return helpers > 0 or (owns and worker.stage == model.num_layers % split.stages)

    def _period(self, worker: Worker, segment, period: int, at: int, is_last: bool):
        loop = f"shard_map/{segment.name}/while/body/closed_call"
        found = [
            self._operation(f"row.{segment.name}", f"{loop}/dynamic_slice", at, at + 1),
            # Something that only some devices do in some periods.
            *[self._operation("rare", f"{loop}/cond", at, at + 1) for _ in range(period % 2)],
        ]
        role = worker.role.label if not self.config.split.colocated else "expert"
        moves = "all_to_all" if self.config.split.colocated else "m2n"
        parts = {}
        if segment.has_forward or self.schedule.hop == 2:
            parts["forward_transfer"] = f"{loop}/{moves}_forward/x", "forward transfer"
        if segment.has_backward:
            parts["backward_transfer"] = f"{loop}/{moves}_backward/x", "backward transfer"
        for kind in ("forward", "backward"):
            micro_batch, row, _ = getattr(self.schedule, kind)[period, worker.stage, worker.role]
            if micro_batch != IDLE:
                layer = row * self.schedule.stages + worker.stage
                parts[kind] = (
                    f"{loop}/cond/branch_1_fun/{role}_{kind}/x",
                    f"{kind} of micro-batch {micro_batch}, layer {layer}",
                )
        if self.schedule.loss[period] != IDLE and self._has_loss(worker):
            name = f"loss of micro-batch {self.schedule.loss[period]}"
            parts["loss"] = f"{loop}/cond/branch_1_fun/loss/while/body/x", name
        for part, (scope, name) in parts.items():
            begin, end = (at + time for time in TIMES[part])
            middle = (begin + end) // 2
            found += [
                self._operation(f"{part}.{segment.name}", scope, begin, middle),
                self._operation(f"{part}.{segment.name}.2", scope, middle + 1, end),
            ]
            if is_last:
                kind = "transfer" if part.endswith("transfer") else part
                self._span(worker, kind, name, begin, end)
        return found

    def _operation(self, name: str, scope: str, begin: int, end: int) -> Operation:
        self.names[name] = f"jit(training_pipeline)/{scope}"
        return Operation(PIPELINE, name, float(begin), float(end))

    def _span(self, worker: Worker, kind: str, name: str, begin: int, end: int):
        self.spans.append(Span(worker.stage, worker.name, kind, name, begin, end))


def spans_of(made: HandMade) -> tuple[list[Span], float]:
    """The spans that are found, and the nanosecond that they count from."""
    traced = measured_timeline.last_step(made.operations(), made.names, made.schedule)
    found = measured_timeline.spans(traced, made.names, made.schedule, made.workers)
    return found, traced.begin


@pytest.mark.parametrize("num_runs", [1, 2])
def test_every_span_has_its_name_and_time(config, num_runs):
    made = HandMade(config, num_runs)
    found, zero = spans_of(made)
    # A step that ran again has its last run.
    assert zero == BEFORE + RUN * (num_runs - 1)
    done = sorted((s for s in found if s.kind != "wait"), key=dataclasses.astuple)
    expected = [
        dataclasses.replace(s, begin=1e-9 * (s.begin - zero), end=1e-9 * (s.end - zero))
        for s in made.spans
    ]
    assert len(done) == len(expected)
    by_what = {(s.stage, s.worker, s.name, round(1e9 * s.begin)): s for s in expected}
    for span in done:
        twin = by_what[span.stage, span.worker, span.name, round(1e9 * span.begin)]
        assert span.kind == twin.kind and span.end == pytest.approx(twin.end, abs=1e-12)


def test_units_in_cuda_graphs_are_found_by_most_of_their_kernels(config):
    made = HandMade(config)
    expected, _ = spans_of(made)
    scopes, graphs = put_in_graphs(made)
    found = measured_timeline.graph_scopes(made.operations(), scopes)
    assert len(graphs) > 2
    assert all(scope.startswith(found[graph]) for scope, graph in graphs.items())
    made.names = {name: s for name, s in scopes.items() if "/cond/branch" not in s} | found
    key = dataclasses.astuple
    assert sorted(spans_of(made)[0], key=key) == sorted(expected, key=key)


def test_periods_begin_with_graphs_where_other_operations_come_last(config):
    """As XLA orders the loop's body: both phases' graphs, then what is not in a graph."""
    made = HandMade(config)
    expected, _ = spans_of(made)
    scopes, graphs = put_in_graphs(made)
    made.names = scopes | {graph: scope for scope, graph in graphs.items()}

    def reorder(one):
        if not one.name.startswith("row."):
            return [one]
        segment = one.name.removeprefix("row.")
        # A unit's: every worker has units, not every one a part in losses.
        graph = next(
            g for scope, g in graphs.items() if f"/{segment}/" in scope and "/loss" not in scope
        )
        # What a graph does in every period, also where its unit is idle.
        return [
            one._replace(begin=one.begin + 95, end=one.end + 95),
            Operation(PIPELINE, graph, one.begin, one.end, "every_period"),
        ]

    made.by_device = {
        device: [part for one in operations for part in reorder(one)]
        for device, operations in made.by_device.items()
    }

    def units(spans, of):
        return sorted((s.stage, s.worker, s.name, of(s)) for s in spans if s.kind in UNITS)

    found = spans_of(made)[0]
    assert units(found, lambda s: s.end) == units(expected, lambda s: s.end)
    # A unit begins where its graph does.
    begins = [t for *_, t in units(found, lambda s: s.begin)]
    for (*_, known), begin in zip(units(expected, lambda s: s.begin), begins, strict=True):
        in_period = round(1e9 * (known - begin))
        assert in_period in (0, *(TIMES[kind][0] for kind in UNITS)), in_period


def put_in_graphs(made: HandMade) -> tuple[dict[str, str], dict[str, str]]:
    """Puts what a trace has in conditionals into CUDA graphs.

    Each unit of each loop has one, whose kernels have operations' names; a short one is another
    unit's too. Returns (the names of the program, the graph of each scope).
    """
    shared = f"shared.{len(made.names)}"
    made.names[shared] = next(s for s in made.names.values() if "_forward/x" in s and "/cond" in s)
    scopes, graphs = dict(made.names), {}

    def in_a_graph(one):
        scope = made.names.get(one.name, "")
        if "/cond/branch" not in scope:
            return [one]
        graph = graphs.setdefault(scope, f"command_buffer_{len(graphs)}")
        kernel = one.name.replace(".", "_").replace("-", "_")
        short = Operation(PIPELINE, graph, one.begin, one.begin + 1, shared.replace(".", "_"))
        return [one._replace(name=graph, kernel=kernel), short]

    made.by_device = {
        device: [part for one in operations for part in in_a_graph(one)]
        for device, operations in made.by_device.items()
    }
    return scopes, graphs


def test_waits_fill_what_is_between_units(config):
    made = HandMade(config)
    found, _ = spans_of(made)
    loop = made.schedule.num_periods * PERIOD
    for worker in made.workers.values():
        own = [s for s in found if (s.stage, s.worker) == (worker.stage, worker.name)]
        at = np.zeros(loop, int)
        for span in own:
            if span.kind in ("forward", "backward", "loss", "wait"):
                begin, end = (round(1e9 * t) - 50 for t in (span.begin, span.end))
                at[begin:end] += 1
        # To the end of the loop, or until this worker goes on with something else.
        last = max(round(1e9 * s.end) - 50 for s in found if s.kind in ("backward", "loss"))
        after = min(s.begin for s in own if s.kind == "outside" and s.begin > 60e-9)
        last = min(last, round(1e9 * after) - 50)
        assert (at[:last] == 1).all() and (at[last:] == 0).all()


def test_units_are_called_as_the_planner_calls_them(config):
    made = HandMade(config)
    prediction = predict(config, hardware.load("h100"))
    predicted = timeline.predicted(prediction)
    for worker in made.workers.values():
        kind = "worker" if config.split.colocated else worker.role.label
        units = ("forward", "backward", "loss")
        ours = {
            s.name for s in spans_of(made)[0]
            if (s.stage, s.worker) == (worker.stage, worker.name) and s.kind in units
        }  # fmt: skip
        theirs = {
            s.name for s in predicted
            if (s.stage, s.worker) == (worker.stage, kind) and s.kind in units
        }  # fmt: skip
        assert ours == theirs


def test_a_trace_that_is_not_of_the_schedule_is_refused(config):
    made = HandMade(config)
    lost = made.by_device[0][0]
    every_period = ("row.", "forward_transfer", "backward_transfer")
    made.by_device[0] = [o for o in made.by_device[0] if not o.name.startswith(every_period)]
    with pytest.raises(RunError, match=r"must hold the \d+ periods of the warm-up loop"):
        spans_of(made)
    made = HandMade(config)
    table = made.schedule.forward[..., Column.MICRO_BATCH]
    busy = np.argwhere(table[:, 0, Role.ATTENTION] != IDLE)[0, 0]
    table[busy, 0, Role.ATTENTION] = IDLE
    with pytest.raises(RunError, match=rf"has a forward of .*, stage 0, in period {busy}, where"):
        spans_of(made)
    no_steps = Operations({0: [lost]}, {})
    with pytest.raises(RunError, match="must hold a whole step"):
        measured_timeline.last_step(no_steps, made.names, made.schedule)
    with pytest.raises(RunError, match="last step's pipeline on device 0"):
        measured_timeline.last_step(Operations({0: []}, {3: 0.0}), made.names, made.schedule)


def test_scopes_are_read_from_a_program():
    text = """\
%body (p: (s32[])) -> (s32[]) {
  %fusion.3 = f32[8]{0} fusion(%p), kind=kLoop, metadata={op_name="jit(f)/loss/mul" stack=3}
  ROOT %tuple = (f32[8]) tuple(%fusion.3)
  copy.1 = f32[8]{0} copy(%p), metadata={source_line=4 op_name="jit(f)/m2n_forward/x"}
"""
    assert measured_timeline.scopes(text) == {
        "fusion.3": "jit(f)/loss/mul", "copy.1": "jit(f)/m2n_forward/x",
    }  # fmt: skip


def test_measured_and_predicted_are_written_side_by_side(config, tmp_path):
    made = HandMade(config)
    sources = {
        "measured": spans_of(made)[0],
        "predicted": timeline.predicted(predict(config, hardware.load("h100"))),
    }
    trace, plot = tmp_path / "timeline.json", tmp_path / "timeline.png"
    pictures.write_timelines(made.schedule, sources, str(trace), str(plot))
    events = json.loads(trace.read_text())["traceEvents"]
    stages = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert sorted(stages.values()) == sorted(
        f"stage {stage}, {source}" for stage in range(config.split.stages) for source in sources
    )
    assert sum(e["ph"] == "X" for e in events) == sum(map(len, sources.values()))
    assert plot.read_bytes().startswith(b"\x89PNG")
