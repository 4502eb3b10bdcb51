"""Log records against plain sums, and what is shown on the terminal."""

import dataclasses
import io
import types

import jax
import numpy as np
import pytest
import rich.console

from disag_jax import display, metrics, metrics_log
from disag_jax.config import SplitConfig
from disag_jax.flops import model_flops
from disag_jax.geometry import Bucket
from mesh.placement import ExpertPlaces
from tests import support

CONFIG = support.small_config(SplitConfig(stages=1, attention_workers=1, expert_workers=4))


def step_metrics(counts, *, seconds=(2.0, 0.1, 1.5, 0.3), compiled=False, reruns=0, **fields):
    """One step's metrics; seconds are of the step, the input wait, the pipeline, the update."""
    names = ("step_seconds", *metrics.PARTS)
    return {
        **dict.fromkeys(metrics.MEANS, 1.0),
        **dict(zip(names, seconds, strict=True)),
        "expert_counts": np.array(counts),
        "dropped_pairs": np.zeros(len(counts), int),
        "bucket_reruns": reruns,
        "bucket": Bucket(8, 16),
        "compiled": compiled,
        **fields,
    }


def make_record(*steps, config=CONFIG):
    meter = metrics.StepMeter(config, support.make_stepper(config).meshes)
    for step in steps:
        meter.add(step)
    return meter.record(len(steps))


EVEN, UNEVEN = [4, 4, 4, 4, 4, 4], [12, 12, 0, 0, 0, 0]


def test_load_of_each_layer():
    record = make_record(
        step_metrics([EVEN, UNEVEN], dropped_pairs=np.array([0, 2]), reruns=1),
        step_metrics([EVEN, [*EVEN[:5], 0]], dropped_pairs=np.array([0, 5])),
    )
    assert record["expert_load"] == pytest.approx([1, (3 + 1.2) / 2])
    assert record["expert_load_p95"] == pytest.approx([1, (3 + 1.2) / 2])
    assert record["dead_experts"] == [0, 1]  # the others had tokens in one of the steps
    assert record["dropped_pairs"] == [0, 7]
    assert (record["bucket_reruns"], record["bucket_rows"]) == (1, 8)


def test_imbalance_cost_is_the_busiest_worker_over_the_mean():
    rng = np.random.default_rng(0)
    for num_experts, num_workers in ((6, 4), (8, 2), (7, 7), (5, 1)):
        places = ExpertPlaces(num_experts, num_workers)
        counts_LE = rng.integers(1, 50, (3, num_experts))
        for counts_E, cost in zip(
            counts_LE, metrics.imbalance_cost(counts_LE, places), strict=True
        ):
            work = [sum(counts_E[e] for e in places.share(w)) for w in range(num_workers)]
            assert cost == pytest.approx(max(work) * num_workers / sum(work) - 1)


def test_even_experts_on_uneven_workers_have_a_cost():
    # Six experts on four workers: two of them hold two each.
    assert make_record(step_metrics([EVEN, EVEN]))["imbalance_cost"] == pytest.approx([1 / 3] * 2)


def test_parts_add_up_to_the_step():
    record = make_record(
        step_metrics([EVEN, EVEN], seconds=(2.0, 0.1, 1.5, 0.3)),
        step_metrics([EVEN, EVEN], seconds=(4.0, 0.3, 2.5, 0.5)),
    )
    assert record["step_seconds"] == pytest.approx(3)
    parts = [record[name] for name in (*metrics.PARTS, "host_seconds")]
    assert parts == pytest.approx([0.2, 2.0, 0.4, 0.4])
    assert sum(parts) == pytest.approx(record["step_seconds"])
    assert "compile_seconds" not in record


def test_steps_that_compiled_have_a_time_of_their_own():
    slow = step_metrics([EVEN, EVEN], seconds=(60.0, 0.1, 59.5, 0.3), compiled=True)
    record = make_record(slow, step_metrics([EVEN, EVEN]))
    assert record["compile_seconds"] == 60 and record["step_seconds"] == 2
    assert make_record(slow)["step_seconds"] == 60  # there is no other


def test_throughput_and_mfu():
    record = make_record(step_metrics([EVEN, EVEN]))
    assert record["tokens_per_second"] == CONFIG.tokens_per_step / 2
    flops = model_flops(CONFIG).total * record["tokens_per_second"] / CONFIG.split.num_devices
    assert record["tflops_per_device"] == pytest.approx(flops / 1e12)
    assert "mfu" not in record  # nobody states the peak of a simulated device
    run = dataclasses.replace(CONFIG.run, peak_tflops_per_device=1e-6)
    record = make_record(step_metrics([EVEN, EVEN]), config=dataclasses.replace(CONFIG, run=run))
    assert record["mfu"] == pytest.approx(flops / 1e6)


def test_memory_of_each_worker_that_the_backend_counts():
    placement = support.make_stepper(CONFIG).meshes.placement

    def device(process, stats):
        return types.SimpleNamespace(process_index=process, memory_stats=lambda: stats)

    counts = [{"peak_bytes_in_use": 2**30 * n} for n in range(5)]
    devices = [device(0, counts[0]), device(0, counts[1]), device(1, counts[2]), device(0, None)]
    devices.append(device(0, counts[4]))
    meshes = types.SimpleNamespace(
        placement=placement, union=types.SimpleNamespace(devices=np.array([devices]))
    )
    assert metrics.peak_memory(meshes) == {
        "replica0_stage0_attention0": 0.0,
        "replica0_stage0_expert0": 1.0,
        "replica0_stage0_expert3": 4.0,
    }


def test_memory_of_other_processes_is_what_they_say(monkeypatch):
    placement = support.make_stepper(CONFIG).meshes.placement
    theirs = types.SimpleNamespace(process_index=1, memory_stats=lambda: None)
    mine = types.SimpleNamespace(process_index=0, memory_stats=lambda: {"peak_bytes_in_use": 2**30})
    union = types.SimpleNamespace(devices=np.array([[mine, theirs]]))
    monkeypatch.setattr(metrics.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        metrics.multihost_utils,
        "process_allgather",
        lambda own: np.stack([own, [[-1.0, 3.0]]]),
    )
    found = metrics.peak_memory(types.SimpleNamespace(placement=placement, union=union))
    assert found == {"replica0_stage0_attention0": 1.0, "replica0_stage0_expert0": 3.0}


def test_only_the_first_process_writes_and_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = metrics_log.MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", next_step=1)
    log.write({"step": 1, "loss": 2.0})
    log.close()
    shown = display.make_display(CONFIG)
    shown.say("text")
    shown.record(make_record(step_metrics([EVEN, EVEN])))
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_line_of_a_record():
    record = make_record(step_metrics([EVEN, UNEVEN], reruns=2)) | {"mfu": 0.251}
    shown = display.line(record, num_steps=20)
    for fact in (
        "step     1/20", "loss 1.0000", "grad norm 1.000", "MFU 25.1%", "dead experts 0 4",
        "2.000 s a step (pipeline 1.500, update 0.300, input 0.100, host 0.100)", "re-runs 2",
        "load max/mean by layer 1.00 3.00",
    ):  # fmt: skip
        assert fact in shown
    assert "\n" not in shown


def test_line_of_many_layers_names_the_worst():
    record = make_record(step_metrics([EVEN, UNEVEN]))
    per_layer = ("expert_load", "dead_experts", "dropped_pairs")
    shown = display.line(record | {name: record[name] * 10 for name in per_layer}, num_steps=20)
    assert "load max/mean 3.00 in layer 1  dead experts 40" in shown


def test_plain_lines_elsewhere_than_in_a_terminal(capsys):
    shown = display.make_display(CONFIG)
    shown.step(1, 2.0)
    shown.record(make_record(step_metrics([EVEN, EVEN])))
    shown.close()
    assert capsys.readouterr().out.count("\n") == 1


def test_progress_bar_in_a_terminal():
    output = io.StringIO()
    console = rich.console.Console(file=output, force_terminal=True, width=120)
    bar = display.BarDisplay(20, console)
    bar.say("parameters [not markup]")
    bar.step(7, 2.5)
    bar.record(make_record(step_metrics([EVEN, EVEN])) | {"mfu": 0.5})
    bar.close()
    shown = output.getvalue()
    for fact in ("parameters [not markup]", "7/20", "loss 2.5000", "tokens/s", "MFU 50.0%"):
        assert fact in shown
