"""Measures the units of work, a step or the transfers of a config, each against its floor.

  python -m disag_jax.bench units --config configs/balanced.py
  python -m disag_jax.bench step --config configs/balanced.py --hardware measured.json
  python -m disag_jax.bench transfer --config configs/balanced.py

`--out FILE` keeps the figures as JSON, and `--compare FILE` says which of them have moved since by
more than the noise of both measurements. `--hardware` sets a measured step beside the planner's.
Units run on one device, a step and transfers on all of the config's.
"""

import dataclasses
import json
import pathlib

import jax
import rich.console
import rich.table

from disag_jax import facts
from disag_jax.config import Config, ConfigError
from disag_jax.files import check_out, write_out
from disag_jax.geometry import enable_float64
from disag_jax.planner.hardware import Hardware, load
from disag_jax.planner.prediction import check_predictable, predict
from disag_jax.timing import Figure
from disag_jax.training import check_accelerator
from disag_jax.workdir import config_from_dict

# A figure has moved if it differs by more than this besides the noise: clocks vary that much.
LEAST_CHANGE = 0.02


def table(title: str, figures: list[Figure]) -> rich.table.Table:
    """Figures with their floors."""
    columns = list(dict.fromkeys(name for figure in figures for name in figure.extra))
    made = rich.table.Table(title=title)
    for name in ("", "ms", "noise", "under load, ms", "floor, ms", "floor/time", *columns):
        made.add_column(name, justify="right" if name else "left")
    for f in figures:
        loaded, floor = (
            "" if ms is None else f"{ms:.3f}"
            for ms in (f.loaded_milliseconds, f.floor_milliseconds)
        )
        share = "" if f.share_of_floor is None else f"{f.share_of_floor:.0%}"
        extra = [str(f.extra.get(name, "")) for name in columns]
        row = (f.name, f"{f.milliseconds:.3f}", f"{f.noise:.1%}", loaded, floor, share)
        made.add_row(*row, *extra)
    return made


def changes(before: list[Figure], now: list[Figure]) -> list[str]:
    """A sentence for each figure that moved beyond the noise of both, or is in one list only."""
    old, found = {figure.name: figure for figure in before}, []
    for figure in now:
        if figure.name not in old:
            found.append(f"{figure.name}: new")
            continue
        reference = old.pop(figure.name)
        change = figure.milliseconds / reference.milliseconds - 1
        if abs(change) > max(LEAST_CHANGE, figure.noise + reference.noise):
            found.append(
                f"{figure.name}: {reference.milliseconds:.3f} -> {figure.milliseconds:.3f} ms "
                f"({change:+.1%})"
            )
    return found + [f"{name}: not measured now" for name in old]


def write(path: str, what: str, config: Config, figures: list[Figure]):
    """Keeps figures with what they were measured on."""
    record = {
        "what": what,
        **facts.about(config),
        "figures": [dataclasses.asdict(figure) for figure in figures],
    }
    write_out(pathlib.Path(path), record)


def read(path: str, what: str, config: Config) -> list[Figure]:
    """The figures that `write` kept; ConfigError if they are none, or of something else."""
    try:
        record = json.loads(pathlib.Path(path).read_text())
        figures = [_figure(figure) for figure in record["figures"]]
        before = _compared(record, config_from_dict(record["config"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--compare = {path!r} must be a file that --out wrote: {error}"
        ) from error
    now = _compared({"what": what, **facts.about(config)}, config)
    for name in now:
        _check_same(f"--compare = {path!r}, {name}", before[name], now[name])
    return figures


def _figure(record: dict) -> Figure:
    figure = Figure(**record)
    if not (figure.milliseconds > 0 and figure.noise >= 0):
        raise ValueError(
            f"{figure.name}: milliseconds = {figure.milliseconds} must be more than 0, and noise = "
            f"{figure.noise} not negative"
        )
    return figure


def _compared(record: dict, config: Config) -> dict:
    """What figures must have in common to be compared: of the config, what times depend on."""
    sections = facts.as_json(config)
    names = ("model", "split", "batch", *(["optimizer"] if record["what"] == "step" else []))
    of_run = ("compute_dtype", "recompute", "loss_chunk")
    run = {name: sections["run"][name] for name in of_run}
    return {
        "what": record["what"],
        "devices": record["devices"],
        "config": {name: sections[name] for name in names} | {"run": run},
    }


def _check_same(where: str, before, now):
    if isinstance(before, dict) and isinstance(now, dict):
        for name in now:
            _check_same(f"{where}.{name}", before[name], now[name])
    elif before != now:
        raise ConfigError(f"{where} = {before!r} must be {now!r}, as now")


def beside_prediction(config: Config, hardware: Hardware, figures: list[Figure]) -> str:
    """A measured step beside the predicted one."""
    found = predict(config, hardware)
    measured = next(figure for figure in figures if figure.name == "step")
    predicted = 1e3 * found.step_seconds
    memory = ", ".join(
        f"{kind} {memory.total / 2**30:.2f} GiB" for kind, memory in found.memory.items()
    )
    return (
        f"predicted for {hardware.name}: {predicted:.1f} ms, measured {measured.milliseconds:.1f} "
        f"({predicted / measured.milliseconds - 1:+.1%}); {memory}"
    )


def main(
    what: str, config: Config, out: str | None, compare: str | None, hardware: str | None = None
):
    """Measures, prints and keeps the figures."""
    from disag_jax import bench_step, bench_transfer, bench_units

    measures = {
        "units": bench_units.measure,
        "step": bench_step.measure,
        "transfer": bench_transfer.measure,
    }
    if what not in measures:
        raise ConfigError(f"{what!r} must be one of {', '.join(measures)}")
    if hardware is not None and what != "step":
        raise ConfigError(f"--hardware = {hardware!r} must stand with step, not {what}")
    planned_for = load(hardware) if hardware else None
    config.validate()
    if planned_for is not None:
        check_predictable(config)
        planned_for = planned_for.on_one_node(jax.local_device_count())
    enable_float64(config)
    before = read(compare, what, config) if compare else None
    if out:
        check_out(out)
    figures = measures[what](config)
    title = f"{what} of {config.name}, {facts.devices()}, jax {jax.__version__}"
    rich.console.Console(width=120).print(table(title, figures))
    if planned_for is not None:
        print(beside_prediction(config, planned_for, figures))
    if out:
        write(out, what, config, figures)
    if before is not None:
        moved = changes(before, figures)
        print("\n".join(moved) if moved else f"nothing moved beyond noise since {compare}")


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli

    _CONFIG = cli.define_config_flag()
    _OUT = flags.DEFINE_string("out", None, "file to keep the figures in, as JSON")
    _COMPARE = flags.DEFINE_string("compare", None, "figures of before, to compare with")
    _HARDWARE = flags.DEFINE_string("hardware", None, "what to predict a measured step for")
    _CPU_DEVICES = cli.define_cpu_devices_flag()
    flags.mark_flag_as_required("config")

    def _run(what: str):
        from mesh import runtime

        runtime.start(_CPU_DEVICES.value)
        if not _CPU_DEVICES.value:
            check_accelerator()
        main(what, _CONFIG.value, _OUT.value, _COMPARE.value, _HARDWARE.value)

    cli.run(_run, arguments="measurement (units, step or transfer)")
