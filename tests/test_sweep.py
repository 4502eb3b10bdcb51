"""The sweep: its cells, what its checks notice in made-up results, and a run on the CPU."""

import copy
import itertools
import json
import subprocess
import sys

import pytest

from benchmarks import sweep
from configs import balanced
from disag_jax.config import Overlap
from disag_jax.errors import ConfigError
from disag_jax.planner import hardware
from disag_jax.planner.prediction import predict

H100 = hardware.load("h100")
WAYS = [sweep.AF_PIPE, "none", "chunked", "interleaved", sweep.UNSHARED]


@pytest.mark.parametrize("num_devices", [2, 4])
def test_a_cell_has_both_placements_and_every_overlap_on_the_same_batches(num_devices):
    config = balanced.get_config()
    before = copy.deepcopy(config)
    grid = [4096, 16_384], [704, 1408], [2, 4]
    cases, left_out = sweep.sweep_cases(config, H100, num_devices, *grid)
    assert config == before and left_out == []
    cells = {}
    for case in cases:
        cells.setdefault(case.group, []).append(case)
    found = set()
    for cell in cells.values():
        assert [case.way for case in cell] == WAYS
        assert len({case.name for case in cell}) == len({case.predicted_seconds for case in cell})
        assert len({case.config.tokens_per_step for case in cell}) == 1
        assert len({case.communication_over_compute for case in cell}) == 1
        ours, *twins, unshared = [case.config for case in cell]
        assert unshared.split.colocated and unshared.split.expert_workers == 1
        assert unshared.split.num_devices == num_devices
        assert unshared.model == ours.model and unshared.run == ours.run
        assert ours.split.stages == 1 and ours.split.num_devices == num_devices
        for twin in twins:
            assert twin.validate().split.expert_workers == num_devices
            assert twin.model == ours.model and twin.run == ours.run
        found.add((ours.batch.sequence_length, ours.model.expert_width, ours.model.top_k))
    assert found == {(8192, 1408, 4), *itertools.product(*grid)}
    assert {case.group for case in cases if case.is_own} == {
        "6 layers, sequence 8192, width 1408, top-k 4"
    }


def test_a_cell_that_does_not_fit_is_left_out():
    cases, left_out = sweep.sweep_cases(balanced.get_config(), H100, 2, [4096], [1408, 2816], [4])
    assert {case.expert_width for case in cases} == {1408}
    (why,) = left_out
    assert why.startswith("6 layers, sequence 4096, width 2816, top-k 4: ") and why.endswith("over")


def test_communication_over_compute_is_that_of_the_blocking_twins_layer():
    config = sweep.in_cell(balanced.get_config(), 2, 8192, 704, 4)
    blocking, *_ = sweep.twins_of(config, H100)
    assert blocking.split.overlap is Overlap.NONE
    found = predict(blocking, H100)
    units = [found.unit_seconds[f"{role}_{phase}"] for role in ("attention", "expert")
             for phase in ("forward", "backward")]  # fmt: skip
    there, back = (found.transfers[f"all-to-all {phase}"] for phase in ("forward", "backward"))
    assert there > 0
    ratio = sweep.communication_over_compute(blocking, H100)
    assert ratio == pytest.approx((2 * there + 2 * back) / sum(units))


@pytest.mark.parametrize("cell", [(0, 704, 4), (4096, -1, 4), (4096, 704, 0), (4096, 704, 65)])
def test_a_cell_that_cannot_be_is_refused(cell):
    with pytest.raises(ConfigError, match=r"(length|expert_width|top_k) = -?\d+ must be"):
        sweep.in_cell(balanced.get_config(), 2, *cell)


def cell(length, ours, twins, predicted, ratio=0.1):
    """Results of a cell: measured seconds and predicted ones, AF-Pipe's and each twin's."""
    return [
        {
            "group": f"sequence {length}", "name": f"split {way}", "way": way,
            "placement": "disaggregated" if way == sweep.AF_PIPE else "colocated",
            "sequence_length": length, "expert_width": 704, "top_k": 2,
            "communication_over_compute": ratio, "seconds": seconds, "is_own": False,
            "predicted_seconds": expected, "gib": 8.0, "predicted_gib": 8.1, "losses": [3.0, 2.0],
        }
        for way, seconds, expected in zip(WAYS[:-1], (ours, *twins), predicted, strict=True)
    ]  # fmt: skip


def good():
    """Ten cells: the choice is right in nine, and 4% from the best in the last."""
    results = []
    for number in range(8):
        results += cell(number, 1.2, (1.3, 1.25, 1.0), (1.2, 1.3, 1.25, 1.0))
    results += cell(8, 1.0, (1.7, 1.2, 1.1), (1.0, 1.8, 1.2, 1.1), ratio=1.0)
    results += cell(9, 1.0, (1.1, 1.05, 1.04), (1.03, 1.1, 1.05, 1.02))
    return results


def test_outcomes_name_the_fastest_measured_and_predicted():
    found = {one.name: one for one in sweep.outcomes(good())}
    first, second, last = (found[f"sequence {number}"] for number in (0, 8, 9))
    assert (first.measured, first.predicted, first.is_right) == ("interleaved",) * 2 + (True,)
    assert first.slower == 0 and first.speed_up("seconds") == pytest.approx(1 / 1.2)
    assert (second.measured, second.predicted) == (sweep.AF_PIPE,) * 2
    assert second.speed_up("predicted_seconds") == pytest.approx(1.1)
    assert (last.measured, last.predicted) == (sweep.AF_PIPE, "interleaved")
    assert not last.is_right and last.slower == pytest.approx(0.04)
    # Of a cell of which one placement is still missing nothing is said.
    assert sweep.outcomes(cell(0, 1, (1, 1, 1), (1, 1, 1, 1))[1:]) == []


def changed(number, way, **fields):
    results = good()
    (one,) = [r for r in results if (r["group"], r["way"]) == (f"sequence {number}", way)]
    one |= fields
    return results


def test_good_results_pass_in_any_order():
    assert sweep.check(good(), 1e-2) == sweep.check(good()[::-1], 1e-2) == []
    # Out of the balanced range, any speed-up over the blocking twin will do.
    for ratio in (0.79, 1.26):
        results = changed(8, sweep.AF_PIPE, communication_over_compute=ratio)
        (blocking,) = [r for r in results if r["group"] == "sequence 8" and r["way"] == "none"]
        blocking["seconds"] = 1.2
        assert sweep.check(results, 1e-2) == []


@pytest.mark.parametrize(
    "number, way, fields, words",
    [
        (3, "chunked", {"losses": [3.0, 2.1]}, ["losses of split af-pipe and split chunked dif"]),
        (3, "none", {"losses": [3.0, float("nan")]}, ["losses of split af-pipe and split none"]),
        (8, "none", {"seconds": 1.5}, ["sequence 8: AF-Pipe must be 1.6 times as fast as the bl"]),
        (0, sweep.AF_PIPE, {"is_own": True}, ["sequence 0: AF-Pipe must be 0.95 times as fast as"]),
        (9, "interleaved", {"seconds": 1.06}, ["sequence 9: the planner's choice, interleaved"]),
        (0, "interleaved", {"predicted_seconds": 1.25},
         ["faster placement in 90% of the cells: it did in 8 of 10",
          "sequence 0: the planner's choice, af-pipe, is 20% slower than interleaved"]),
    ],
)  # fmt: skip
def test_what_does_not_hold_is_said(number, way, fields, words):
    wrong = sweep.check(changed(number, way, **fields), 1e-2)
    assert len(wrong) == len(words)
    for found, expected in zip(wrong, words, strict=True):
        assert expected in found


def test_the_crossing_line_is_between_the_cells_that_win_and_those_that_lose():
    from matplotlib.figure import Figure

    # AF-Pipe wins beyond 8,192 tokens, and is predicted to from 4,096 to 8,192 on by width.
    cells = {(w, s): (s / 8192, s / 8192 * (1 + (w == 704))) for w in (704, 1408)
             for s in (2048, 4096, 16_384)}  # fmt: skip
    axes = Figure().subplots()
    sweep._draw_crossing(axes, cells)
    measured, predicted = axes.collections
    (line,) = measured.get_paths()
    assert line.vertices[:, 0] == pytest.approx(8192)
    (line,) = predicted.get_paths()
    ends = dict(zip(line.vertices[:, 1], line.vertices[:, 0], strict=True))
    assert ends[704] == pytest.approx(4096) and ends[1408] == pytest.approx(8192)
    filled = [dot.get_xdata()[0] for dot in axes.lines if dot.get_fillstyle() == "full"]
    assert filled == [16_384] * 2
    axes = Figure().subplots()
    sweep._draw_crossing(axes, {(704, 2048): (0.5, 0.6), (704, 4096): (1.5, 1.6)})
    assert not axes.collections and len(axes.lines) == 2


def test_the_picture_and_the_table_show_every_cell(tmp_path):
    path = tmp_path / "sweep.png"
    sweep.draw([], path)
    assert not path.exists()
    sweep.draw(good(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    made = sweep.table(good())
    assert made.row_count == 40
    fastest = [cell for cell in made.columns[1].cells if "<- fastest" in cell]
    assert len(fastest) == 10 and sum("<- predicted" in cell for cell in fastest) == 9


@pytest.mark.slow
def test_a_cell_on_simulated_devices_is_measured_and_gone_on_with(tmp_path):
    overrides = {
        "run.compute_dtype": "bfloat16", "split.stages": 1, "split.expert_workers": 1,
        "batch.tokens_per_worker": 128,
    }  # fmt: skip
    out = tmp_path / "sweep.json"
    command = [
        sys.executable, "-m", "benchmarks.sweep", "--config=configs/tiny.py", "--hardware=h100",
        f"--out={out}", f"--plot={tmp_path}/sweep.png", "--cpu_devices=2", "--threads=2",
        "--layers=1", "--micro_batches=4", "--length=64", "--expert_width=64", "--top_k=2",
        *(f"--config.{field}={value}" for field, value in overrides.items()),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    results = json.loads(out.read_text())
    # The cell of the config, and the one of the flags.
    assert [r["way"] for r in results] == 2 * WAYS and (tmp_path / "sweep.png").exists()
    # A simulated device is no H100: the claims need not hold, but the losses must agree.
    assert run.returncode in (0, 1) and "differ" not in run.stderr
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (run.returncode, run.stderr)
    assert "compiled" in run.stdout and "compiled" not in again.stdout
