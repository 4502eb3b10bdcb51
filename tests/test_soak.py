"""Hundreds of steps on several processes, with faults between, as if there had been none."""

import random
import signal

import pytest

from disag_jax.saved_checkpoint import saved_steps
from tests import launching
from tests.launching import PAIR, TIMEOUT_SECONDS, finish, read_records

NUM_STEPS = 300
FAULTS = ("kill one", "kill all", "stop one", "terminate one", "terminate all")
HEARTBEAT_SECONDS = 10
ARGUMENTS = (
    *PAIR,
    f"--config.run.num_steps={NUM_STEPS}",
    "--config.run.checkpoint_every=10",
    f"--config.run.heartbeat_timeout_seconds={HEARTBEAT_SECONDS}",
)
WORKERS = {
    2: (),
    4: ("--config.split.attention_workers=2", "--config.split.expert_workers=2"),
}


def suffer(fault: str, running, rng: random.Random):
    """Lets a fault happen, waits for all to end, and checks how they did."""
    victim = rng.randrange(len(running))
    numbers = {
        "kill": signal.SIGKILL,
        "stop": signal.SIGSTOP,
        "terminate": signal.SIGTERM,
    }
    what, whom = fault.split()
    for process in running if whom == "all" else [running[victim]]:
        process.send_signal(numbers[what])
    if what == "terminate":
        for _, error, code in finish(running):
            assert code == 0, error[-3000:]
    elif whom == "one":
        others = [process for process in running if process is not running[victim]]
        for _, error, code in finish(others):
            assert code != 0 and f"process {victim} is lost" in error, (fault, error[-3000:])
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(10 * TIMEOUT_SECONDS)
@pytest.mark.parametrize("num_processes", WORKERS)
def test_a_run_with_faults_equals_one_without(tmp_path, num_processes):
    config_file, workdir = launching.write_config(tmp_path), tmp_path / "run"
    arguments = (*ARGUMENTS, *WORKERS[num_processes])
    devices, rng = num_processes, random.Random(num_processes)
    reached, faults = 0, []
    while reached < NUM_STEPS - 60:
        resume = ("--resume",) if faults else ()
        running = launching.start_all(
            config_file, workdir, num_processes, *arguments, *resume, devices=devices
        )
        until = reached + rng.randrange(20, 60)
        launching.wait_for_step(workdir, until, running)
        faults.append(rng.choice(FAULTS))
        suffer(faults[-1], running, rng)
        reached = saved_steps(workdir / "checkpoints")[-1]
        assert reached >= until - 20, "at most the checkpoint under way and the one due are lost"
    arguments += ("--config.run.eval_batches=1",)
    suffered = launching.launch(
        config_file, workdir, num_processes, *arguments, "--resume", devices=devices
    )
    whole = launching.launch(
        config_file, tmp_path / "whole", num_processes, *arguments, devices=devices
    )
    print(f"{num_processes} processes, {len(faults)} faults: {', '.join(faults)}")
    expected = {r["step"]: r["loss"] for r in whole if "loss" in r}
    assert list(expected) == list(range(1, NUM_STEPS + 1))
    found = {r["step"]: r["loss"] for r in suffered if "loss" in r}
    assert found == expected
    assert all(r["loss"] == expected[r["step"]] for r in suffered if "loss" in r)
    assert suffered[-1]["held_out_loss"] == whole[-1]["held_out_loss"]
    assert [r["step"] for r in read_records(workdir) if "held_out_loss" in r] == [NUM_STEPS]
