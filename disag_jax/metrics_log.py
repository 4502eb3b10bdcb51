"""The files that records go to, written so that no kill and no full disk spoils what is there."""

import json
import os
import pathlib
import time

import jax
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog


class MetricsLog:
    """Writes records to metrics.jsonl, one JSON object a line, and to TensorBoard's events.

    A field is a TensorBoard tag; a list over layers is layer_00/field and so on, a dict field/key.
    """

    def __init__(self, lines: pathlib.Path, events: pathlib.Path, next_step: int):
        """Appends to what is there; TensorBoard hides what it already has of `next_step` or later.

        Only process 0 writes: elsewhere this does nothing.
        """
        self._lines = lines
        self._events = None
        if jax.process_index() == 0:
            lines.touch()
            _cut_unfinished_line(lines)
            events.mkdir(parents=True, exist_ok=True)
            # Not tensorboardX's own writer: its thread ends with a disk's first error, and whoever
            # hands it a record after that waits for ever. Files are named by the second: two runs
            # in one would share a file.
            self._events = EventsWriter(str(events / "events"), f".{next_step}")
            self._events.write_event(
                Event(step=next_step, session_log=SessionLog(status=SessionLog.START))
            )

    def write(self, record: dict):
        """Appends a record; OSError if it cannot be written, and the log is then as before."""
        if self._events is None:
            return
        _append(self._lines, json.dumps(record) + "\n")
        for tag, value in scalars(record).items():
            values = summary.scalar(tag, value)
            self._events.write_event(
                Event(summary=values, step=record["step"], wall_time=time.time())
            )
        self._events.flush()

    def close(self):
        if self._events is not None:
            self._events.close()


def scalars(record: dict) -> dict[str, float]:
    """A record's TensorBoard tags and values."""
    found = {}
    for field, value in record.items():
        if isinstance(value, list):
            found |= {f"layer_{layer:02d}/{field}": item for layer, item in enumerate(value)}
        elif isinstance(value, dict):
            found |= {f"{field}/{key}": item for key, item in value.items()}
        elif field != "step":
            found[field] = value
    return found


def _append(path: pathlib.Path, line: str):
    """Appends a whole line or nothing; where the file has vanished it is not made again."""
    with open(path, "r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            # A disk that fills up takes a part and fails at the rest.
            left = memoryview(line.encode())
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


def _cut_unfinished_line(path: pathlib.Path):
    """Removes the part of a line that a killed run left, which would spoil the next one."""
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
