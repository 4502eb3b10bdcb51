"""A sentence that is told when this process ends without having been able to tell it.

JAX ends a process that loses its coordinator without raising anything, and so does the kernel when
memory runs out. A helper process outlives both.
"""

import contextlib
import json
import subprocess
import sys

# Reads sentences until its standard input ends; an empty one means that all has been said. Signals
# to the whole group, such as Ctrl-C, are for the process that it speaks for.
HELPER = """
import json, signal, socket, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
said = ""
for line in sys.stdin:
    said = json.loads(line)
if said:
    try:
        if said["address"]:
            socket.create_connection(said["address"], timeout=5).close()
        sentence = said["sentence"]
    except OSError:
        sentence = said["if_unreachable"]
    print("error:", sentence, file=sys.stderr)
"""


class LastWords:
    """Has a sentence told as an error if this process ends before `close`."""

    def __init__(self, sentence: str):
        self._helper = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", HELPER], stdin=subprocess.PIPE, text=True
        )
        self.change(sentence)

    def change(self, sentence: str, address=None, if_unreachable: str = ""):
        """Takes another sentence, and one for when (host, port) `address` takes no connection."""
        said = {"sentence": sentence, "address": address, "if_unreachable": if_unreachable}
        self._tell(said)

    def close(self):
        """Nothing is left to say."""
        self._tell("")
        with contextlib.suppress(OSError):
            self._helper.stdin.close()
        self._helper.wait()

    def _tell(self, said):
        # Someone may have ended the helper: the run does without.
        with contextlib.suppress(OSError):
            self._helper.stdin.write(json.dumps(said) + "\n")
            self._helper.stdin.flush()
