"""Every split of one host's GPUs, measured beside the planner's prediction, and the twin's best.

  python -m benchmarks.splits --config C --hardware H --out splits.json
  python -m benchmarks.splits --config C --hardware H --out slow.json --network=sockets
  python -m benchmarks.splits --config C --hardware H --out grow.json --scaling

In benchmarks/README.md C is configs/balanced.py, H h100x2_nvlink. The first trains a few steps at
each sequence length under every M + N of one and two stages that fits, and checks that losses
agree, that the planner's pick is within 5% of the best, and that the best ratio moves toward
attention as sequences grow. `--scaling` grows from two devices to all, with the tokens of a device
and the experts fixed, and checks tokens/s against the prediction. Results in `--out` are gone on
with; no case begins after `--seconds`. Exit code 1 if a check fails.
"""

import collections
import concurrent.futures
import copy
import dataclasses
import gc
import json
import pathlib
import statistics
import time

import jax
import rich.console
import rich.table

from disag_jax.bench_step import run_steps
from disag_jax.compare import TOLERANCES, largest_difference
from disag_jax.config import Config, ConfigError, PlacementKind
from disag_jax.errors import RunError
from disag_jax.flops import flops_per_device
from disag_jax.geometry import enable_float64, placement_of
from disag_jax.metrics import peak_memory
from disag_jax.planner import search
from disag_jax.planner.hardware import Hardware, load
from disag_jax.planner.prediction import predict
from disag_jax.step import Stepper
from mesh.placement import Meshes

WARM_UP, STEPS = 2, 3
SCALING = "scaling"
STAGES = (1, 2)

# The planner's pick may be slower than the best measured split by this share, and tokens/s under
# the prediction by that.
PICK_TOLERANCE, LEAST_OF_PREDICTION = 0.05, 0.92


@dataclasses.dataclass(frozen=True)
class Case:
    """A split to measure.

    Attributes:
      group: "sequence 8192" and so on, or `SCALING`.
      name: the split in words.
      placement: "disaggregated" or "colocated".
      is_pick: whether the planner chose it among the group's disaggregated splits.
      attention_share: M / (M + N); 1/2 co-located.
      predicted_seconds: of a step.
    """

    group: str
    name: str
    placement: str
    is_pick: bool
    attention_share: float
    predicted_seconds: float
    config: Config

    @classmethod
    def of(cls, group: str, config: Config, hardware: Hardware, is_pick: bool) -> "Case":
        split = config.split
        both = split.attention_workers + split.expert_workers
        return cls(
            group, search.in_words(config), split.placement.value, is_pick,
            split.attention_workers / both, predict(config, hardware).step_seconds, config,
        )  # fmt: skip


def split_cases(config: Config, hardware: Hardware, num_devices: int, lengths) -> list[Case]:
    """Every M + N of one and two stages, and the twin's best, at each sequence length."""
    cases = []
    for length in lengths:
        base, group = at_length(config, length, num_devices), f"sequence {length}"
        fixed = {"replicas": 1, "tokens_per_worker": base.batch.tokens_per_worker}
        found = []
        for stages in STAGES:
            found += search.splits_that_fit(
                base, hardware, num_devices, PlacementKind.DISAGGREGATED, stages=stages, **fixed
            )
        found.sort(key=lambda one: one.seconds_per_token)
        cases += [Case.of(group, f.config, hardware, f is found[0]) for f in found]
        twin = search.search(base, hardware, num_devices, PlacementKind.COLOCATED)
        if twin:
            cases.append(Case.of(group, twin.config, hardware, is_pick=False))
    return cases


def scaling_cases(config: Config, hardware: Hardware, num_devices: int) -> list[Case]:
    """The planner's pick on two devices, four and so on, with the tokens of a device fixed."""
    cases, devices = [], 2
    while devices <= num_devices:
        base = at_length(config, config.batch.sequence_length, devices)
        found = search.search(base, hardware, devices, PlacementKind.DISAGGREGATED)
        if found:
            cases.append(Case.of(SCALING, found.config, hardware, is_pick=True))
        devices *= 2
    return cases


def at_length(config: Config, length: int, num_devices: int) -> Config:
    """The config at a sequence length, with as many micro-batches for each of `num_devices`.

    They are twelve for each device: most numbers of attention workers divide them. They have the
    config's tokens, or one sequence if that is longer.
    """
    changed = copy.deepcopy(config)
    if length < 1:
        raise ConfigError(f"--length = {length} must be greater than 0")
    tokens = max(length, config.batch.tokens_per_worker // length * length)
    changed.split = dataclasses.replace(config.split, replicas=1)
    changed.batch = dataclasses.replace(
        config.batch,
        sequence_length=length,
        tokens_per_worker=tokens,
        micro_batches=12 * num_devices // config.split.attention_workers,
    )
    return changed


def stepper_of(case: Case) -> Stepper:
    """With its pipeline compiled in the bucket of the expected load and in the next larger one."""
    placement = placement_of(case.config.validate())
    stepper = Stepper(case.config, Meshes.make(placement, jax.devices()[: placement.num_devices]))
    for bucket in stepper.chooser.options[:2]:
        stepper.compiled_program(bucket)
    return stepper


def measure(case: Case, stepper: Stepper) -> dict:
    """Trains a few steps: what is kept of them in JSON."""
    config = case.config
    seconds, metrics = run_steps(stepper, WARM_UP + STEPS)
    counts = metrics[-1]["expert_counts"]
    median = statistics.median(seconds[WARM_UP:])
    speed = config.tokens_per_step / median
    return {
        **{k: v for k, v in dataclasses.asdict(case).items() if k != "config"},
        "sequence_length": config.batch.sequence_length,
        "devices": config.split.num_devices,
        "tokens_per_step": config.tokens_per_step,
        "seconds": median,
        "tokens_per_second": speed,
        "tflops_per_device": flops_per_device(config, speed) / 1e12,
        "predicted_tokens_per_second": config.tokens_per_step / case.predicted_seconds,
        "losses": [float(of_step["loss"]) for of_step in metrics],
        "expert_load": float(counts.max() / counts.mean()),
        "peak_memory_gib": max(peak_memory(stepper.meshes).values(), default=None),
    }


def check(results: list[dict], tolerance: float) -> list[str]:
    """What does not hold, in sentences."""
    wrong = _differing_losses(results, tolerance)
    scaled = [result for result in results if result["group"] == SCALING]
    wrong += [
        f"{r['devices']} devices: {r['tokens_per_second']:,.0f} tokens/s of "
        f"{r['predicted_tokens_per_second']:,.0f} predicted"
        for r in scaled
        if not r["tokens_per_second"] >= LEAST_OF_PREDICTION * r["predicted_tokens_per_second"]
    ]
    by_length = collections.defaultdict(list)
    for result in results:
        if result["group"] != SCALING and result["placement"] == PlacementKind.DISAGGREGATED:
            by_length[result["sequence_length"]].append(result)
    best_shares = []
    for length, apart in sorted(by_length.items()):
        best = max(apart, key=lambda r: r["tokens_per_second"])
        best_shares.append(best["attention_share"])
        for pick in (r for r in apart if r["is_pick"]):
            if not pick["tokens_per_second"] >= (1 - PICK_TOLERANCE) * best["tokens_per_second"]:
                wrong.append(
                    f"sequence {length}: the pick, {pick['name']}, is slower than {best['name']}"
                )
    ratios = {r["attention_share"] for apart in by_length.values() for r in apart}
    moves = best_shares == sorted(best_shares) and best_shares[-1:] > best_shares[:1]
    if len(by_length) > 1 and len(ratios) > 1 and not moves:
        wrong.append(f"the best ratio must move toward attention as sequences grow: {best_shares}")
    return wrong


def _differing_losses(results: list[dict], tolerance: float) -> list[str]:
    """Cases on the same batches whose losses are not those of the first of them."""
    same_batches = collections.defaultdict(list)
    for result in results:
        same_batches[result["sequence_length"], result["tokens_per_step"]].append(result)
    return [
        f"sequence {first['sequence_length']}: losses of {first['name']} and {other['name']} differ"
        for first, *others in same_batches.values()
        for other in others
        if not largest_difference(first["losses"], other["losses"]) <= tolerance
    ]


def table(results: list[dict]) -> rich.table.Table:
    """The results, the planner's picks marked."""
    made = rich.table.Table(title="Splits of one host")
    names = (
        "",
        "split",
        "s",
        "predicted",
        "tokens/s",
        "TFLOP/s a GPU",
        "GiB",
        "expert load",
        "last loss",
    )
    for name in names:
        made.add_column(name, justify="left" if name in names[:2] else "right")
    for r in results:
        peak = r["peak_memory_gib"]
        made.add_row(
            r["group"],
            r["name"] + (" <- pick" if r["is_pick"] else ""),
            f"{r['seconds']:.3f}",
            f"{r['predicted_seconds']:.3f} ({r['predicted_seconds'] / r['seconds'] - 1:+.0%})",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['tflops_per_device']:.3g}",
            "" if peak is None else f"{peak:.1f}",
            f"{r['expert_load']:.2f}",
            f"{r['losses'][-1]:.4f}",
        )
    return made


def run(cases: list[Case], out: pathlib.Path, seconds: float, threads: int):
    """Measures what `out` does not hold yet: (all results, what there was no time for)."""
    began = time.perf_counter()
    results = json.loads(out.read_text()) if out.exists() else []
    done = {(result["group"], result["name"]) for result in results}
    waiting = [case for case in cases if (case.group, case.name) not in done]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        steppers = [pool.submit(stepper_of, case) for case in waiting]
        concurrent.futures.wait(steppers)
    print(f"{time.perf_counter() - began:.0f} s  {len(waiting)} programs compiled", flush=True)
    while waiting and time.perf_counter() - began < seconds:
        case, stepper = waiting.pop(0), steppers.pop(0)
        results.append(measure(case, stepper.result()))
        out.write_text(json.dumps(results, indent=1))
        print(
            f"{time.perf_counter() - began:.0f} s  {case.group}: {case.name}: "
            f"{results[-1]['seconds']:.3f} s",
            flush=True,
        )
        # The next one needs the memory.
        del stepper
        gc.collect()
    late = "; ".join(f"{case.group}: {case.name}" for case in waiting)
    return results, f"no time was left for {late}: go on with the same --out" if late else ""


def main(
    config: Config, hardware: str, out: str, lengths, scaling: bool, seconds: float, threads: int
):
    config.validate()
    if not pathlib.Path(out).resolve().parent.is_dir():
        raise ConfigError(f"--out = {out!r} must be in a directory that exists")
    enable_float64(config)
    num_devices, known = len(jax.devices()), load(hardware)
    if num_devices < 2:
        raise ConfigError(f"devices = {num_devices} must be at least 2, to be split")
    if scaling:
        cases = scaling_cases(config, known, num_devices)
    else:
        cases = split_cases(config, known, num_devices, lengths)
    results, late = run(cases, pathlib.Path(out), seconds, threads)
    rich.console.Console(width=140).print(table(results))
    wrong = check(results, TOLERANCES[config.run.compute_dtype])
    if late or wrong:
        raise RunError("; ".join(filter(None, [*wrong, late])))
    print("losses agree; the planner's claims hold")


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli
    from mesh import runtime

    _CONFIG = cli.define_config_flag()
    _HARDWARE = flags.DEFINE_string("hardware", None, "what to predict for: a name or a file")
    _OUT = flags.DEFINE_string("out", None, "JSON file of the results, gone on with if it is there")
    _LENGTHS = flags.DEFINE_multi_integer("length", [4096, 8192, 16_384], "sequence lengths")
    _SCALING = flags.DEFINE_bool("scaling", False, "grow from two devices to all instead")
    _SECONDS = flags.DEFINE_float("seconds", 540, "begin no case after this")
    _THREADS = flags.DEFINE_integer("threads", 16, "programs compiled at once")
    _CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "simulate this many devices on the CPU")
    _NETWORK = flags.DEFINE_enum("network", "default", list(runtime.NETWORKS), runtime.NETWORK_HELP)
    flags.mark_flags_as_required(["config", "hardware", "out"])

    def _run():
        runtime.start(_CPU_DEVICES.value, network=_NETWORK.value)
        main(
            _CONFIG.value, _HARDWARE.value, _OUT.value, _LENGTHS.value, _SCALING.value,
            _SECONDS.value, _THREADS.value,
        )  # fmt: skip

    cli.run(_run)
