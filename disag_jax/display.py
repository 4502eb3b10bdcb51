"""What a run shows while it runs: a progress bar in a terminal, plain lines elsewhere."""

import contextlib
import sys

import jax
import numpy as np
import rich.console
import rich.progress
from rich.table import Column

from disag_jax.config import Config
from disag_jax.files import discard_output

UNREAD = "warning: nobody reads the output any more; training goes on"

# Leaves room for the numbers in a terminal of 80 columns.
BAR_WIDTH = 12

# More layers than this do not fit a line.
LISTED_LAYERS = 8


class Display:
    """Shows nothing, which is right for every process but the first; also the interface."""

    def say(self, text: str):
        """Shows text that stays."""

    def step(self, step: int, loss: float):
        """Takes note of a step."""

    def record(self, record: dict):
        """Shows a log record (disag_jax/metrics.py)."""

    def close(self):
        """Gives the terminal back."""


class PlainDisplay(Display):
    """Prints a line per record, for files and pipes."""

    def __init__(self, num_steps: int):
        self._num_steps = num_steps

    def say(self, text: str):
        try:
            print(text, flush=True)
        except BrokenPipeError:
            # Whoever read it is gone, such as `tee`: that costs lines, and not the run.
            discard_output()
            with contextlib.suppress(OSError):
                print(UNREAD, file=sys.stderr, flush=True)
        except OSError:
            pass  # nor does a full disk

    def record(self, record: dict):
        self.say(line(record, self._num_steps))


class BarDisplay(Display):
    """Keeps the main numbers of the last record beside a progress bar; other text goes above it."""

    def __init__(self, num_steps: int, console: rich.console.Console | None = None):
        columns, whole = rich.progress, Column(no_wrap=True)
        self._bar = columns.Progress(
            columns.MofNCompleteColumn(table_column=whole),
            columns.BarColumn(BAR_WIDTH, table_column=whole),
            columns.TimeRemainingColumn(compact=True, table_column=whole),
            columns.TextColumn("loss {task.fields[loss]:.4f}", table_column=whole),
            # Where it does not fit this one goes on below.
            columns.TextColumn("{task.fields[numbers]}", table_column=Column()),
            console=console,
            speed_estimate_period=600,
        )
        self._num_steps = num_steps
        self._task = None

    def say(self, text: str):
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, loss: float):
        if self._task is None:
            # Not earlier: the time to compile would spoil the estimate of what remains.
            self._task = self._bar.add_task(
                "", total=self._num_steps, completed=step, loss=loss, numbers=""
            )
            self._bar.start()
        self._bar.update(self._task, completed=step, loss=loss)

    def record(self, record: dict):
        speed = _speed(record)
        numbers = f"{speed[0]}  {speed[-1]}  load {_load(record):.2f}"
        self._bar.update(self._task, numbers=numbers)

    def close(self):
        self._bar.stop()


def make_display(config: Config) -> Display:
    """The display that suits this process and its standard output."""
    if jax.process_index() != 0:
        return Display()
    kind = BarDisplay if sys.stdout.isatty() else PlainDisplay
    return kind(config.run.num_steps)


def line(record: dict, num_steps: int) -> str:
    """A log record as one line."""
    parts = [
        f"step {record['step']:>5}/{num_steps}",
        f"loss {record['loss']:.4f}",
        f"grad norm {record['gradient_norm']:.3f}",
        *_speed(record),
        _seconds(record),
        *_layers(record),
        f"imbalance cost {np.mean(record['imbalance_cost']):.0%}",
    ]
    if "compile_seconds" in record:
        parts.append(f"compiling {record['compile_seconds']:.0f} s")
    if record["bucket_reruns"]:
        parts.append(f"re-runs {record['bucket_reruns']}")
    return "  ".join(parts)


def _speed(record: dict) -> list[str]:
    """Tokens per second, and the model's arithmetic per device that they stand for."""
    speed = [
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"{record['tflops_per_device']:.3g} TFLOP/s a device",
    ]
    return [*speed, f"MFU {record['mfu']:.1%}"] if "mfu" in record else speed


def _seconds(record: dict) -> str:
    """A step's time and its parts."""
    names = {"pipeline": "pipeline", "update": "update", "input_wait": "input", "host": "host"}
    parts = ", ".join(f"{name} {record[f'{part}_seconds']:.3f}" for part, name in names.items())
    return f"{record['step_seconds']:.3f} s a step ({parts})"


def _layers(record: dict) -> list[str]:
    """Expert load, dead experts and dropped pairs: of each layer, or of the worst of many."""
    loads, dead, dropped = (
        record[name] for name in ("expert_load", "dead_experts", "dropped_pairs")
    )
    if len(loads) > LISTED_LAYERS:
        load = f"load max/mean {max(loads):.2f} in layer {np.argmax(loads)}"
        return [load, f"dead experts {sum(dead)}", f"dropped {sum(dropped)}"]
    return [
        "load max/mean by layer " + " ".join(f"{load:.2f}" for load in loads),
        "dead experts " + " ".join(map(str, dead)),
        "dropped " + " ".join(map(str, dropped)),
    ]


def _load(record: dict) -> float:
    """Largest over mean expert load, of the worst layer."""
    return max(record["expert_load"])
