"""Whether to disaggregate, and which change of circumstances would turn the answer around."""

import copy
import dataclasses
import math
from collections.abc import Iterator

from disag_jax.config import Config, PlacementKind, SplitConfig
from disag_jax.planner.costs import Costs
from disag_jax.planner.hardware import Hardware
from disag_jax.planner.prediction import Prediction, WorkerTime, assumed_load_factor, predict
from disag_jax.planner.search import Fixed, Found, candidates, in_words, search
from disag_jax.planner.sizes import Sizes

# Of the busier role's time over that of roles alike: what counts as uneven, and as even.
UNEVEN, EVEN = 0.2, 0.1
MOST_WORKERS = 64  # of a stage, that are tried to make the roles even

LENGTHS = (2, 4, 8)
RATES = (2, 4, 8)
# Where none of these turns the order around: of a step's tokens, of devices, of their memory.
MORE_TOKENS, MORE_DEVICES, MORE_MEMORY = 4, 2, 2

HIDDEN = 0.05  # of a step: exposed communication below this leaves nothing to hide


@dataclasses.dataclass(frozen=True)
class Attempt:
    """Circumstances that are tried, in words that follow "with"."""

    words: str
    config: Config
    hardware: Hardware
    num_devices: int


@dataclasses.dataclass(frozen=True)
class Advice:
    """The placement that is faster, by which factor, and what would have to change.

    Attributes:
      placement: the faster one.
      advantage: speed over the other placement's best; None where the other fits nowhere.
      changes: the least change of each kind tried that makes the other one faster, in words.
      fixed: what held for every split that was tried.
      balance: where co-location wins and the roles are uneven, what would make them even, in words.
      limit: where no change made disaggregation faster, what holds it back, in words.
      tried: circumstances tried besides sequences and links, in words.
      sentence: all of it.
    """

    placement: PlacementKind
    advantage: float | None
    changes: list[str]
    fixed: Fixed
    balance: str | None = None
    limit: str | None = None
    tried: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        return f"{self._verdict}; {self.balance}" if self.balance else self._verdict

    @property
    def _verdict(self) -> str:
        verb = "co-locate" if self.placement is PlacementKind.COLOCATED else "disaggregate"
        if self.advantage is None:
            wanted = f" with {self.fixed}" if str(self.fixed) else ""
            return f"{verb}: the other placement fits on no split of these devices{wanted}"
        text = f"{verb}: {self.advantage:.2f} times as fast as the other placement's best split"
        if self.changes:
            return f"{text}; that would turn around with {' or '.join(self.changes)}"
        if self.limit:
            text = f"{text}, because {self.limit}"
        also = f" and {self.fixed}" if str(self.fixed) else ""
        *tried, last = (
            f"neither sequences up to {LENGTHS[-1]} times as long or short",
            f"links up to {RATES[-1]} times as fast or slow",
            *self.tried,
        )
        return (
            f"{text}; with the other's stages and replicas{also}, {', '.join(tried)} nor {last} "
            "would turn that around"
        )


def advise(
    config: Config,
    hardware: Hardware,
    num_devices: int,
    found: dict[PlacementKind, Found | None],
    fixed: Fixed,
    load_factor: float | None,
) -> Advice:
    """Compares the best of both placements, and tries what would reverse the order.

    The slower placement is tried with as many stages and replicas as its best has now, the faster
    one with any that `fixed` allows: a change that is named does turn the order around. Where
    nothing does so for disaggregation, what limits it is named.
    """
    ranked = sorted((one for one in found.values() if one), key=lambda one: one.seconds_per_token)
    first = ranked[0].config.split.placement
    if len(ranked) == 1:
        return Advice(first, None, [], fixed)
    advantage = ranked[1].seconds_per_token / ranked[0].seconds_per_token

    def first_that_turns(attempts: list[Attempt]) -> list[str]:
        for attempt in attempts:
            reason = _reason_to_turn(attempt, *ranked, num_devices, fixed, load_factor)
            if reason is not None:
                return [attempt.words + reason]
        return []

    changes = []
    for series in _attempts(config, hardware, num_devices):
        changes += first_that_turns(series)
    if first is PlacementKind.DISAGGREGATED:
        return Advice(first, advantage, changes, fixed)
    apart = ranked[1].config
    balance = uneven_roles(apart, hardware, load_factor)
    limit, tried = None, []
    if not changes:
        even = _even_workers(apart, _role_seconds(apart, hardware, load_factor))
        more, tried = _more_attempts(config, hardware, num_devices, apart, even)
        changes = first_that_turns(more)
    if not changes:
        limit = _limit(*ranked, hardware, fixed, load_factor)
    return Advice(first, advantage, changes, fixed, balance, limit, tuple(tried))


def _reason_to_turn(
    attempt: Attempt,
    first: Found,
    second: Found,
    num_devices: int,
    fixed: Fixed,
    load_factor: float | None,
) -> str | None:
    """None if the order stays; else why it turns, where that is not speed.

    first, second: the best of the placements as things are, on `num_devices`.
    """

    def seconds(found: Found, **held) -> float:
        best = search(
            attempt.config, attempt.hardware, attempt.num_devices, found.config.split.placement,
            dataclasses.replace(fixed, **held), load_factor,
        )  # fmt: skip
        return best.seconds_per_token if best else math.inf

    split = second.config.split
    other = seconds(second, replicas=split.replicas, stages=split.stages)
    if other == math.inf:
        return None
    # What is fastest now, or as many more replicas of it, or with wider stages: quickly tried.
    split, times = first.config.split, attempt.num_devices // num_devices
    held = {"replicas": split.replicas, "stages": split.stages}
    if attempt.num_devices == num_devices or (
        attempt.num_devices == times * num_devices and fixed.replicas is None
    ):
        held = {
            "replicas": times * split.replicas, "stages": split.stages,
            "attention_workers": split.attention_workers, "expert_workers": split.expert_workers,
        }  # fmt: skip
    if seconds(first, **held) <= other:
        return None
    # It may now want other stages.
    own = seconds(first)
    if own <= other:
        return None
    if own < math.inf:
        return ""
    # Workers that the sequences of a step do not divide among say nothing about speed.
    kind = first.config.split.placement
    tried = candidates(attempt.config, attempt.num_devices, kind, fixed)
    return ", where it no longer fits the memory" if any(True for _ in tried) else None


def uneven_roles(config: Config, hardware: Hardware, load_factor: float | None) -> str | None:
    """How uneven the roles of a disaggregated split are, and which workers would make them even.

    None where they are about even. No role gets fewer workers than it has, so that memory is no
    worse; how the time of a unit changes with its size is left out.
    """
    seconds = _role_seconds(config, hardware, load_factor)
    split = config.split
    if _longest(split, seconds, split.attention_workers, split.expert_workers) <= 1 + UNEVEN:
        return None
    attention, expert = seconds
    text = (
        f"as {split.attention_workers} + {split.expert_workers} an attention worker has "
        f"{attention / expert:.2g} times the work of an expert worker"
    )
    even = _even_workers(config, seconds)
    if even is None:
        return text
    devices = split.replicas * split.stages * sum(even)
    return f"{text}: {even[0]} + {even[1]} ({devices} devices) would be about even"


def _role_seconds(
    config: Config, hardware: Hardware, load_factor: float | None
) -> tuple[float, float]:
    """Seconds of an attention and of an expert worker's units of one layer."""
    units = Costs(Sizes.of(config, assumed_load_factor(config, load_factor)), hardware).unit_seconds
    attention, expert = (
        units[f"{role}_forward"] + units[f"{role}_backward"] for role in ("attention", "expert")
    )
    return attention, expert


def _longest(
    split: SplitConfig, seconds: tuple[float, float], attention_workers: int, expert_workers: int
) -> float:
    """Time of the busier role over that of both alike, were the split's work divided so."""
    work = seconds[0] * split.attention_workers, seconds[1] * split.expert_workers
    busier = max(work[0] / attention_workers, work[1] / expert_workers)
    return busier * (attention_workers + expert_workers) / sum(work)


def _even_workers(config: Config, seconds: tuple[float, float]) -> tuple[int, int] | None:
    """The fewest workers of a stage, more than the split's, with which the roles are even."""
    split = config.split
    now = split.attention_workers, split.expert_workers
    for total in range(sum(now) + 1, MOST_WORKERS + 1):
        for n in range(now[1], config.model.num_experts + 1):
            m = total - n
            if m >= now[0] and _longest(split, seconds, m, n) <= 1 + EVEN:
                return m, n
    return None


def _limit(
    together: Found,
    apart: Found,
    hardware: Hardware,
    fixed: Fixed,
    load_factor: float | None,
) -> str:
    """What makes the best disaggregated split slower than the co-located one.

    The difference of their times per token is a sum of four: more work in all, work that is
    unevenly divided, exposed transfers, and waiting. The largest is named; but memory where half
    of the difference were gone without its limit, and that nothing is left to hide where it is so.
    """
    predictions = [predict(one.config, hardware, load_factor) for one in (together, apart)]
    step = [p.step_seconds / p.config.tokens_per_step for p in predictions]
    shares = [_shares(p) for p in predictions]
    terms = {
        name: shares[1][name] * step[1] - shares[0][name] * step[0]
        for name in ("work", "uneven", "exposed", "idle")
    }
    roomy = dataclasses.replace(hardware, memory_gibibytes=math.inf)
    split = apart.config.split
    held = dataclasses.replace(fixed, replicas=split.replicas, stages=split.stages)
    best = search(
        apart.config, roomy, split.num_devices, split.placement, held, load_factor
    )  # fmt: skip
    gap = step[1] - step[0]
    if best and step[1] - best.seconds_per_token >= gap / 2:
        memory = max(
            predict(best.config, roomy, load_factor).memory.values(), key=lambda m: m.total
        )
        return (
            f"memory limits it: {in_words(best.config)} would be "
            f"{step[1] / best.seconds_per_token:.2f} times as fast, with "
            f"{memory.total / 2**30:.0f} GiB a device"
        )
    hidden = shares[0]["exposed"]
    name = max(terms, key=terms.get)
    attention, expert = _role_seconds(apart.config, hardware, load_factor)
    busier, other = ("attention", "expert") if attention > expert else ("expert", "attention")
    times = max(attention, expert) / min(attention, expert)
    words = {
        "work": "messages, recomputing and smaller units make its workers' time in units "
        f"{shares[1]['work'] * step[1] / (shares[0]['work'] * step[0]) - 1:.0%} longer in all",
        "uneven": f"each of its {busier} workers has {times:.2g} times as much to do as "
        f"an {other} worker, which waits",
        "exposed": f"transfers expose {shares[1]['exposed']:.0%} of its step, and "
        f"{hidden:.0%} of the co-located one",
        "idle": f"its workers wait {shares[1]['idle']:.0%} of the step for others, mostly while "
        f"the pipeline fills and drains, co-located ones {shares[0]['idle']:.0%}",
    }[name]
    if hidden < HIDDEN:
        near = " on one node" if split.num_devices <= hardware.devices_per_node else ""
        return (
            f"communication{near} is already hidden or short ({hidden:.0%} of the co-located "
            f"step, all that disaggregation could save) and {words}"
        )
    return words


def _shares(prediction: Prediction) -> dict[str, float]:
    """Shares of a step that add up to it: of the busier role, on the mean of its stages.

    work: all workers' busy time, evenly divided; uneven: what the busier role has more;
    exposed, idle: as `prediction.WorkerTime`.
    """
    split = prediction.config.split
    counts = {"attention": split.attention_workers, "expert": split.expert_workers, "worker": 1}
    by_role: dict[str, list[WorkerTime]] = {}
    for worker in prediction.workers:
        by_role.setdefault(worker.name.split()[-1], []).append(worker)
    busy = {role: sum(w.busy for w in some) / len(some) for role, some in by_role.items()}
    workers = sum(counts[role] for role in busy)
    even = sum(counts[role] * seconds for role, seconds in busy.items()) / workers
    most, exposed = max(busy.values()), prediction.exposed_communication
    parts = {"work": even, "uneven": most - even, "exposed": exposed}
    parts["idle"] = prediction.step_seconds - most - exposed
    return {name: seconds / prediction.step_seconds for name, seconds in parts.items()}


def _attempts(config: Config, hardware: Hardware, num_devices: int) -> Iterator[list[Attempt]]:
    """Series of growing changes of one kind."""
    length = config.batch.sequence_length
    for factors in (LENGTHS, [1 / factor for factor in LENGTHS]):
        series = []
        for factor in factors:
            changed = copy.deepcopy(config)
            # Whole sequences, at the same tokens per step.
            tokens = config.batch.tokens_per_worker * config.batch.micro_batches
            changed.batch.sequence_length = size = max(1, int(length * factor))
            changed.batch.tokens_per_worker = max(
                size, config.batch.tokens_per_worker // size * size
            )
            changed.batch.micro_batches = max(1, tokens // changed.batch.tokens_per_worker)
            words = f"sequences of {size:,} tokens"
            series.append(Attempt(words, changed, hardware, num_devices))
        yield series
    is_far = num_devices > hardware.devices_per_node
    name = "inter_node" if is_far else "intra_node"
    for factors, word in ((RATES, "faster"), ([1 / rate for rate in RATES], "slower")):
        yield [
            Attempt(
                f"{name.replace('_', '-')} links {max(factor, 1 / factor):g} times {word}",
                config,
                dataclasses.replace(hardware, **{name: getattr(hardware, name).scaled(factor)}),
                num_devices,
            )
            for factor in factors
        ]


def _more_attempts(
    config: Config,
    hardware: Hardware,
    num_devices: int,
    apart: Config,
    even: tuple[int, int] | None,
) -> tuple[list[Attempt], list[str]]:
    """Larger steps, more devices, more memory, and two of them at once; and all of it in words.

    apart, even: the best disaggregated split, and workers of its stages that would be even.
    """
    larger = copy.deepcopy(config)
    larger.batch.micro_batches *= MORE_TOKENS
    tokens = f"{MORE_TOKENS} times the tokens per step"
    roomy = dataclasses.replace(hardware, memory_gibibytes=MORE_MEMORY * hardware.memory_gibibytes)
    counts = [MORE_DEVICES * num_devices] if hardware.inter_node else []
    if even:
        counts.append(apart.split.replicas * apart.split.stages * sum(even))
    if hardware.inter_node is None:
        counts = [count for count in counts if count <= hardware.devices_per_node]
    made = [
        Attempt(tokens, larger, hardware, num_devices),
        Attempt(f"{MORE_MEMORY} times the memory", config, roomy, num_devices),
    ]
    tried = [attempt.words for attempt in made]
    counts = sorted(set(counts))
    for count in counts:
        made.append(Attempt(f"{count:,} devices", config, hardware, count))
        made.append(Attempt(f"{count:,} devices and {tokens}", larger, hardware, count))
    if counts:
        words = " or ".join(f"{count:,}" for count in counts)
        tried.append(f"{words} devices, with as many tokens per step or {MORE_TOKENS} times")
    return made, tried
