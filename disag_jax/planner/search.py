"""Finds the fastest split of a number of devices that fits their memory.

Every split is bounded from below by the work and the transfers of its slower role, which takes no
simulation. In the order of these bounds splits are simulated, until no bound is under the best
simulated step: what is found is the best of all that `candidates` lists, and always the same.
"""

import dataclasses
import fractions
import math
from collections.abc import Iterable, Iterator

from disag_jax.config import Config, Overlap, PlacementKind, Recompute, SplitConfig
from disag_jax.errors import ConfigError
from disag_jax.planner import loss_shares, overlaps
from disag_jax.planner.costs import Costs
from disag_jax.planner.hardware import Hardware
from disag_jax.planner.memory_model import (
    Memory,
    against_usable,
    missing_bytes,
    predict_memory,
    resident_bytes,
)
from disag_jax.planner.prediction import (
    assumed_load_factor,
    check_predictable,
    least_seconds,
    simulate_step,
    total_seconds,
)
from disag_jax.planner.sizes import Sizes

# A stage of more workers than this divides into attention and experts by this many parts only.
RATIO_PARTS = 16
MOST_TOKENS_PER_WORKER = 65_536

LEAST_RECOMPUTE_FIRST = (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)
PLACEMENTS = (PlacementKind.DISAGGREGATED, PlacementKind.COLOCATED)

# How much a step's tokens may differ from the config's where a split does not divide them.
TOKEN_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Fixed:
    """What a search must not change; None is free. Fields as in SplitConfig and BatchConfig.

    Attributes:
      tokens_per_step: exactly so many; None lets them differ by `TOKEN_TOLERANCE`.
      recompute: as in RunConfig; None recomputes as little as fits.
      overlap: of co-located splits.
    """

    replicas: int | None = None
    stages: int | None = None
    attention_workers: int | None = None
    expert_workers: int | None = None
    hop: int | None = None
    tokens_per_worker: int | None = None
    tokens_per_step: int | None = None
    recompute: Recompute | None = None
    overlap: Overlap | None = None

    def allows(self, config: Config) -> bool:
        """Whether a config has all the values that are fixed."""
        for field in dataclasses.fields(self):
            if field.name == "recompute":
                continue  # the search sets it
            wanted = getattr(self, field.name)
            if field.name == "overlap" and not config.split.colocated:
                continue
            holder = next(
                part for part in (config, config.batch, config.split) if hasattr(part, field.name)
            )
            if wanted is not None and getattr(holder, field.name) != wanted:
                return False
        return True

    def allows_split(self, split: SplitConfig) -> bool:
        """Whether a split has all the values that are fixed, whatever it overlaps."""
        names = ("replicas", "stages", "attention_workers", "expert_workers", "hop")
        return all(getattr(self, name) in (None, getattr(split, name)) for name in names)

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return ", ".join(f"{name} = {value}" for name, value in given.items() if value is not None)


@dataclasses.dataclass(frozen=True)
class Found:
    """The best of a search.

    Attributes:
      config: the input with its split and batch changed.
      step_seconds: of it.
      num_candidates, num_simulated: splits that fit, and those that had to be simulated.
    """

    config: Config
    step_seconds: float
    num_candidates: int
    num_simulated: int

    @property
    def seconds_per_token(self) -> float:
        return self.step_seconds / self.config.tokens_per_step


def without_auto(config: Config) -> Config:
    """A valid config to search around: where it leaves placement or overlap open, any will do."""
    split = config.split
    if split.placement is PlacementKind.AUTO:
        split = dataclasses.replace(split, placement=PlacementKind.DISAGGREGATED)
        split = dataclasses.replace(
            split, overlap=Overlap.NONE, forward_chunks=1, backward_chunks=1
        )
    elif split.overlap is Overlap.AUTO:
        split = dataclasses.replace(split, overlap=Overlap.NONE)
    return dataclasses.replace(config, split=split).validate()


def candidates(
    config: Config, num_devices: int, placement: PlacementKind, fixed: Fixed | None = None
) -> Iterator[Config]:
    """Every split of the devices, in a fixed order; about the config's tokens per step each.

    Stages of g workers, p of them and D replicas with D p g = num_devices; M and N with M + N = g
    (co-located M = g and N any divisor of g); whole sequences per micro-batch, by powers of two;
    both hops (co-located one). Co-located splits with each overlap that they can have, chunks in
    the degrees of `overlaps.ways`: a search finds better ones.
    """
    fixed = fixed or Fixed()
    for group in _divisors(num_devices):
        for stages in _divisors(num_devices // group):
            if stages > config.model.num_layers:
                continue
            replicas = num_devices // group // stages
            for attention, expert in _roles(config, group, placement, fixed):
                for hop in (1, 2) if placement is PlacementKind.DISAGGREGATED else (1,):
                    split = dataclasses.replace(
                        config.split, replicas=replicas, stages=stages,
                        attention_workers=attention, expert_workers=expert, hop=hop,
                        placement=placement, loss_share=None,
                    )  # fmt: skip
                    if not fixed.allows_split(split):
                        continue  # before anything is made for each batch
                    for batch in _batches(config, replicas * attention, fixed):
                        found = dataclasses.replace(config, split=split, batch=batch)
                        yield from filter(fixed.allows, overlaps.ways(found))


def search(
    config: Config,
    hardware: Hardware,
    num_devices: int,
    placement: PlacementKind,
    fixed: Fixed | None = None,
    load_factor: float | None = None,
) -> Found | None:
    """The split with the least time per token, or None where none fits the memory."""
    check_predictable(config)
    fixed = fixed or Fixed()
    found = _fastest(_fitting(config, hardware, num_devices, placement, fixed, load_factor))
    return found and _refined(found, hardware, load_factor)


def fastest_of_ratios(
    config: Config,
    hardware: Hardware,
    num_devices: int,
    fixed: Fixed | None = None,
    load_factor: float | None = None,
) -> dict[tuple[int, fractions.Fraction], Found]:
    """The fastest disaggregated split of each (hop, attention workers' share of a stage) that fits.

    What `fixed` says of workers is left out.
    """
    fixed = dataclasses.replace(fixed or Fixed(), attention_workers=None, expert_workers=None)
    kind = PlacementKind.DISAGGREGATED
    by_ratio: dict[tuple[int, fractions.Fraction], list[Costs]] = {}
    for costs in _fitting(config, hardware, num_devices, kind, fixed, load_factor):
        split = costs.config.split
        workers = split.attention_workers + split.expert_workers
        share = fractions.Fraction(split.attention_workers, workers)
        by_ratio.setdefault((split.hop, share), []).append(costs)
    return {
        ratio: _refined(_fastest(by_ratio[ratio]), hardware, load_factor)
        for ratio in sorted(by_ratio)
    }


def _fastest(fitting: Iterable[Costs]) -> Found | None:
    """The one with the least time per token; those are simulated whose bound is below the best."""
    bounded = [
        (least_seconds(costs) / costs.config.tokens_per_step, order, costs)
        for order, costs in enumerate(fitting)
    ]
    best, num_simulated = None, 0
    for bound, _, costs in sorted(bounded, key=lambda item: item[:2]):
        if best and bound >= best.seconds_per_token:
            break
        num_simulated += 1
        seconds = total_seconds(costs, simulate_step(costs))
        found = Found(costs.config, seconds, len(bounded), num_simulated)
        if best is None or found.seconds_per_token < best.seconds_per_token:
            best = found
    return best and dataclasses.replace(best, num_simulated=num_simulated)


def _refined(found: Found, hardware: Hardware, load_factor: float | None = None) -> Found:
    """With the best share of the loss; candidates are compared with equal ones."""
    load = assumed_load_factor(found.config, load_factor)
    costs, seconds = loss_shares.with_best_share(Costs(Sizes.of(found.config, load), hardware))
    return dataclasses.replace(found, config=costs.config, step_seconds=seconds)


def splits_that_fit(
    config: Config, hardware: Hardware, num_devices: int, placement: PlacementKind, **fixed
) -> list[Found]:
    """For each (D, p, M, N) that fits, its fastest micro-batch and hop; the fastest split first.

    fixed: fields of `Fixed`.
    """
    by_split: dict[tuple, Found] = {}
    for costs in _fitting(config, hardware, num_devices, placement, Fixed(**fixed)):
        found = Found(costs.config, total_seconds(costs, simulate_step(costs)), 1, 1)
        key = split_key(costs.config)
        if key not in by_split or found.seconds_per_token < by_split[key].seconds_per_token:
            by_split[key] = found
    refined = [_refined(found, hardware) for found in by_split.values()]
    return sorted(refined, key=lambda found: found.seconds_per_token)


def _fitting(
    config: Config,
    hardware: Hardware,
    num_devices: int,
    placement: PlacementKind,
    fixed: Fixed,
    load_factor: float | None = None,
) -> Iterator[Costs]:
    """The candidates that fit the memory, each recomputing as little as lets it fit.

    Chunks are in the best degrees; where one piece is better, the candidate is left out.
    """
    for candidate in candidates(config, num_devices, placement, fixed):
        load = assumed_load_factor(candidate, load_factor)
        sizes = Sizes.of(candidate, load)
        resident = resident_bytes(sizes)
        if any(sum(parts.values()) > hardware.usable_bytes for parts in resident.values()):
            continue
        for recompute in [fixed.recompute] if fixed.recompute else LEAST_RECOMPUTE_FIRST:
            tried = with_recompute(candidate, recompute)
            # What is recomputed has no part in the bucket, but the chunks have.
            sizes = dataclasses.replace(sizes, config=tried)
            if tried.split.overlap is Overlap.CHUNKED:
                tried = overlaps.with_best_degrees(tried, hardware, load)
                if tried is None:
                    continue
                sizes = Sizes.of(tried, load)
            if not missing_bytes(predict_memory(sizes, resident), hardware):
                yield Costs(sizes, hardware)
                break


def with_recompute(config: Config, recompute: Recompute) -> Config:
    """The config with `run.recompute` set."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, recompute=recompute))


def neighbours(found: Config, num_devices: int) -> list[tuple[str, Config]]:
    """(what differs, config) of the splits next to one in each direction that `candidates` goes."""
    here = _coordinates(found)
    nearest: dict[tuple[str, bool], tuple[float, Config]] = {}
    for other in candidates(found, num_devices, found.split.placement):
        there = _coordinates(other)
        changed = [name for name in here if here[name] != there[name]]
        if len(changed) != 1:
            continue
        name = changed[0]
        distance = there[name] - here[name]
        key = name, distance > 0
        if key not in nearest or abs(distance) < abs(nearest[key][0]):
            nearest[key] = distance, other
    order = list(here)
    keys = sorted(nearest, key=lambda key: (order.index(key[0]), key[1]))
    return [(f"{'more' if up else 'less'} {name}", nearest[name, up][1]) for name, up in keys]


def _coordinates(config: Config) -> dict[str, float]:
    """A split as independent numbers; replicas follow from the others."""
    split = config.split
    second = {"experts apart": split.expert_workers} if split.colocated else {
        "attention": split.attention_workers / (split.attention_workers + split.expert_workers)
    }  # fmt: skip
    workers = split.num_devices // (split.replicas * split.stages)
    return second | {
        "tokens a micro-batch": config.batch.tokens_per_worker,
        "stages": split.stages,
        "workers a stage": workers,
        "hops": split.hop,
        "overlap": list(Overlap).index(split.overlap),
    }


def split_key(config: Config) -> tuple[int, int, int, int]:
    """(D, p, M, N)."""
    split = config.split
    return split.replicas, split.stages, split.attention_workers, split.expert_workers


def refusal(
    config: Config,
    hardware: Hardware,
    num_devices: int,
    fixed: Fixed | None = None,
    load_factor: float | None = None,
    placements: tuple[PlacementKind, ...] = PLACEMENTS,
) -> ConfigError:
    """Why no split of some placements can be had: what is over, by how much, where it is least.

    Of the disaggregated split that comes closest each role is named.
    """
    fixed = fixed or Fixed()
    wanted = f" with {fixed}" if str(fixed) else ""
    found = []
    for placement in placements:
        where, memory = _closest(config, hardware, num_devices, placement, fixed, load_factor)
        if where:
            found.append(
                f"{placement} comes closest with {in_words(where)}: "
                f"{against_usable(memory, hardware)}"
            )
    if not found:
        return ConfigError(
            f"num_devices = {num_devices} must divide into replicas x stages x workers of a "
            f"stage{wanted}, with whole sequences of {config.batch.sequence_length} tokens for "
            f"about {config.tokens_per_step:,} tokens per step"
        )
    return ConfigError(
        f"num_devices = {num_devices} of {hardware.name} must hold {config.name}{wanted}: "
        f"{'; '.join(found)}"
    )


def _closest(
    config: Config,
    hardware: Hardware,
    num_devices: int,
    placement: PlacementKind,
    fixed: Fixed,
    load_factor: float | None,
) -> tuple[Config | None, dict[str, Memory]]:
    """The candidate with the fewest bytes over the memory, and its workers'; None without any."""
    least, where, its_memory = math.inf, None, {}
    for candidate in candidates(config, num_devices, placement, fixed):
        candidate = with_recompute(candidate, fixed.recompute or Recompute.FULL)
        sizes = Sizes.of(candidate, assumed_load_factor(candidate, load_factor))
        memory = predict_memory(sizes)
        over = sum(missing_bytes(memory, hardware).values())
        if over < least:
            least, where, its_memory = over, candidate, memory
    return where, its_memory


def in_words(config: Config) -> str:
    """A split and its batch, short."""
    split, batch = config.split, config.batch
    roles = (
        f"{split.attention_workers} of both roles in groups of {split.expert_workers}, overlap "
        f"{split.overlap_in_words}"
        if split.colocated
        else f"{split.attention_workers} + {split.expert_workers}"
    )
    hop = "" if split.hop == 1 else f", hop {split.hop}"
    return (
        f"{split.replicas} x {split.stages} stages x ({roles}){hop}{loss_in_words(config)}, "
        f"{batch.micro_batches} micro-batches of {batch.tokens_per_worker:,} tokens, recompute "
        f"{config.run.recompute}"
    )


def loss_in_words(config: Config) -> str:
    """The share of the loss that its owners keep, to follow a split; "" where parts are equal."""
    share = config.split.loss_share
    return "" if share is None else f", loss share {share:.3g}"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _roles(config: Config, group: int, placement: PlacementKind, fixed: Fixed):
    """(M, N) of a stage of `group` workers."""
    experts = config.model.num_experts
    if placement is PlacementKind.COLOCATED:
        return [(group, n) for n in _divisors(group) if n <= experts]
    step = max(1, group // RATIO_PARTS)
    sizes = set(range(step, group, step))
    if fixed.attention_workers is not None:
        sizes.add(fixed.attention_workers)
    if fixed.expert_workers is not None:
        sizes.add(group - fixed.expert_workers)
    return [(m, group - m) for m in sorted(sizes) if 0 < m < group and group - m <= experts]


def _batches(config: Config, attention_workers: int, fixed: Fixed):
    """Micro-batches and how many of them, for a step of about the config's tokens."""
    length, wanted = config.batch.sequence_length, config.tokens_per_step
    sizes, tokens = set(), length
    while tokens <= max(length, MOST_TOKENS_PER_WORKER):
        sizes.add(tokens)
        tokens *= 2
    sizes.add(fixed.tokens_per_worker or config.batch.tokens_per_worker)
    for tokens in sorted(size for size in sizes if size % length == 0):
        count = round(wanted / (attention_workers * tokens))
        made = count * attention_workers * tokens
        if count and abs(made - wanted) <= TOKEN_TOLERANCE * wanted:
            yield dataclasses.replace(config.batch, tokens_per_worker=tokens, micro_batches=count)
