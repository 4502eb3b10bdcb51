"""One GPU as several workers: the processes' environments, their ends, and the daemon's."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from disag_jax import launch, parts
from disag_jax.errors import USER_ERROR, ConfigError, RunError
from mesh import runtime
from tests import launching

# Stands for NVIDIA's daemon, and keeps what it is told.
CONTROL = """#!/bin/sh
[ "$1" = -d ] && echo "devices ${{CUDA_VISIBLE_DEVICES-none}}" >> {told}.devices
[ "$1" = -d ] && echo "start $CUDA_MPS_PIPE_DIRECTORY" >> {told} && exit {code}
read command
echo "$command" >> {told}
case "$command" in get_server_list) echo 42;; "get_server_status 42") echo ACTIVE;;
  quit*) {at_end};; esac
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

    def make(code=0, at_end=":") -> pathlib.Path:
        path = tmp_path / parts.CONTROL
        path.write_text(CONTROL.format(told=told, code=code, at_end=at_end))
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
        assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "16"
        assert float(environment["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == pytest.approx(0.22)
        assert environment["NCCL_P2P_DISABLE"] == environment["NCCL_SHM_DISABLE"] == "1"
    first, second = (record["environment"] for record in records)
    assert first["NCCL_HOSTID"] != second["NCCL_HOSTID"]
    assert records[0]["flags"]["coordinator"] == records[1]["flags"]["coordinator"]
    pipe = first["CUDA_MPS_PIPE_DIRECTORY"]
    heard = told.read_text().splitlines()
    assert heard[:2] == [f"start {pipe}", f"start_server -uid {os.getuid()}"]
    assert heard[-2:] == ["get_server_status 42", "quit -t 10"]
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
    assert told.read_text().endswith("quit -t 10\n")


WAITS = (
    PROGRAM
    + """
import time
print("waits for what does not come", flush=True)
path.with_suffix(".waits").touch()
time.sleep(60)
"""
)


def terminate_when_they_wait(directory):
    waiting = (directory / f"{part}.waits" for part in range(2))
    launching.send_when_there(signal.SIGTERM, *waiting)


@pytest.mark.timeout(30)
def test_a_stop_reaches_all_and_says_where_they_were(control, tmp_path):
    told = control()

    terminate_when_they_wait(tmp_path)
    with pytest.raises(RunError, match="stopped by SIGTERM; part 1: waits for what does not come"):
        parts.run(2, 2, "0", (program(tmp_path, WAITS),))
    assert told.read_text().endswith("quit -t 10\n")


ENDS_IN_ORDER = WAITS.replace("time.sleep(60)", "signal.pause()").replace(
    "import time", "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))"
)


@pytest.mark.timeout(30)
def test_parts_that_end_in_order_are_no_error(control, tmp_path):
    told = control()
    terminate_when_they_wait(tmp_path)
    parts.run(2, 2, "0", (program(tmp_path, ENDS_IN_ORDER),))
    assert told.read_text().endswith("quit -t 10\n")


@pytest.mark.timeout(30)
def test_a_stop_before_the_parts_ends_the_daemon(control, tmp_path, monkeypatch):
    told = control()
    monkeypatch.setattr(parts, "_has_server", lambda _: os.kill(os.getpid(), signal.SIGHUP))
    with pytest.raises(RunError, match="stopped by SIGHUP"):
        parts.run(2, 2, "0", (program(tmp_path, PROGRAM),))
    assert told.read_text().endswith("quit -t 10\n") and not (tmp_path / "0.json").exists()


def test_a_daemon_that_does_not_end_does_not_hide_why_the_parts_did(control, tmp_path, monkeypatch):
    control(at_end="exit 4")
    with pytest.raises(RunError, match=f"{parts.CONTROL} failed with code 4"):
        parts.run(1, 1, "0", (program(tmp_path, PROGRAM),))
    with pytest.raises(ConfigError, match="part 0 of 1 ended with code 2"):
        parts.run(1, 1, "0", (program(tmp_path, "raise SystemExit(2)"),))
    monkeypatch.setattr(parts, "ANSWER_SECONDS", 0.5)
    control(at_end="exec sleep 20")
    with pytest.raises(RunError, match=f"{parts.CONTROL} did not answer in 0.5 s"):
        parts.run(1, 1, "0", (program(tmp_path, PROGRAM),))


def test_the_gpu_is_one_of_those_that_may_be_seen(control, tmp_path, monkeypatch):
    for wanted in ("", "0,1"):
        with pytest.raises(ConfigError, match=f"--gpu = {wanted!r} must name one GPU"):
            parts.run(1, 1, wanted, ("x.py",))
    monkeypatch.delenv(runtime.VISIBLE_GPUS, raising=False)
    assert parts.which_gpu(None) == "0" and parts.which_gpu("3") == "3"
    monkeypatch.setenv(runtime.VISIBLE_GPUS, "2,3")
    assert parts.which_gpu(None) == "2" and parts.which_gpu("3") == "3"
    with pytest.raises(ConfigError, match=r"--gpu = '0' must be one of \w+ = 2,3"):
        parts.run(1, 1, "0", ("x.py",))
    told = control()
    parts.run(1, 1, None, (program(tmp_path, PROGRAM),))
    environment = json.loads((tmp_path / "0.json").read_text())["environment"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "2"
    assert told.with_suffix(".txt.devices").read_text() == "devices none\n"


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


def flags_of_splits(out) -> tuple[str, ...]:
    overrides = {
        "run.compute_dtype": "bfloat16", "split.stages": 1, "split.expert_workers": 1,
        "model.num_layers": 1, "batch.tokens_per_worker": 128,
    }  # fmt: skip
    return (
        "--config=configs/tiny.py", "--hardware=h100", f"--out={out}", "--cpu_devices=1",
        "--length=128", *(f"--config.{field}={value}" for field, value in overrides.items()),
    )  # fmt: skip


# One process lacks memory in the second case, and the other waits for it in a collective.
ONE_LACKS_MEMORY = """
import runpy
import jax
from benchmarks import cases
measure, seen = cases.measure, []
def lacks(case, stepper):
    seen.append(case)
    if len(seen) == 2 and jax.process_index() == 1:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory")
    return measure(case, stepper)
cases.measure = lacks
runpy.run_module("benchmarks.splits", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_process_that_fails_alone_ends_the_benchmark(control, tmp_path, monkeypatch):
    """And the case is not tried again; what was measured before stays."""
    control()
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    out = tmp_path / "splits.json"
    with pytest.raises(RunError, match=r"part 1.*RESOURCE_EXHAUSTED: no memory"):
        parts.run(2, 2, "0", (program(tmp_path, ONE_LACKS_MEMORY), *flags_of_splits(out)))
    results = json.loads(out.read_text())
    assert ["seconds" in result for result in results] == [True, False]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_splits_are_measured_by_processes_that_have_a_part_each(control, tmp_path, capfd):
    """On simulated devices, which no daemon serves: the first process prints and writes."""
    control()
    out = tmp_path / "splits.json"
    parts.run(2, 2, "0", ("-m", "benchmarks.splits", *flags_of_splits(out)))
    results = json.loads(out.read_text())
    assert {r["placement"] for r in results} == {"disaggregated", "colocated"}
    assert {r["devices_here"].split(",")[0] for r in results} == {"2 x 50% of cpu"}
    said = capfd.readouterr().out
    assert said.count("2 compiled") == 1 and "losses agree" in said


@pytest.mark.timeout(120)
def test_processes_of_a_benchmark_share_their_flags(tmp_path):
    """Else they would measure other cases side by side, each in a collective of its own."""
    joined = f"--coordinator=127.0.0.1:{launch.free_port()}"
    with contextlib.ExitStack() as stack:
        commands = []
        for process in range(2):
            command = [
                sys.executable, "-m", "benchmarks.splits", *flags_of_splits(tmp_path / "out.json"),
                f"--length={256 << process}", joined, "--num_processes=2",
                f"--process_id={process}",
            ]  # fmt: skip
            said = stack.enter_context(open(tmp_path / f"{process}.txt", "w"))
            commands.append((command, {"stdout": said, "stderr": subprocess.STDOUT}))
        codes = launch.run_together(commands)
    # The slower one may have been killed because the other had ended.
    assert USER_ERROR in codes and set(codes) <= {USER_ERROR, -signal.SIGKILL}
    said = (tmp_path / f"{codes.index(USER_ERROR)}.txt").read_text()
    assert "--length = [" in said and "must be the same in all processes" in said
