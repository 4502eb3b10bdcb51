"""Trains a config disaggregated and co-located, on the same batches, and compares the two.

`python -m disag_jax.compare --config configs/balanced.py --workdir runs/compare` checks that the
losses of every step are equal within a tolerance (exit code 1 if not) and measures both: speed,
memory, exposed communication. It writes comparison.json and comparison.png.

The comparison is fair by construction: both train the same model from the same seed on the same
global batches, with the same units, recompute and optimizer, each as a `train.py` of its own on all
devices, at the micro-batch size that is fastest for it of those tried.
"""

import copy
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess

import numpy as np
import rich.console
import rich.table

from disag_jax import launch
from disag_jax.config import Config, ConfigError, Dtype, Overlap, PlacementKind
from disag_jax.errors import RunError
from disag_jax.nccl_log import check_sockets
from disag_jax.report import read_records
from disag_jax.workdir import Workdir
from mesh import runtime

# Relative difference of a step's losses, which different orders of sums explain. It grows with the
# steps: bfloat16 rounds weights that differ in the last bit to different neighbours, which were
# 5e-4 apart after twelve steps of the balanced shape. Another seed is 1e-2 apart.
TOLERANCES = {Dtype.FLOAT64: 1e-9, Dtype.FLOAT32: 1e-4, Dtype.BFLOAT16: 2e-3}

# Steps that compile, and the last ones, which are traced; those between count.
WARM_UP_STEPS, TRACED_STEPS = 2, 2


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a run of one placement did; medians over its steps after the warm-up.

    Attributes:
      placement: "disaggregated" or "colocated".
      split: the split in words.
      tokens_per_worker, micro_batches: T and K.
      losses: of every step.
      step_seconds, tokens_per_second, tflops_per_device: of a step, optimizer included.
      peak_memory_gib: by worker; empty where the backend keeps no count.
      exposed_share: share of a step that a device spends with communication and no compute, waiting
        for its partner included, by device; empty without a trace of GPUs.
      hidden_share: share of the communication that ran under compute, by device.
    """

    placement: str
    split: str
    tokens_per_worker: int
    micro_batches: int
    losses: list[float]
    step_seconds: float
    tokens_per_second: float
    tflops_per_device: float
    peak_memory_gib: dict[str, float]
    exposed_share: dict[str, float]
    hidden_share: dict[str, float]


def twin_of(config: Config, expert_workers: int | None = None, **overlap) -> Config:
    """The co-located config on the same devices, for the same global batch.

    As many stages; all workers of a stage play both roles, and as many of them as possible share
    the experts, unless `expert_workers` says how many. `overlap`: the fields of SplitConfig that
    say what the twin overlaps; by default it blocks.
    """
    twin, split = copy.deepcopy(config), config.split
    workers = split.attention_workers + split.expert_workers
    divisors = [n for n in range(1, workers + 1) if workers % n == 0]
    twin.split = dataclasses.replace(
        split,
        placement=PlacementKind.COLOCATED,
        hop=1,
        loss_share=None,
        attention_workers=workers,
        expert_workers=expert_workers or max(n for n in divisors if n <= config.model.num_experts),
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

    Without any wanted, at its own size and half of it.
    """
    own = config.batch.tokens_per_worker
    tokens = own * config.batch.micro_batches
    wanted = wanted or (own // 2, own)
    sizes = [size for size in _sizes(config, tokens) if size in wanted]
    return [with_tokens(config, tokens, size) for size in sizes]


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


class Runner:
    """Starts `train.py` for a config, in a directory of its own, and reads what it measured."""

    def __init__(self, directory: pathlib.Path, cpu_devices: int, network: str):
        self._directory = directory
        self._cpu_devices, self._network = cpu_devices, network

    def run(self, config: Config, name: str, num_steps: int) -> Measurement:
        """Trains `num_steps`, the last of them traced; RunError if the run fails."""
        workdir = self._directory / name
        output = self._directory / f"{name}.output.txt"
        with output.open("w") as file:
            process = subprocess.run(
                self._command(config, workdir, num_steps),
                env=self._environment(workdir),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        if process.returncode:
            said = launch.last_line(output.read_text()).removeprefix("error: ")
            # As train.py tells its user's mistakes from what went wrong.
            kind = ConfigError if process.returncode == 2 else RunError
            raise kind(f"{name}: {said} (all of it: {output})")
        if self._network == "sockets":
            check_sockets(f"{workdir}.nccl.*.txt", workdir.name)
        return _measure(config, workdir, has_trace=not self._cpu_devices)

    def _command(self, config: Config, workdir, num_steps: int) -> list[str]:
        config = copy.deepcopy(config)
        config.run = dataclasses.replace(
            config.run, num_steps=num_steps, log_every=1, eval_batches=0, checkpoint_every=0,
        )  # fmt: skip
        traced_steps = f"--profile_steps={num_steps - TRACED_STEPS}:{num_steps}"
        cpu_devices = f"--cpu_devices={self._cpu_devices}"
        return launch.train_command(config, workdir, cpu_devices, traced_steps)

    def _environment(self, workdir) -> dict[str, str]:
        environment = dict(os.environ)
        if self._network == "sockets":
            log = runtime.NETWORK_LOG | {"NCCL_DEBUG_FILE": f"{workdir}.nccl.%p.txt"}
            environment |= runtime.SOCKETS | log
        return environment


def _measure(config: Config, workdir: pathlib.Path, has_trace: bool) -> Measurement:
    steps, _ = read_records(Workdir(str(workdir)).metrics)
    # Tracing slows its steps down.
    timed = steps[WARM_UP_STEPS : -TRACED_STEPS if has_trace else None] or steps

    def median(field):
        return statistics.median(step[field] for step in timed)

    times = {}
    if has_trace:
        from disag_jax import trace  # JAX starts only where there is something to read

        times = trace.device_times(workdir)
    split = config.split
    return Measurement(
        placement=split.placement.value,
        split=f"{split.replicas} x {split.stages} x "
        + (f"{split.attention_workers}/{split.expert_workers}" if split.colocated
           else f"({split.attention_workers}+{split.expert_workers})")
        + ("" if split.overlap is Overlap.NONE else f" {split.overlap_in_words}"),
        tokens_per_worker=config.batch.tokens_per_worker,
        micro_batches=config.batch.micro_batches,
        losses=[step["loss"] for step in steps],
        step_seconds=median("step_seconds"),
        tokens_per_second=median("tokens_per_second"),
        tflops_per_device=median("tflops_per_device"),
        peak_memory_gib=steps[-1].get("peak_memory_gib", {}),
        exposed_share={name: t.exposed / t.span for name, t in times.items()},
        hidden_share={name: t.hidden_share for name, t in times.items()},
    )  # fmt: skip


def largest_difference(first: list[float], second: list[float]) -> float:
    """The largest relative difference of two runs' losses, step by step."""
    a, b = np.array(first), np.array(second)
    return float(np.max(np.abs(a - b) / np.abs(b)))


def compare(
    runner: Runner, both: list[list[Config]], num_steps: int
) -> tuple[Measurement, Measurement]:
    """Measures both placements, each at the fastest of its candidates."""
    return tuple(_best(runner, tried, num_steps) for tried in both)


def _best(runner: Runner, tried: list[Config], num_steps: int) -> Measurement:
    """The fastest run. Each is whole: to start and compile takes longer than its steps."""
    placement = tried[0].split.placement.value
    if len(tried) == 1:
        return runner.run(tried[0], placement, num_steps)
    found = []
    for candidate in tried:
        name = f"{placement}_{candidate.batch.tokens_per_worker}"
        try:
            found.append(runner.run(candidate, name, num_steps))
            print(f"{name}: {found[-1].tokens_per_second:,.0f} tokens/s", flush=True)
        except (ConfigError, RunError) as error:  # such as too little memory for this size
            print(error, flush=True)
    if not found:
        sizes = ", ".join(str(one.batch.tokens_per_worker) for one in tried)
        raise RunError(f"{placement}: no micro-batch size of {sizes} could be run")
    return max(found, key=lambda measurement: measurement.tokens_per_second)


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
    if num_steps <= WARM_UP_STEPS + TRACED_STEPS:
        raise ConfigError(
            f"--steps = {num_steps} must be more than {WARM_UP_STEPS + TRACED_STEPS}, those that "
            "compile and those that are traced"
        )
    twin = twin_of(config, twin_experts, **(twin_overlap or {}))
    both = candidates_of_both(config, twin, sizes)
    directory = pathlib.Path(workdir)
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"workdir = {workdir!r} must be a new or empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    runner = Runner(directory.resolve(), cpu_devices, network)
    measurements = compare(runner, both, num_steps)
    difference = largest_difference(*(m.losses for m in measurements))
    tolerance = TOLERANCES[config.run.compute_dtype]
    result = {
        "largest_loss_difference": difference,
        "tolerance": tolerance,
        "network": network,
        "measurements": [dataclasses.asdict(m) for m in measurements],
    }
    (directory / "comparison.json").write_text(json.dumps(result, indent=2))
    draw(measurements, directory / "comparison.png")
    rich.console.Console(width=110).print(table(measurements))
    print(f"losses of {num_steps} steps differ by {difference:.2e} at most; allowed {tolerance:g}")
    if not difference <= tolerance:
        raise RunError(f"losses differ by {difference:.2e}, more than {tolerance:g} of their size")


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli

    _CONFIG = cli.define_config_flag()
    _WORKDIR = flags.DEFINE_string("workdir", None, "directory for both runs and the comparison")
    _STEPS = flags.DEFINE_integer("steps", 20, "optimizer steps of each run")
    _CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "simulate this many devices on the CPU")
    _NETWORK = flags.DEFINE_enum(
        "network", "default", list(runtime.NETWORKS), f"{runtime.NETWORK_HELP}; checks its log"
    )  # fmt: skip
    _SIZES = flags.DEFINE_multi_integer(
        "tokens_per_worker",
        [],
        "micro-batch sizes to try on each side; by default the config's and half of it",
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
