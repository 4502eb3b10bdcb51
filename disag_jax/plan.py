"""Plans a run before any device is touched: which split, how long a step, how much memory.

  python -m disag_jax.plan --config configs/qwen3_235b.py --hardware h800 --num_devices 128

`--hardware` is a name in disag_jax/planner/hardware/ or a file that `python -m disag_jax.profile`
wrote. Splits are searched exhaustively within what docs/planner.md lists, at about the config's
tokens per step; `--stages`, `--attention_workers` and so on hold parts of it fixed.
"""

import dataclasses
import math
import pathlib

import rich.console
import rich.table

from disag_jax.config import Config, Overlap, Recompute
from disag_jax.errors import ConfigError
from disag_jax.memory import in_words as bytes_in_words
from disag_jax.planner import pictures
from disag_jax.planner import search as search_lib
from disag_jax.planner.advice import Advice, advise
from disag_jax.planner.hardware import Hardware, load
from disag_jax.planner.prediction import Prediction, WorkerTime, predict
from disag_jax.planner.roofline import allocate, demand_of_any
from disag_jax.planner.search import Fixed


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer: the pick, what is near it, and what the other placement would do.

    Attributes:
      best: the fastest split of either placement.
      rows: (label, prediction) of the pick, its neighbours, the other placement's best, and the
        config's own split where it is of as many devices.
      advice: whether to disaggregate, and what would change that.
    """

    best: Prediction
    rows: list[tuple[str, Prediction]]
    advice: Advice


def make_plan(
    config: Config,
    hardware: Hardware,
    num_devices: int,
    fixed: Fixed | None = None,
    load_factor: float | None = None,
) -> Plan:
    """Plans a config on `num_devices`; ConfigError if no split can be had."""
    given, config = config, search_lib.without_auto(config)
    fixed = fixed or Fixed()
    _check_input(config, num_devices, fixed, load_factor)
    found = {
        placement: search_lib.search(config, hardware, num_devices, placement, fixed, load_factor)
        for placement in search_lib.PLACEMENTS
    }
    ranked = sorted((one for one in found.values() if one), key=lambda one: one.seconds_per_token)
    if not ranked:
        raise search_lib.refusal(config, hardware, num_devices, fixed, load_factor)
    best = predict(ranked[0].config.validate(), hardware, load_factor)
    rows = [(f"pick, {best.config.split.placement}", best)]
    for label, near in search_lib.neighbours(best.config, num_devices):
        rows.append((label, predict(near, hardware, load_factor)))
    for other in ranked[1:]:
        rows.append(
            (f"best {other.config.split.placement}", predict(other.config, hardware, load_factor))
        )
    # With a part left to the planner it is no split yet.
    if config == given and config.split.num_devices == num_devices:
        rows.append(("as configured", predict(config, hardware, load_factor)))
    return Plan(best, rows, advise(config, hardware, num_devices, found, fixed, load_factor))


def _check_input(config: Config, num_devices: int, fixed: Fixed, load_factor: float | None):
    """ConfigError unless each value by itself is one that a split can have."""
    if num_devices < 2:
        raise ConfigError(
            f"num_devices = {num_devices} must be at least 2, one for attention and one for experts"
        )
    length = config.batch.sequence_length
    if fixed.tokens_per_worker is not None and (
        fixed.tokens_per_worker < 1 or fixed.tokens_per_worker % length
    ):
        raise ConfigError(
            f"tokens_per_worker = {fixed.tokens_per_worker} must be a positive multiple of "
            f"batch.sequence_length = {length}"
        )
    for name, value, most, whose in (
        ("stages", fixed.stages, config.model.num_layers, "model.num_layers"),
        ("expert_workers", fixed.expert_workers, config.model.num_experts, "model.num_experts"),
    ):
        if value is not None and value > most:
            raise ConfigError(f"{name} = {value} must be at most {whose} = {most}")
    most = round(config.tokens_per_step * (1 + search_lib.TOKEN_TOLERANCE))
    if fixed.tokens_per_worker is not None and fixed.tokens_per_worker > most:
        raise ConfigError(
            f"tokens_per_worker = {fixed.tokens_per_worker} must be at most about "
            f"{config.tokens_per_step}, the tokens of a step"
        )
    if fixed.hop not in (None, 1, 2):
        raise ConfigError(f"hop = {fixed.hop} must be 1 or 2")
    if fixed.overlap is Overlap.AUTO:
        raise ConfigError("overlap = auto must be none, chunked or interleaved, or left out")
    if load_factor is not None and not 1 <= load_factor < math.inf:
        raise ConfigError(
            f"load_factor = {load_factor} must be finite and at least 1, the busiest worker's rows "
            "over the fullest worker's expected ones"
        )


def table(plan: Plan) -> rich.table.Table:
    """The rows of a plan."""
    best = plan.best
    made = rich.table.Table(
        title=f"{best.config.name} on {best.config.split.num_devices} x {best.hardware.name} "
        f"({best.hardware.source})"
    )
    names = ("", "D x p x (M + N)", "hop", "K x T", "step, s", "tokens/s", "MFU", "exposed",
             "mean idle A, F", "GiB A, F")  # fmt: skip
    for name in names:
        made.add_column(name, justify="right" if name else "left")
    for label, prediction in plan.rows:
        split, batch = prediction.config.split, prediction.config.batch
        second = f" + {split.expert_workers}"
        if split.colocated:
            second = f"/{split.expert_workers}, overlap {split.overlap_in_words}"
        loss = search_lib.loss_in_words(prediction.config)
        step = prediction.step_seconds
        idle = [shares["idle"][1] for shares in _shares_of_roles(prediction).values()]
        memory = " ".join(f"{m.total / 2**30:.0f}" for m in prediction.memory.values())
        made.add_row(
            label if prediction.fits else f"{label}: does not fit",
            f"{split.replicas} x {split.stages} x ({split.attention_workers}{second}){loss}",
            str(split.hop),
            f"{batch.micro_batches} x {batch.tokens_per_worker}",
            f"{step:.3f}",
            f"{prediction.tokens_per_second:,.0f}",
            f"{prediction.mfu:.1%}",
            f"{prediction.exposed_communication / step:.0%}",
            " ".join(f"{share:.0%}" for share in idle),
            memory,
        )
    return made


def _shares_of_roles(prediction: Prediction) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Of each role's busy, exposed and idle shares of a step, (least, mean, most) of its stages."""
    by_role: dict[str, list[WorkerTime]] = {}
    for worker in prediction.workers:
        by_role.setdefault(worker.name.split()[-1], []).append(worker)
    found = {}
    for role, workers in by_role.items():
        found[role] = {}
        for part in ("busy", "exposed", "idle"):
            # Nothing is idle for less than no time but by rounding.
            shares = [max(0.0, getattr(w, part) / prediction.step_seconds) for w in workers]
            found[role][part] = min(shares), sum(shares) / len(shares), max(shares)
    return found


def _in_shares(least: float, mean: float, most: float) -> str:
    apart = f" ({least:.0%} to {most:.0%})" if most - least >= 0.005 else ""
    return f"{mean:.0%}{apart}"


def report(plan: Plan) -> str:
    """What the table does not say: units, transfers, memory, assumptions, advice."""
    best = plan.best
    units = ", ".join(f"{name} {1e3 * s:.2f}" for name, s in best.unit_seconds.items())
    moves = ", ".join(f"{name} {1e3 * s:.2f}" for name, s in best.transfers.items() if s)
    outside = ", ".join(f"{name} {1e3 * s:.0f}" for name, s in best.outside_loop.items())
    lines = [
        f"{'pick':<12}{search_lib.in_words(best.config)}; "
        f"{best.config.tokens_per_step:,} tokens a step",
        f"{'units, ms':<12}{units}",
        f"{'moves, ms':<12}{moves or 'none'}",
        f"{'around, ms':<12}{outside}",
    ]
    stages = best.config.split.stages
    mean = f", mean of {stages} stages" if stages > 1 else ""
    for role, shares in _shares_of_roles(best).items():
        parts = ", ".join(f"{part} {_in_shares(*three)}" for part, three in shares.items())
        lines.append(f"{role:<12}{parts} of a step{mean}")
    lines.append(f"{'roofline':<12}{_roofline(best)}")
    for kind, memory in best.memory.items():
        parts = ", ".join(
            f"{field.name} {bytes_in_words(getattr(memory, field.name))}"
            for field in dataclasses.fields(memory)
        )
        lines.append(f"{'memory':<12}{kind} {bytes_in_words(memory.total)}: {parts}")
    lines += [
        f"{'assumed':<12}busiest expert worker {best.load_factor:.3f} of what the fullest expects; "
        f"{best.hardware.comment}",
        f"{'advice':<12}{plan.advice.sentence}",
    ]
    return "\n".join(lines)


def _roofline(prediction: Prediction) -> str:
    """The roofline's division of the devices, and of the network cards where there are any."""
    config, hardware = prediction.config, prediction.hardware
    devices = config.split.num_devices
    nodes = -(-devices // hardware.devices_per_node)
    num_cards = nodes * hardware.nics_per_node if nodes > 1 else None
    link = hardware.intra_node if num_cards is None else hardware.inter_node
    move = link.many_to_many
    found = allocate(
        demand_of_any(config, devices), devices, num_cards,
        flops_per_second=1e12 * hardware.product_tflops * hardware.product_efficiency,
        bytes_per_second=1e9 * move.gigabytes_per_second * move.efficiency,
        peak_flops_per_second=1e12 * hardware.peak_tflops,
    )  # fmt: skip
    workers = -(-found.expert_devices // (config.split.replicas * config.split.stages))
    text = (
        f"attention {found.attention_devices} : experts {found.expert_devices} of {devices} "
        f"devices, {workers} a stage with experts, by arithmetic and bandwidth alone "
        f"(MFU {found.mfu:.0%})"
    )
    if num_cards is None:
        return text
    return (
        f"{text}. Network cards {found.attention_cards} : {found.expert_cards}: to divide them so, "
        "name each process's in its NCCL_IB_HCA (docs/planner.md)"
    )


def main(
    config: Config,
    hardware_name: str,
    num_devices: int,
    fixed: Fixed,
    load_factor: float | None = None,
    timeline: str | None = None,
    plot: str | None = None,
) -> Plan:
    """Prints a plan; writes the pick's timeline and page where they are wanted."""
    for flag, path in (("timeline", timeline), ("plot", plot)):
        if path:
            pictures.check_writable(path, flag)
    if timeline and plot and pathlib.Path(timeline).resolve() == pathlib.Path(plot).resolve():
        raise ConfigError(f"--plot = {plot!r} must be another file than --timeline")
    plan = make_plan(config, load(hardware_name), num_devices, fixed, load_factor)
    rich.console.Console(width=140).print(table(plan))
    print(report(plan))
    if timeline:
        pictures.write_timeline(plan.best, timeline)
    if plot:
        ratios = search_lib.fastest_of_ratios(
            search_lib.without_auto(config), plan.best.hardware, num_devices, fixed, load_factor
        )
        pictures.write_page(plan.best, plot, ratios)
    return plan


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli

    _CONFIG = cli.define_config_flag()
    _HARDWARE = flags.DEFINE_string("hardware", None, "a name, or a file of disag_jax.profile")
    _NUM_DEVICES = flags.DEFINE_integer("num_devices", None, "devices to split")
    _LOAD_FACTOR = flags.DEFINE_float(
        "load_factor",
        None,
        "busiest expert worker's rows over the fullest one's expected ones; default: even routing",
    )
    _FIXED = {
        name: flags.DEFINE_integer(name, None, f"keep {name} at this", lower_bound=1)
        for name in (
            "replicas", "stages", "attention_workers", "expert_workers", "hop",
            "tokens_per_worker",
        )
    }  # fmt: skip
    _FIXED["recompute"] = flags.DEFINE_enum_class(
        "recompute", None, Recompute, "keep run.recompute at this; by default as little as fits"
    )
    _FIXED["overlap"] = flags.DEFINE_enum_class(
        "overlap", None, Overlap, "keep split.overlap of co-located splits at this; not auto"
    )
    _TIMELINE = flags.DEFINE_string("timeline", None, "JSON file for Perfetto to write")
    _PLOT = flags.DEFINE_string("plot", None, "PNG file to draw")
    flags.mark_flags_as_required(["config", "hardware", "num_devices"])

    def _run():
        fixed = Fixed(**{name: flag.value for name, flag in _FIXED.items()})
        main(
            _CONFIG.value, _HARDWARE.value, _NUM_DEVICES.value, fixed, _LOAD_FACTOR.value,
            _TIMELINE.value, _PLOT.value,
        )  # fmt: skip

    cli.run(_run)
