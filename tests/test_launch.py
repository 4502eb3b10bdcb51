"""Commands that others start: they get the signals that their starter gets."""

import os
import signal
import sys

import pytest

from disag_jax import launch
from disag_jax.errors import RunError
from tests import launching

# Says when it is ready for the signal, and ends in order some time after it.
WAITS = """
import pathlib, signal, sys, time
def end(*_):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1] + "/ended").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1] + "/began").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("signum", launch.STOPS, ids=lambda s: s.name)
@pytest.mark.timeout(30)
def test_a_stop_reaches_the_command_and_its_end_is_waited_for(tmp_path, signum):
    before = signal.getsignal(signum)
    launching.send_when_there(signum, tmp_path / "began")
    with pytest.raises(launch.Stopped, match=f"stopped by {signum.name}") as stopped:
        launch.run([sys.executable, "-c", WAITS, str(tmp_path)])
    assert (tmp_path / "ended").exists() and stopped.value.codes == [0]
    assert signal.getsignal(signum) is before


def test_under_nohup_a_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launch.on_stop(lambda *_: pytest.fail("called")):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def heard_interrupts():
    """Shells have what they run in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_interrupts")
@pytest.mark.timeout(30)
def test_an_interrupt_lets_the_commands_end_by_themselves(tmp_path):
    # From a terminal it reaches them, too.
    itself = WAITS.replace("signal.SIGTERM", "signal.SIGALRM").replace(
        "time.sleep(60)", "signal.alarm(1); time.sleep(60)"
    )
    launching.send_when_there(signal.SIGINT, tmp_path / "began")
    with pytest.raises(KeyboardInterrupt):
        launch.run([sys.executable, "-c", itself, str(tmp_path)])
    assert (tmp_path / "ended").exists()


@pytest.mark.timeout(30)
def test_a_stop_waits_for_each_command_also_where_one_fails(tmp_path):
    launching.send_when_there(signal.SIGTERM, tmp_path / "began")
    # Without a handler SIGTERM ends the first one at once.
    commands = [["import time; time.sleep(60)"], [WAITS, str(tmp_path)]]
    with pytest.raises(RunError, match="stopped by SIGTERM"):
        launch.run_together([([sys.executable, "-c", *command], {}) for command in commands])
    assert (tmp_path / "ended").exists()


def test_the_exit_code_is_returned():
    assert launch.run([sys.executable, "-c", "raise SystemExit(3)"]) == 3


def test_the_last_line_that_names_an_error_is_taken():
    text = "begins\nTraceback:\n  File x\njax.errors.JaxRuntimeError: no memory\n\nthreads: 19\n"
    assert launch.last_line(text) == "jax.errors.JaxRuntimeError: no memory"
    assert launch.last_line("x\nerror: --a = 1 must be 2\ny") == "error: --a = 1 must be 2"
    assert launch.last_line("begins\nwaits\n\n") == "waits"
    assert launch.last_line("\n") == "no message"
