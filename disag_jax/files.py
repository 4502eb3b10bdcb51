"""Writing files that are never seen half written."""

import json
import os
import pathlib


def write_json(path: pathlib.Path, value: dict):
    """Replaces a file in one step: whenever the process ends, it is the old one or the new one."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
