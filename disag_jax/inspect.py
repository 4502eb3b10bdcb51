"""What a checkpoint holds: step, config, arrays and bytes.

  python -m disag_jax.inspect runs/tiny
  python -m disag_jax.inspect runs/tiny/checkpoints/300

The argument is a run's directory, its directory of checkpoints (the last one is shown), or one
checkpoint. Only the metadata is read, so the size of the model does not matter.
"""

import math
import pathlib
import textwrap

from disag_jax.config import ConfigError
from disag_jax.saved_checkpoint import SavedCheckpoint, saved_steps
from disag_jax.state import GROUPS


def open_checkpoint(path: str) -> SavedCheckpoint:
    """The checkpoint at `path`, or the last one below it; ConfigError if there is none."""
    directory = pathlib.Path(path).absolute()
    for candidate in (directory / "checkpoints", directory):
        if saved_steps(candidate):
            return SavedCheckpoint.open(candidate)
    if directory.name.isdecimal() and saved_steps(directory.parent):
        return SavedCheckpoint.open(directory.parent, int(directory.name))
    raise ConfigError(f"directory = {path!r} must hold a checkpoint, but there is none")


def describe(saved: SavedCheckpoint) -> str:
    """Step, time and config of a checkpoint, a line for each of its arrays, and totals."""
    steps = ", ".join(map(str, saved_steps(saved.directory)))
    written = f"{saved.written:%Y-%m-%d %H:%M:%S} UTC" if saved.written else "unknown"
    sections = [
        [f"checkpoint  {saved.path}", f"step        {saved.step} (there are {steps})"],
        [f"written     {written}", *_config(saved.extra.get("config", {}))],
        ["", *_leaves(saved)],
        ["", *_totals(saved)],
    ]
    return "\n".join(line for section in sections for line in section)


def _config(config: dict) -> list[str]:
    """The config's name, and the fields of each section."""
    lines = [f"config      {config.get('name', 'unknown')}"]
    for section, fields in config.items():
        if isinstance(fields, dict):
            values = ", ".join(f"{name} {value}" for name, value in fields.items())
            indents = (f"  {section:<10}", " " * 12)
            lines += textwrap.wrap(
                values, 100, initial_indent=indents[0], subsequent_indent=indents[1]
            )
    return lines


def _leaves(saved: SavedCheckpoint) -> list[str]:
    total = sum(map(_num_bytes, saved.leaves.values()))
    rows = [("leaf", "shape", "type", "bytes", "share")]
    # Parameters first.
    for name in sorted(saved.leaves, key=lambda name: name.startswith("opt_state")):
        leaf = saved.leaves[name]
        share = f"{_num_bytes(leaf) / total:.2%}"
        rows.append((name, str(list(leaf.shape)), str(leaf.dtype), f"{_num_bytes(leaf):,}", share))
    return _table(rows, left_columns=3)


def _totals(saved: SavedCheckpoint) -> list[str]:
    """Parameters of each group, and bytes of parameters and of optimizer state."""
    rows = [("group", "parameters", "bytes", "optimizer bytes")]
    sums = [0, 0, 0]
    for group in GROUPS:
        params = _below(saved, f"params.{group}.")
        state = _below(saved, f"opt_state.{group}.")
        numbers = (
            sum(math.prod(leaf.shape) for leaf in params),
            sum(map(_num_bytes, params)),
            sum(map(_num_bytes, state)),
        )
        sums = [a + b for a, b in zip(sums, numbers, strict=True)]
        rows.append((group, *(f"{number:,}" for number in numbers)))
    bias = _num_bytes(saved.leaves["router_bias"])
    rows.append(("router bias", "", f"{bias:,}", ""))
    rows.append(("total", f"{sums[0]:,}", f"{sums[1] + bias:,}", f"{sums[2]:,}"))
    return _table(rows, left_columns=1)


def _below(saved: SavedCheckpoint, prefix: str) -> list:
    return [leaf for name, leaf in saved.leaves.items() if name.startswith(prefix)]


def _num_bytes(leaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _table(rows: list[tuple[str, ...]], left_columns: int) -> list[str]:
    """Lines with the first columns aligned to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            f"{cell:<{width}}" if i < left_columns else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def main(*paths: str):
    """Prints the checkpoints one after another."""
    for path in paths:
        print(describe(open_checkpoint(path)))


if __name__ == "__main__":
    from disag_jax import cli

    cli.run(main, arguments="directory of checkpoints")
