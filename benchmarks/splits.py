"""Every split of one host's GPUs, measured beside the planner's prediction, and the twin's best.

  python -m benchmarks.splits --config C --hardware H --out splits.json
  python -m benchmarks.splits --config C --hardware H --out slow.json --network=sockets
  python -m benchmarks.splits --config C --hardware H --out grow.json --scaling

In benchmarks/README.md C is configs/balanced.py, H h100x2_nvlink, for sockets a profile over them.
The first trains a few steps at each sequence length under every M + N of one and two stages that
fits, and under the twin's best mode with micro-batches and a step as large. It checks that losses
agree, that the planner's pick is within 5% of the best, and that the best ratio moves toward
attention as sequences grow. `--scaling` grows from two devices to all, with the tokens of a device
and the experts fixed, and checks tokens/s against the prediction. Results in `--out` are gone on
with; no case begins after `--seconds`. Exit code 1 if a check fails.
"""

import collections
import copy
import dataclasses
import pathlib

import jax
import rich.console
import rich.table

from benchmarks import cases as cases_lib
from benchmarks.cases import Case
from disag_jax import processes
from disag_jax.compare import TOLERANCES
from disag_jax.config import Config, ConfigError, PlacementKind
from disag_jax.planner import search
from disag_jax.planner.hardware import Hardware

SCALING = "scaling"
STAGES = (1, 2)

# The planner's pick may be slower than the best measured split by this share, and tokens/s under
# the prediction by that.
PICK_TOLERANCE, LEAST_OF_PREDICTION = 0.05, 0.92


@dataclasses.dataclass(frozen=True)
class Split(Case):
    """A split to measure; its group is "sequence 8192" and so on, or `SCALING`.

    Attributes:
      is_pick: whether the planner chose it among the group's disaggregated splits.
      attention_share: M / (M + N); 1/2 co-located.
    """

    is_pick: bool
    attention_share: float


def _case(group: str, config: Config, hardware: Hardware, is_pick: bool) -> Split:
    split = config.split
    share = split.attention_workers / (split.attention_workers + split.expert_workers)
    return Split.of(group, config, hardware, is_pick=is_pick, attention_share=share)


def split_cases(config: Config, hardware: Hardware, num_devices: int, lengths) -> list[Split]:
    """Every M + N of one and two stages, and the twin's best, at each sequence length.

    The twins come last: should one lack memory, the others are measured.
    """
    cases, twins = [], []
    for length in lengths:
        base, group = at_length(config, length, num_devices), f"sequence {length}"
        fixed = {"replicas": 1, "tokens_per_worker": base.batch.tokens_per_worker}
        found = []
        for stages in STAGES:
            found += search.splits_that_fit(
                base, hardware, num_devices, PlacementKind.DISAGGREGATED, stages=stages, **fixed
            )
        found.sort(key=lambda one: one.seconds_per_token)
        cases += [_case(group, f.config, hardware, f is found[0]) for f in found]
        same = search.Fixed(
            tokens_per_worker=base.batch.tokens_per_worker, tokens_per_step=base.tokens_per_step
        )
        twin = search.search(base, hardware, num_devices, PlacementKind.COLOCATED, same)
        if twin:
            twins.append(_case(group, twin.config, hardware, is_pick=False))
    return cases + twins


def scaling_cases(config: Config, hardware: Hardware, num_devices: int) -> list[Split]:
    """The planner's pick on two devices, four and so on, with the tokens of a device fixed.

    On all of them alone where there are several processes: each must have a part in every program.
    """
    cases, devices = [], 2 if jax.process_count() == 1 else num_devices
    while devices <= num_devices:
        base = at_length(config, config.batch.sequence_length, devices)
        found = search.search(base, hardware, devices, PlacementKind.DISAGGREGATED)
        if found:
            cases.append(_case(SCALING, found.config, hardware, is_pick=True))
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


def check(results: list[dict], tolerance: float) -> list[str]:
    """What does not hold, in sentences."""
    wrong = cases_lib.differing_losses(results, tolerance, "sequence_length", "tokens_per_step")
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
        "GiB, predicted",
        "expert load",
        "last loss",
    )
    for name in names:
        made.add_column(name, justify="left" if name in names[:2] else "right")
    for r in results:
        made.add_row(
            r["group"],
            r["name"] + (" <- pick" if r["is_pick"] else ""),
            f"{r['seconds']:.3f}",
            f"{r['predicted_seconds']:.3f} ({r['predicted_seconds'] / r['seconds'] - 1:+.0%})",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['tflops_per_device']:.3g}",
            f"{r['gib']:.1f}, {r['predicted_gib']:.1f}",
            f"{r['expert_load']:.2f}",
            f"{r['losses'][-1]:.4f}",
        )
    return made


def main(
    config: Config, hardware: str, network: str, out: str, lengths, scaling: bool,
    devices: int | None, seconds: float, threads: int,
):  # fmt: skip
    num_devices = cases_lib.check_start(config, out, devices)
    known = cases_lib.hardware_here(hardware, num_devices, network)
    if scaling:
        cases = scaling_cases(config, known, num_devices)
    else:
        cases = split_cases(config, known, num_devices, lengths)
    results, missing = cases_lib.run(cases, pathlib.Path(out), seconds, threads, known)
    if processes.is_first():
        rich.console.Console(width=140).print(table(results))
    wrong = check(results, TOLERANCES[config.run.compute_dtype])
    cases_lib.conclude(wrong, missing, "losses agree; the planner's claims hold")


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli

    _FLAGS = cases_lib.Flags()
    _LENGTHS = flags.DEFINE_multi_integer("length", [4096, 8192, 16_384], "sequence lengths")
    _SCALING = flags.DEFINE_bool("scaling", False, "grow from two devices to all instead")
    _DEVICES = flags.DEFINE_integer("devices", None, "use so many of those here; by default all")

    def _run():
        main(
            *_FLAGS.start(), _LENGTHS.value, _SCALING.value, _DEVICES.value,
            _FLAGS.seconds.value, _FLAGS.threads.value,
        )  # fmt: skip

    cli.run(_run)
