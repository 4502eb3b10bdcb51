"""Commands that others start: they get the signals that their starter gets."""

import os
import signal
import sys
import threading

import pytest

from disag_jax import launch
from disag_jax.errors import RunError

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


def test_sigterm_reaches_the_command_and_its_end_is_waited_for(tmp_path):
    def terminate():
        while not (tmp_path / "began").exists():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=terminate).start()
    with pytest.raises(RunError, match="stopped by SIGTERM"):
        launch.run([sys.executable, "-c", WAITS, str(tmp_path)])
    assert (tmp_path / "ended").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_waits_for_each_command_also_where_one_fails(tmp_path):
    def terminate():
        while not (tmp_path / "began").exists():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    # Without a handler SIGTERM ends the first one at once.
    commands = [["import time; time.sleep(60)"], [WAITS, str(tmp_path)]]
    with pytest.raises(RunError, match="stopped by SIGTERM"):
        launch.run_together([([sys.executable, "-c", *command], {}) for command in commands])
    assert (tmp_path / "ended").exists()


def test_the_exit_code_is_returned():
    assert launch.run([sys.executable, "-c", "raise SystemExit(3)"]) == 3
