"""Starting `train.py` as real processes on this machine, and reading what they did."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time

from disag_jax.launch import free_port

REPOSITORY = pathlib.Path(__file__).parent.parent
TIMEOUT_SECONDS = 240

CONFIG = """
from configs import tiny
from disag_jax.config import Dtype

def get_config():
    config = tiny.get_config()
    config.model.d_model, config.model.expert_width, config.model.num_layers = 16, 8, 3
    config.batch.sequence_length, config.batch.tokens_per_worker = 16, 32
    config.data.paths = ({text!r},)
    config.run.compute_dtype = Dtype.FLOAT64
    config.run.num_steps, config.run.log_every = 4, 1
    config.run.eval_batches, config.run.checkpoint_every = 0, 2
    config.run.start_timeout_seconds = 60
    return config
"""


def write_config(directory: pathlib.Path) -> pathlib.Path:
    """A config file in a directory, with the text that it trains on."""
    text = directory / "text"
    text.mkdir()
    for number in range(4):
        lines = (f"line {n} of file {number}, {n * n}\n" for n in range(200))
        (text / f"{number}.txt").write_text("".join(lines))
    path = directory / "small.py"
    path.write_text(CONFIG.format(text=str(text)))
    return path


def start(config_file, workdir, devices, *arguments, script="train.py", environment=()):
    command = [
        sys.executable,
        script,
        f"--config={config_file}",
        f"--workdir={workdir}",
        f"--cpu_devices={devices}",
        *arguments,
    ]
    inherited = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=inherited | dict(environment),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(running):
    """(exit code, stdout, stderr) of each process; none outlives the test."""
    try:
        return [(*p.communicate(timeout=TIMEOUT_SECONDS), p.returncode) for p in running]
    finally:
        for process in running:
            process.kill()


# One device each: the cheapest run of two processes.
PAIR = (
    "--config.split.stages=1",
    "--config.split.attention_workers=1",
    "--config.split.expert_workers=1",
    "--config.batch.micro_batches=1",
    "--config.model.num_layers=1",
)


def start_all(
    config_file, workdir, num_processes, *arguments, devices=8, script="train.py", environments=None
):
    """Starts the processes of one run, which share the devices evenly.

    devices: simulated ones; 0 where each process has GPUs that its variables of `environments` say.
    """
    port = free_port()
    joined = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={num_processes}")
    return [
        start(
            config_file,
            workdir,
            devices // num_processes,
            *arguments,
            *(joined if num_processes > 1 else ()),
            *((f"--process_id={process}",) if num_processes > 1 else ()),
            script=script,
            environment=environments[process] if environments else (),
        )
        for process in range(num_processes)
    ]


def wait_for_step(workdir, step, running, timeout_seconds=TIMEOUT_SECONDS):
    """Returns once a step is in the records; fails if a process ends before."""
    deadline = time.monotonic() + timeout_seconds
    while not any(record["step"] >= step for record in read_records(workdir)):
        for process in running:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no step {step} in {timeout_seconds} s"
        time.sleep(0.05)


def launch(config_file, workdir, num_processes, *arguments, **options):
    """Runs all processes, as `start_all`, to their end; returns the first one's records."""
    running = start_all(config_file, workdir, num_processes, *arguments, **options)
    for out, error, code in finish(running):
        assert code == 0, (out[-2000:], error[-4000:])
    return read_records(workdir)


def read_records(workdir) -> list[dict]:
    """The records so far, without a line that is still being written."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(records) -> list[float]:
    return [record["loss"] for record in records if "loss" in record]


def send_when_there(signum: int, *paths: pathlib.Path):
    """Sends a signal to this process as soon as all the files are there; returns at once."""

    def send():
        while not all(path.exists() for path in paths):
            time.sleep(0.01)
        os.kill(os.getpid(), signum)

    threading.Thread(target=send).start()
