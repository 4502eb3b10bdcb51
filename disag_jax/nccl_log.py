"""NCCL's own log: by which way the devices of a run reached each other."""

import glob
import os
import re

from disag_jax.errors import RunError

CHANNEL = re.compile(r"Channel \d+/\d+ : .* via (\S+)")


def check_network(network: str):
    """RunError if this process was started for sockets, has communicated, and not by them alone.

    network: as `mesh.runtime.start` was given, which has NCCL write the log.
    """
    if network == "sockets":
        # NCCL puts the host and the process in the file's name.
        pattern = os.environ["NCCL_DEBUG_FILE"].replace("%p", str(os.getpid())).replace("%h", "*")
        check_sockets(pattern, f"--network={network}")


def check_sockets(pattern: str, who: str):
    """RunError unless the logs that a pattern finds say that all channels went through sockets."""
    logs = ""
    for path in glob.glob(pattern):
        with open(path) as file:
            logs += file.read()
    ways = set(CHANNEL.findall(logs))
    if not ways or any(not way.startswith("NET/Socket") for way in ways):
        raise RunError(
            f"{who}: NCCL must have used NET/Socket alone, its log names "
            f"{', '.join(sorted(ways)) or 'no channel'}"
        )
