"""Trains a config disaggregated and co-located, on the same batches, and compares the two.

`python -m disag_jax.compare --config configs/balanced.py --workdir runs/compare` checks that the
losses of every step are equal within a tolerance (exit code 1 if not) and measures both: speed,
memory, exposed communication. It writes comparison.json and comparison.png.

The comparison is fair by construction: both train the same model from the same seed on the same
global batches, with the same units, recompute and optimizer, each as a `train.py` of its own on all
devices, at the micro-batch size that is fastest for it of those tried. Steps that compiled
a program do not count.
"""

import collections
import copy
import dataclasses
import pathlib

import numpy as np
import rich.console
import rich.table

from disag_jax import facts
from disag_jax.config import Config, ConfigError, Dtype, Overlap, PlacementKind
from disag_jax.errors import RunError
from disag_jax.files import write_json
from disag_jax.measured_run import (
    LEAST_STEPS,
    TRACED_STEPS,
    WARM_UP_STEPS,
    DoesNotFit,
    Measurement,
    Runner,
)
from disag_jax.workdir import check_new, new_directory
from mesh import runtime

# Relative difference of a step's losses, which different orders of sums explain. It grows with the
# steps: bfloat16 rounds weights that differ in the last bit to different neighbours, which were
# 5e-4 apart after twelve steps of the balanced shape. Another seed is 1e-2 apart.
TOLERANCES = {Dtype.FLOAT64: 1e-9, Dtype.FLOAT32: 1e-4, Dtype.BFLOAT16: 2e-3}

# A pipeline with fewer micro-batches is mostly filled and emptied.
LEAST_MICRO_BATCHES = 4


def twin_of(config: Config, expert_workers: int | None = None, **overlap) -> Config:
    """The co-located config on the same devices, for the same global batch.

    As many stages; all workers of a stage play both roles, and as many of them as possible share
    the experts, unless `expert_workers` says how many. `overlap`: the fields of SplitConfig that
    say what the twin overlaps; by default it blocks.
    """
    twin, split = copy.deepcopy(config), config.split
    workers = split.attention_workers + split.expert_workers
    if expert_workers is None:
        most = min(workers, config.model.num_experts)
        expert_workers = max(n for n in range(1, most + 1) if workers % n == 0)
    elif expert_workers < 1:
        raise ConfigError(f"--twin_experts = {expert_workers} must be 1 or more")
    twin.split = dataclasses.replace(
        split,
        placement=PlacementKind.COLOCATED,
        hop=1,
        loss_share=None,
        attention_workers=workers,
        expert_workers=expert_workers,
        **overlap,
    )
    batch, tokens = config.batch, config.batch.tokens_per_worker * split.attention_workers
    total = batch.micro_batches * tokens
    if total % (workers * batch.sequence_length):
        raise ConfigError(
            f"batch.micro_batches = {batch.micro_batches} must make whole sequences for each of "
            f"the {workers} co-located workers: {total // batch.sequence_length} sequences do not "
            "divide evenly"
        )
    sizes = _sizes(twin, total // workers)
    closest = min(sizes, key=lambda size: abs(size - batch.tokens_per_worker))
    return with_tokens(twin, total // workers, closest)


def with_tokens(config: Config, tokens: int, tokens_per_worker: int) -> Config:
    """The config with `tokens` of each worker and step in micro-batches of `tokens_per_worker`."""
    changed = copy.deepcopy(config)
    changed.batch = dataclasses.replace(
        config.batch, tokens_per_worker=tokens_per_worker, micro_batches=tokens // tokens_per_worker
    )
    return changed.validate()


def candidates(config: Config, wanted: tuple[int, ...]) -> list[Config]:
    """The config at each micro-batch size of `wanted` that divides its step's tokens.

    Without any wanted, at its own size, half of it and double, as far as they can be had.
    """
    own = config.batch.tokens_per_worker
    tokens = own * config.batch.micro_batches
    if not wanted:
        half, double = resized(config, own // 2), resized(config, 2 * own)
        return [one for one in (half, copy.deepcopy(config), double) if one is not None]
    sizes = [size for size in _sizes(config, tokens) if size in wanted]
    return [with_tokens(config, tokens, size) for size in sizes]


def resized(config: Config, size: int) -> Config | None:
    """The config with micro-batches of another size, None where that is of no use.

    Such are sizes that do not divide a step into whole micro-batches, or into few of them, and
    those that the split's chunks do not divide.
    """
    tokens = config.batch.tokens_per_worker * config.batch.micro_batches
    if size not in _sizes(config, tokens) or tokens // size < LEAST_MICRO_BATCHES:
        return None
    try:
        return with_tokens(config, tokens, size)
    except ConfigError:
        return None


def candidates_of_both(config: Config, twin: Config, wanted: tuple[int, ...]) -> list[list[Config]]:
    """The candidates of either placement; ConfigError for a size that is none of any."""
    both = [candidates(one, wanted) for one in (config, twin)]
    used = {one.batch.tokens_per_worker for found in both for one in found}
    for size in wanted:
        if size not in used:
            raise ConfigError(
                f"--tokens_per_worker = {size} must be whole sequences of "
                f"{config.batch.sequence_length} tokens that divide a worker's tokens of a step"
            )
    for one, found in zip((config, twin), both, strict=True):
        if not found:
            raise ConfigError(
                f"--tokens_per_worker = {', '.join(map(str, wanted))} must hold a size that "
                f"divides the {one.batch.tokens_per_worker * one.batch.micro_batches} tokens of a "
                f"{one.split.placement} worker's step"
            )
    return both


def _sizes(config: Config, tokens: int) -> list[int]:
    """Micro-batch sizes, in whole sequences, into which `tokens` can be divided."""
    sequences = tokens // config.batch.sequence_length
    whole = [n for n in range(1, sequences + 1) if sequences % n == 0]
    return [n * config.batch.sequence_length for n in whole]


def largest_difference(first: list[float], second: list[float]) -> float:
    """The largest relative difference of two runs' losses, step by step."""
    a, b = np.array(first), np.array(second)
    return float(np.max(np.abs(a - b) / np.abs(b)))


def compare(
    runner: Runner, both: list[list[Config]], num_steps: int, *, grows: bool
) -> list[list[Measurement]]:
    """Measures both placements at each of their candidates, as `measure_sizes` does."""
    return [measure_sizes(runner, tried, num_steps, grows=grows) for tried in both]


def measure_sizes(
    runner: Runner, tried: list[Config], num_steps: int, *, grows: bool
) -> list[Measurement]:
    """The runs of one placement that fit. Each is whole: to start takes longer than its steps.

    grows: go on with twice the last size while it fits and is the fastest so far.
    """
    placement = tried[0].split.placement.value
    found, waiting = [], collections.deque(tried)
    while waiting:
        config = waiting.popleft()
        batch = config.batch
        print(
            f"running {placement}, {batch.micro_batches} x {batch.tokens_per_worker:,} tokens",
            flush=True,
        )
        try:
            run = runner.run(config, f"{placement}_{batch.tokens_per_worker}", num_steps)
        except DoesNotFit as error:
            print(error, flush=True)
            if grows:
                break  # nor does more
            continue
        print(f"{run.step_seconds:.3f} s a step, {run.tokens_per_second:,.0f} tokens/s", flush=True)
        found.append(run)
        larger = resized(config, 2 * batch.tokens_per_worker)
        if grows and not waiting and larger is not None and fastest(found) is run:
            waiting.append(larger)
    if not found:
        sizes = ", ".join(str(one.batch.tokens_per_worker) for one in tried)
        raise RunError(f"{placement}: no micro-batch size of {sizes} fits")
    return found


def fastest(runs: list[Measurement]) -> Measurement:
    """The run whose median step took the least time."""
    return min(runs, key=lambda run: run.step_seconds)


def table(measurements: tuple[Measurement, Measurement]) -> rich.table.Table:
    """The measurements side by side."""
    made = rich.table.Table(title="Disaggregated and co-located")
    made.add_column("")
    for m in measurements:
        made.add_column(f"{m.placement}\n{m.split}", justify="right")
    first, second = measurements
    rows = {
        "micro-batches x tokens per worker": lambda m: f"{m.micro_batches} x {m.tokens_per_worker}",
        "seconds per step": lambda m: f"{m.step_seconds:.3f}",
        "tokens/s": lambda m: f"{m.tokens_per_second:,.0f}",
        "model TFLOP/s per device": lambda m: f"{m.tflops_per_device:,.3g}",
        "peak memory, GiB": lambda m: _each(m.peak_memory_gib, "{:.1f}"),
        "exposed communication": lambda m: _each(m.exposed_share, "{:.1%}"),
        "communication hidden": lambda m: _each(m.hidden_share, "{:.0%}"),
        "last loss": lambda m: f"{m.losses[-1]:.6f}",
    }
    for name, cell in rows.items():
        made.add_row(name, *(cell(m) for m in measurements))
    made.add_row("speed over co-located", f"{second.step_seconds / first.step_seconds:.3f}", "1")
    return made


def _each(values: dict[str, float], form: str) -> str:
    return "\n".join(f"{name} {form.format(v)}" for name, v in values.items()) or "not measured"


def draw(measurements: tuple[Measurement, Measurement], path: pathlib.Path):
    """Losses of both runs, and bars of what was measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    losses, speed, memory, exposed = figure.subplots(1, 4, width_ratios=[2, 1, 1, 1])
    names = [m.placement for m in measurements]
    for m, style in zip(measurements, ("-", "--"), strict=True):
        losses.plot(range(1, len(m.losses) + 1), m.losses, style, label=m.placement)
    losses.set(title="Loss, nats per token", xlabel="step")
    losses.legend(frameon=False)
    panels = (
        (speed, "Tokens per second", [m.tokens_per_second for m in measurements]),
        (memory, "Peak GiB, fullest", [max(m.peak_memory_gib.values(), default=0)
                                       for m in measurements]),
        (exposed, "Exposed communication, worst", [max(m.exposed_share.values(), default=0)
                                                   for m in measurements]),
    )  # fmt: skip
    for axes, title, values in panels:
        axes.set_title(title, fontsize=10)
        axes.bar_label(axes.bar(names, values, color=["#4c78a8", "#f58518"]), fmt="%.4g")
    figure.savefig(path, dpi=140)


def main(config, workdir, num_steps, cpu_devices, network, sizes, twin_experts, twin_overlap=None):
    """Runs the comparison; RunError if the losses differ."""
    config.validate()
    if config.split.colocated:
        raise ConfigError(
            "split.placement = colocated must be disaggregated: its twin is made from it"
        )
    least = WARM_UP_STEPS + LEAST_STEPS + TRACED_STEPS
    if num_steps < least:
        raise ConfigError(
            f"--steps = {num_steps} must be {least} or more: {WARM_UP_STEPS} that compile, "
            f"{LEAST_STEPS} that count and {TRACED_STEPS} that are traced"
        )
    if cpu_devices and network != "default":
        raise ConfigError(
            f"--network = {network} must be default with --cpu_devices: it is one between GPUs"
        )
    twin = twin_of(config, twin_experts, **(twin_overlap or {}))
    both = candidates_of_both(config, twin, sizes)
    check_new(workdir)
    about = facts.of_training(config, cpu_devices)
    directory = new_directory(workdir)
    runs = compare(Runner(directory, cpu_devices, network), both, num_steps, grows=not sizes)
    measurements = tuple(fastest(of_one) for of_one in runs)
    candidates_run = [run for of_one in runs for run in of_one]
    # All train on the same batches: micro-batches only group a step's sequences.
    reference = measurements[0].losses
    differences = [largest_difference(run.losses, reference) for run in candidates_run]
    difference = float(np.max(differences))  # NaN if any is
    tolerance = TOLERANCES[config.run.compute_dtype]
    result = about | {
        "network": network,
        "num_steps": num_steps,
        "largest_loss_difference": difference,
        "tolerance": tolerance,
        "measurements": [dataclasses.asdict(m) for m in measurements],
        "candidates": [dataclasses.asdict(run) for run in candidates_run],
    }
    write_json(directory / "comparison.json", result)
    draw(measurements, directory / "comparison.png")
    rich.console.Console(width=110).print(table(measurements))
    print(
        f"losses of {num_steps} steps of {len(candidates_run)} runs differ by {difference:.2e} at "
        f"most; allowed {tolerance:g}"
    )
    if not difference <= tolerance:
        raise RunError(f"losses differ by {difference:.2e}, more than {tolerance:g} of their size")


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli

    _CONFIG = cli.define_config_flag()
    _WORKDIR = flags.DEFINE_string("workdir", None, "directory for both runs and the comparison")
    _STEPS = flags.DEFINE_integer("steps", 20, "optimizer steps of each run")
    _CPU_DEVICES = cli.define_cpu_devices_flag()
    _NETWORK = flags.DEFINE_enum(
        "network", "default", list(runtime.NETWORKS), f"{runtime.NETWORK_HELP}; checks its log"
    )  # fmt: skip
    _SIZES = flags.DEFINE_multi_integer(
        "tokens_per_worker",
        [],
        "micro-batch sizes to try on each side; by default the config's, half of it, and doubles "
        "while they are faster",
    )
    _TWIN_EXPERTS = flags.DEFINE_integer(
        "twin_experts", None, "co-located workers that share the experts; by default all"
    )
    _TWIN_OVERLAP = flags.DEFINE_enum_class(
        "twin_overlap", Overlap.NONE, Overlap, "what the co-located run overlaps (split.overlap)"
    )
    _TWIN_CHUNKS = {
        field: flags.DEFINE_integer(f"twin_{field}", 1, f"split.{field} of the co-located run")
        for field in ("forward_chunks", "backward_chunks")
    }
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(
        lambda: main(
            _CONFIG.value, _WORKDIR.value, _STEPS.value, _CPU_DEVICES.value, _NETWORK.value,
            tuple(_SIZES.value), _TWIN_EXPERTS.value,
            {"overlap": _TWIN_OVERLAP.value}
            | {field: flag.value for field, flag in _TWIN_CHUNKS.items()},
        )
    )  # fmt: skip
