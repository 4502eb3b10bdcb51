"""The predicted timeline is the simulated step, and a trace that Perfetto opens."""

import collections
import itertools
import json

import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from configs import qwen3_235b
from disag_jax.config import Overlap, PlacementKind, SplitConfig
from disag_jax.planner import hardware, pictures, timeline
from disag_jax.planner.costs import Costs
from disag_jax.planner.prediction import predict, simulate_step, timing_of
from disag_jax.planner.simulator import make_table, transfer_times
from disag_jax.planner.sizes import Sizes
from disag_jax.schedule import schedule_of


def test_spans_are_the_step(prediction):
    tracks = collections.defaultdict(list)
    for span in timeline.predicted(prediction):
        tracks[span.stage, span.track].append(span)
    transfers = [track for track in tracks if track[1].endswith("transfers")]
    assert len(tracks) - len(transfers) == len(transfers) == len(prediction.workers)
    config, split = prediction.config, prediction.config.split
    outside = {name for name, seconds in prediction.outside_loop.items() if seconds}
    for track, spans in tracks.items():
        counts = collections.Counter(span.kind for span in spans)
        if track in transfers:
            assert set(counts) == {"transfer"}
        else:
            layers = config.model.num_layers // split.stages
            assert counts["forward"] == counts["backward"] == layers * config.batch.micro_batches
            assert counts["loss"] == config.batch.micro_batches
            assert {span.name for span in spans if span.kind == "outside"} == outside
            assert spans[0].begin == 0
            last = max(span.end for span in spans)
            assert last == pytest.approx(prediction.step_seconds)
        spans.sort(key=lambda span: span.begin)
        for before, after in itertools.pairwise(spans):
            assert before.end <= after.begin + 1e-9
            # Of a worker's own time nothing is left out but what its loop ends before others'.
            if track not in transfers and after.kind != "outside":
                assert before.end == pytest.approx(after.begin, abs=1e-9)


def test_transfers_end_where_periods_wait_for_them(prediction):
    """A period ends with its phases or its transfers, whichever is later: nothing else waits."""
    config = prediction.config
    costs = Costs(Sizes.of(config, prediction.load_factor), prediction.hardware)
    run = simulate_step(costs, shorten=False)
    table = make_table(
        config.model.num_layers, config.split.stages, config.batch.micro_batches, config.split.hop,
        config.split.colocated,
    )  # fmt: skip
    last = run.backward_end.copy()
    for _, period, begins, ends in transfer_times(table, timing_of(costs), run):
        assert (begins >= run.begin[period]).all()
        last[period] = last[period].clip(min=ends)
    without_loss = ~table.loss
    assert run.end[without_loss] == pytest.approx(last[without_loss], rel=1e-12)


def test_timeline_is_a_trace(prediction, tmp_path):
    path = tmp_path / "timeline.json"
    pictures.write_timeline(prediction, str(path))
    events = json.loads(path.read_text())["traceEvents"]
    spans = sorted(timeline.predicted(prediction), key=lambda span: span.begin)
    done = [event for event in events if event["ph"] == "X"]
    assert len(done) == len(spans)
    names = {(e["pid"], e["tid"], e["name"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    for event, span in zip(done, spans, strict=True):
        track = event["pid"], event["tid"]
        assert names[*track, "process_name"] == f"stage {span.stage}, predicted"
        assert names[*track, "thread_name"] == span.track
        assert (event["name"], event["cat"]) == (span.name, span.kind)
        assert event["ts"] == pytest.approx(1e6 * span.begin)
        assert event["dur"] == pytest.approx(1e6 * (span.end - span.begin)) and event["dur"] > 0


def test_what_overlaps_has_tracks_of_its_own(tmp_path):
    def span(kind, begin, end):
        return timeline.Span(0, "worker 1", kind, kind, begin, end)

    spans = [span("backward", 1, 4), span("forward", 0, 2), span("loss", 4, 5)]
    path = tmp_path / "timeline.json"
    timeline.write({"measured": spans}, path)
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    tracks = {e["name"]: names[e["tid"]] for e in events if e["ph"] == "X"}
    beside = "worker 1 beside"
    assert tracks == {"forward": "worker 1", "backward": beside, "loss": "worker 1"}


def test_a_panel_shows_all_of_few_workers_within_its_window(prediction):
    spans = timeline.predicted(prediction)
    schedule = schedule_of(prediction.config)
    begin, end = timeline.window(schedule, spans)
    first = min(span.begin for span in spans if span.kind == "loss")
    assert begin < first < end <= prediction.step_seconds
    axes = Figure().add_subplot()
    timeline.draw(axes, spans, (begin, end))
    drawn = [span for span in spans if span.end > begin and span.begin < end]
    assert 0 < len(drawn) < len(spans)
    assert sum(len(bars.get_paths()) for bars in axes.collections) == len(drawn)
    assert len(axes.get_yticks()) == len(prediction.workers) and not axes.get_ylabel()


@pytest.mark.parametrize("split", [
    # The plan of README.md for 128 H800.
    SplitConfig(stages=32, attention_workers=4, expert_workers=4, overlap=Overlap.INTERLEAVED,
                placement=PlacementKind.COLOCATED),
    # Four stages are shown, and the first backward units are far from all of them.
    SplitConfig(stages=60, attention_workers=1, expert_workers=1, hop=2),
])  # fmt: skip
def test_a_panel_of_many_stages_has_the_first_and_the_last_and_both_directions(split):
    config = qwen3_235b.get_config()
    config.split, config.batch.micro_batches = split, 96
    prediction = predict(config.validate(), hardware.load("h800"))
    spans, axes = timeline.predicted(prediction), Figure().add_subplot()
    begin, end = timeline.window(schedule_of(config), spans)
    timeline.draw(axes, spans, (begin, end))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == 8 and axes.get_ylabel() == f"8 of {len(prediction.workers)} workers"
    assert labels[0].endswith("stage 0") and labels[-1].endswith(f"stage {split.stages - 1}")
    drawn = {tuple(bars.get_facecolor()[0]) for bars in axes.collections}
    assert {to_rgba(timeline.COLOURS[kind]) for kind in ("forward", "backward", "loss")} <= drawn


def test_of_one_stage_with_many_workers_both_roles_are_shown():
    names = [f"{role} {i}" for role in ("attention", "expert") for i in range(9)]
    spans = [timeline.Span(0, name, "forward", "unit", 0, 1) for name in names]
    shown = [worker for _, worker in timeline.shown_workers(spans)]
    assert len(shown) == 8 and shown[0] == names[0] and shown[-1] == names[-1]
