"""What a run shows, also where nothing can be shown."""

import errno
import subprocess
import sys

from disag_jax.display import PlainDisplay


def test_a_full_disk_costs_lines_and_not_the_run(monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.print", fail)
    PlainDisplay(1).say("a line")


def test_a_reader_that_goes_away_costs_lines_and_not_the_run():
    command = """import sys
from disag_jax.display import PlainDisplay
display = PlainDisplay(1)
display.say("first")
sys.stdin.readline()
for _ in range(3):
    display.say("unread")
print("the end", file=sys.stderr)"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    running = subprocess.Popen([sys.executable, "-c", command], text=True, **pipes)
    assert running.stdout.readline() == "first\n"
    running.stdout.close()
    running.stdin.write("\n")
    running.stdin.close()
    said = running.stderr.read().splitlines()
    assert said == ["warning: nobody reads the output any more; training goes on", "the end"]
    assert running.wait() == 0
