"""What is written to metrics.jsonl and TensorBoard, also by killed runs and to full disks."""

import json
import resource
import struct

import pytest
from tensorboardX.proto import event_pb2

from disag_jax import metrics_log


def read_events(directory) -> dict[tuple[str, int], float]:
    """{(tag, step): value} of TensorBoard's files."""
    found = {}
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            # Length, its checksum, the event, its checksum.
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
            data = data[16 + size :]
    return found


def test_records_go_to_json_lines_and_to_tensorboard(tmp_path):
    lines, events = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    written = [
        {"step": 5, "loss": 1.5, "expert_load": [1.0, 2.5], "peak_memory_gib": {"a": 3.0}},
        {"step": 6, "held_out_loss": 1.25},
    ]
    for record in written:  # the second as if resumed
        log = metrics_log.MetricsLog(lines, events, next_step=record["step"])
        log.write(record)
        log.close()
    assert [json.loads(line) for line in lines.read_text().splitlines()] == written
    assert read_events(events) == {
        ("loss", 5): 1.5,
        ("layer_00/expert_load", 5): 1.0,
        ("layer_01/expert_load", 5): 2.5,
        ("peak_memory_gib/a", 5): 3.0,
        ("held_out_loss", 6): 1.25,
    }


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "metrics.jsonl", tmp_path / "tensorboard"


def test_the_line_that_a_kill_cut_off_does_not_spoil_the_next(paths):
    paths[0].write_text('{"step": 1}\n{"step": 2, "lo')
    log = metrics_log.MetricsLog(*paths, next_step=2)
    log.write({"step": 2})
    log.close()
    assert paths[0].read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_line_that_does_not_fit_the_disk_is_not_begun(paths):
    """The kernel's limit on the size of a file stands for the full disk."""
    log = metrics_log.MetricsLog(*paths, next_step=1)
    log.write({"step": 1})
    before = paths[0].read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            log.write({"step": 2, "text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert paths[0].read_text() == before
    log.write({"step": 3})
    log.close()
    assert [json.loads(line)["step"] for line in paths[0].read_text().splitlines()] == [1, 3]


def test_a_log_that_vanished_is_not_begun_again(paths):
    """Where it lay may be the empty mount point of a disk that is away."""
    log = metrics_log.MetricsLog(*paths, next_step=1)
    log.write({"step": 1})
    away = paths[0].rename(paths[0].with_name("away"))
    with pytest.raises(FileNotFoundError):
        log.write({"step": 2})
    assert not paths[0].exists()
    away.rename(paths[0])
    log.write({"step": 3})
    log.close()
    assert paths[0].read_text() == '{"step": 1}\n{"step": 3}\n'
