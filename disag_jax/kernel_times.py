"""What the kernels of a trace took, by kind: a table, and a picture of some of it.

  python -m disag_jax.kernel_times --trace runs/overlap --plot kernels.png

The trace is one of GPUs, by `train.py --profile_steps` or `python -m disag_jax.overlap`.
"""

import collections
import re

import numpy as np
import rich.console
import rich.table

from disag_jax import trace
from disag_jax.errors import ConfigError

# The first whose expression is found in a kernel's name.
KINDS = {
    "communication": trace.COMMUNICATION,
    "rows times expert weights": re.compile("multiply_by_group"),
    "expert weight gradients": re.compile("weight_gradient"),
    "attention": re.compile("flash|cudnn"),
    "dense products": re.compile("nvjet|gemm|cutlass"),
    "all else": re.compile(""),
}
COLORS = ("#d62728", "#1f77b4", "#17becf", "#2ca02c", "#9467bd", "#bbbbbb")


def kind_of(kernel: str) -> str:
    """The kind (`KINDS`) of a kernel by its name."""
    return next(kind for kind, names in KINDS.items() if names.search(kernel))


def seconds_by_kind(kernels) -> dict[str, dict[str, float]]:
    """Seconds of each kind's kernels by device, of what `trace.kernels` returns.

    Those that run at once count each.
    """
    found = collections.defaultdict(lambda: dict.fromkeys(KINDS, 0.0))
    for device, kernel, begin, end in kernels:
        found[device][kind_of(kernel)] += 1e-9 * (end - begin)
    return dict(sorted(found.items()))


def table(times: dict[str, dict[str, float]]) -> rich.table.Table:
    """The seconds of each kind."""
    made = rich.table.Table(title="Seconds of kernels")
    made.add_column("")
    for device in times:
        made.add_column(device, justify="right")
    for kind in KINDS:
        made.add_row(kind, *(f"{of_device[kind]:.3f}" for of_device in times.values()))
    return made


def draw(kernels, path: str, milliseconds: float, at: float):
    """Draws some milliseconds of a trace, communication apart from the rest.

    at: where they are in the trace, from 0 to 1.
    """
    from matplotlib.figure import Figure

    devices = sorted({device for device, *_ in kernels})
    times = np.array([span for _, _, *span in kernels])
    middle = (1 - at) * times[:, 0].min() + at * times[:, 1].max()
    first, last = middle - 0.5e6 * milliseconds, middle + 0.5e6 * milliseconds
    figure = Figure(figsize=(14, 0.8 + 1.1 * len(devices)), layout="constrained")
    axes = figure.subplots()
    bars = collections.defaultdict(list)
    for device, kernel, begin, end in kernels:
        if begin < last and end > first:
            kind = kind_of(kernel)
            row = 2 * devices.index(device) + (kind == "communication")
            bars[kind, row].append((1e-6 * (begin - first), 1e-6 * (end - begin)))
    for kind, color in zip(KINDS, COLORS, strict=True):
        axes.broken_barh([], (0, 0), color=color, label=kind)
        for row in range(2 * len(devices)):
            axes.broken_barh(bars[kind, row], (row - 0.4, 0.8), color=color, linewidth=0)
    names = [name for d in devices for name in (d.removeprefix("/device:"), "communication")]
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(0, milliseconds), xlabel="milliseconds", ylim=(len(names) - 0.5, -0.5))
    axes.legend(ncols=len(KINDS), loc="upper center", bbox_to_anchor=(0.5, 1.2), frameon=False)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--plot = {path!r} must be a picture that can be written: {error}"
        ) from (error)


def main(directory: str, plot: str | None, milliseconds: float, at: float):
    """Prints the table and draws."""
    kernels = trace.kernels(directory)
    rich.console.Console(width=110).print(table(seconds_by_kind(kernels)))
    if plot:
        draw(kernels, plot, milliseconds, at)


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli

    _TRACE = flags.DEFINE_string("trace", None, "directory of the trace, or of a run that has one")
    _PLOT = flags.DEFINE_string("plot", None, "picture to draw")
    _MILLISECONDS = flags.DEFINE_float(
        "milliseconds", 30, "how much of the trace to draw", lower_bound=0.001
    )
    # In the steady state of a trace of one or two steps.
    _AT = flags.DEFINE_float(
        "at", 0.25, "which part of it, from 0 to 1", lower_bound=0, upper_bound=1
    )
    flags.mark_flags_as_required(["trace"])
    cli.run(lambda: main(_TRACE.value, _PLOT.value, _MILLISECONDS.value, _AT.value))
