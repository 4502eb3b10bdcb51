"""The training steps of the large configs trace for their real device counts, without weights.

A process can simulate one number of devices, so each config is lowered in a process of its own:
`python -m tests.test_lowering deepseek_moe_16b` prints what the test checks.
"""

import collections
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from disag_jax.config import SplitConfig
from disag_jax.geometry import placement_of
from disag_jax.step import Stepper
from mesh import runtime
from mesh.placement import Meshes
from tests import support

SPLIT = SplitConfig(stages=2, attention_workers=1, expert_workers=3)
ROOT = Path(__file__).parents[1]

# Weights [W, v, P] of all workers.
ROWS = {
    "deepseek_moe_16b": (16, 7, 207_618_048),
    "gpt_oss_120b": (64, 9, 273_715_200),
    "qwen3_235b": (128, 6, 490_733_568),
}
# One worker's rows alone are 2.9 GB or more.
MOST_HOST_BYTES = 1e9
COLLECTIVES = ("all_reduce", "all_gather", "all_to_all", "collective_permute", "reduce_scatter")


@pytest.mark.parametrize("name", ROWS)
def test_training_step_lowers(name):
    command = [sys.executable, "-m", "tests.test_lowering", name]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["rows"] == [list(ROWS[name]), "bfloat16"]
    assert facts["row_gradients"] == [list(ROWS[name]), "float32"]
    assert facts["pipeline_collectives"] > 0
    assert facts["update_collectives"] == {"attention": 0, "expert": 0, "vocabulary": 0}
    assert facts["host_bytes"] < MOST_HOST_BYTES
    assert facts["seconds"] < 60


def test_program_size_does_not_grow_with_layers():
    assert operations(num_layers=4, micro_batches=4) == operations(num_layers=8, micro_batches=4)


def test_program_size_does_not_grow_with_micro_batches():
    assert operations(num_layers=4, micro_batches=4) == operations(num_layers=4, micro_batches=12)


def test_updates_do_not_grow_with_layers():
    few, many = (
        support.make_stepper(support.small_config(SPLIT, num_layers=num_layers))
        for num_layers in (4, 8)
    )
    sizes = [
        {name: count_operations(low) for name, low in stepper.manager.lower_updates().items()}
        for stepper in (few, many)
    ]
    assert sizes[0] == sizes[1]


def operations(num_layers: int, micro_batches: int) -> dict[str, int]:
    """Operations of the gradient program by name; the schedule's table is the data of a few."""
    config = support.small_config(SPLIT, micro_batches, num_layers=num_layers)
    stepper = support.make_stepper(config)
    assert len(stepper.schedule.segments) == 3
    return count_operations(lower_gradients(stepper))


def count_operations(lowered) -> dict[str, int]:
    text = lowered.as_text()
    operations = collections.Counter(re.findall(r"\b(?:stablehlo|func|sdy)\.\w+", text))
    return operations | {"lines": text.count("\n")}


def lower_gradients(stepper: Stepper):
    program = stepper.gradient_program(stepper.chooser.options[0])
    return program.lower(*stepper.abstract_arguments())


def facts_of(name: str) -> dict:
    """Lowers a config's training step on simulated devices and describes it."""
    config = importlib.import_module(f"configs.{name}").get_config().validate()
    runtime.simulate_cpu_devices(config.split.num_devices)
    started = time.perf_counter()
    stepper = Stepper(config, Meshes.make(placement_of(config), jax.devices()))
    rows, *_ = stepper.abstract_arguments()
    lowered = lower_gradients(stepper)
    row_gradients, *_ = lowered.out_info
    updates = stepper.manager.lower_updates()
    return {
        "rows": [rows.shape, rows.dtype.name],
        "row_gradients": [row_gradients.shape, row_gradients.dtype.name],
        "pipeline_collectives": count_collectives(lowered),
        "update_collectives": {
            group: count_collectives(program) for group, program in updates.items()
        },
        "seconds": time.perf_counter() - started,
        "host_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """Most memory this process held; `getrusage` would count its parent's before it was born."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))


def count_collectives(lowered) -> int:
    counts = count_operations(lowered)
    return sum(counts.get(f"stablehlo.{collective}", 0) for collective in COLLECTIVES)


if __name__ == "__main__":
    print(json.dumps(facts_of(sys.argv[1])))
