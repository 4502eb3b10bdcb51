"""One GPU as several workers: the processes' environments, their ends, and the daemon's."""

import json
import os
import pathlib
import signal
import threading
import time

import pytest

from disag_jax import parts
from disag_jax.errors import ConfigError, RunError

# Stands for NVIDIA's daemon, and keeps what it is told.
CONTROL = """#!/bin/sh
[ "$1" = -d ] && echo "start $CUDA_MPS_PIPE_DIRECTORY" >> {told} && exit {code}
read command
echo "$command" >> {told}
case "$command" in get_server_list) echo 42;; "get_server_status 42") echo ACTIVE;; esac
"""

PROGRAM = """
import json, os, pathlib, sys
flags = dict(argument.lstrip("-").split("=") for argument in sys.argv[1:])
path = pathlib.Path(__file__).parent / f"{flags['process_id']}.json"
path.write_text(json.dumps({"flags": flags, "environment": dict(os.environ)}))
"""


@pytest.fixture
def control(tmp_path, monkeypatch):
    """Puts the daemon on the PATH; a function sets its exit code and the file has what it heard."""
    told = tmp_path / "told.txt"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def make(code=0) -> pathlib.Path:
        path = tmp_path / parts.CONTROL
        path.write_text(CONTROL.format(told=told, code=code))
        path.chmod(0o755)
        return told

    return make


def program(directory, text) -> str:
    path = directory / "program.py"
    path.write_text(text)
    return str(path)


def test_each_process_has_its_part_and_joins_the_others(control, tmp_path, capfd):
    told = control()
    say = PROGRAM + "print('said by', flags['process_id'])"
    parts.run(2, 4, "1", (program(tmp_path, say), "--x=y"))
    records = [json.loads((tmp_path / f"{part}.json").read_text()) for part in range(2)]
    for part, record in enumerate(records):
        flags, environment = record["flags"], record["environment"]
        assert flags["x"] == "y" and flags["num_processes"] == "2"
        assert flags["process_id"] == str(part)
        assert environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
        assert environment["CUDA_VISIBLE_DEVICES"] == "1"
        assert float(environment["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == pytest.approx(0.22)
        assert environment["NCCL_P2P_DISABLE"] == environment["NCCL_SHM_DISABLE"] == "1"
    first, second = (record["environment"] for record in records)
    assert first["NCCL_HOSTID"] != second["NCCL_HOSTID"]
    assert records[0]["flags"]["coordinator"] == records[1]["flags"]["coordinator"]
    pipe = first["CUDA_MPS_PIPE_DIRECTORY"]
    heard = told.read_text().splitlines()
    assert heard[:2] == [f"start {pipe}", f"start_server -uid {os.getuid()}"]
    assert heard[-2:] == ["get_server_status 42", "quit"]
    assert capfd.readouterr().out.split() == ["said", "by", "0"]


ONE_FAILS = (
    PROGRAM
    + """
import time
if flags["process_id"] == "1":
    print("error: what went wrong")
    sys.stdout.flush()
    {end}
time.sleep(60)
"""
)


@pytest.mark.parametrize(
    "end, code, kind",
    [
        ("sys.exit(2)", 2, ConfigError),
        ("sys.exit(1)", 1, RunError),
        # As XLA, NCCL and JAX's coordination end a process that cannot go on.
        ("os.abort()", -signal.SIGABRT, RunError),
    ],
)
@pytest.mark.timeout(30)
def test_where_one_fails_the_others_are_ended(control, tmp_path, end, code, kind):
    told = control()
    one_fails = program(tmp_path, ONE_FAILS.replace("{end}", end))
    with pytest.raises(kind, match=f"part 1 of 3 ended with code {code}: error: what went wrong"):
        parts.run(3, 3, "0", (one_fails,))
    assert told.read_text().endswith("quit\n")


WAITS = (
    PROGRAM
    + """
import time
print("waits for what does not come", flush=True)
path.with_suffix(".waits").touch()
time.sleep(60)
"""
)


@pytest.mark.timeout(30)
def test_a_stop_reaches_all_and_says_where_they_were(control, tmp_path):
    told = control()

    def terminate():
        while not all((tmp_path / f"{part}.waits").exists() for part in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    with pytest.raises(RunError, match="stopped by SIGTERM; part 1: waits for what does not come"):
        parts.run(2, 2, "0", (program(tmp_path, WAITS),))
    assert told.read_text().endswith("quit\n")


def test_parts_that_cannot_be_are_refused(control, tmp_path, monkeypatch):
    for wanted, of in ((0, 1), (3, 2)):
        with pytest.raises(ConfigError, match=f"--parts = {wanted} must be from 1 to --of = {of}"):
            parts.run(wanted, of, "0", ("x.py",))
    control(code=3)
    with pytest.raises(RunError, match=f"{parts.CONTROL} failed with code 3"):
        parts.run(2, 2, "0", ("x.py",))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=f"{parts.CONTROL} must be on the PATH"):
        parts.run(2, 2, "0", ("x.py",))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_splits_are_measured_by_processes_that_have_a_part_each(control, tmp_path, capfd):
    """On simulated devices, which no daemon serves: the first process prints and writes."""
    control()
    out = tmp_path / "splits.json"
    overrides = {
        "run.compute_dtype": "bfloat16", "split.stages": 1, "split.expert_workers": 1,
        "model.num_layers": 1, "batch.tokens_per_worker": 128,
    }  # fmt: skip
    command = (
        "-m", "benchmarks.splits", "--config=configs/tiny.py", "--hardware=h100", f"--out={out}",
        "--cpu_devices=1", "--length=128",
        *(f"--config.{field}={value}" for field, value in overrides.items()),
    )  # fmt: skip
    parts.run(2, 2, "0", command)
    results = json.loads(out.read_text())
    assert {r["placement"] for r in results} == {"disaggregated", "colocated"}
    assert {r["devices_here"].split(",")[0] for r in results} == {"2 x 50% of cpu"}
    said = capfd.readouterr().out
    assert said.count("2 compiled") == 1 and "losses agree" in said
