"""Whether to disaggregate, and which change of circumstances would turn the answer around."""

import copy
import dataclasses
import math

from disag_jax.config import Config, PlacementKind
from disag_jax.planner.costs import Costs
from disag_jax.planner.hardware import Hardware
from disag_jax.planner.prediction import assumed_load_factor
from disag_jax.planner.search import Fixed, Found, search
from disag_jax.planner.sizes import Sizes

# Of the busier role's time over that of roles alike: what counts as uneven, and as even.
UNEVEN, EVEN = 0.2, 0.1
MOST_WORKERS = 64  # of a stage, that are tried to make the roles even

LENGTHS = (2, 4, 8)
RATES = (2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Advice:
    """The placement that is faster, by which factor, and what would have to change.

    Attributes:
      placement: the faster one.
      advantage: speed over the other placement's best; None where the other fits nowhere.
      changes: the least change of each kind tried that makes the other one faster, in words.
      fixed: what held for every split that was tried.
      balance: where co-location wins and the roles are uneven, what would make them even, in words.
      sentence: all of it.
    """

    placement: PlacementKind
    advantage: float | None
    changes: list[str]
    fixed: Fixed
    balance: str | None = None

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
        also = f" and {self.fixed}" if str(self.fixed) else ""
        return (
            f"{text}; with the other's stages and replicas{also}, neither sequences up to "
            f"{LENGTHS[-1]} "
            f"times as long or short nor links up to {RATES[-1]} times as fast or slow would turn "
            "that around"
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
    one with any that `fixed` allows: a change that is named does turn the order around.
    """
    ranked = sorted((one for one in found.values() if one), key=lambda one: one.seconds_per_token)
    first = ranked[0].config.split.placement
    if len(ranked) == 1:
        return Advice(first, None, [], fixed)
    advantage = ranked[1].seconds_per_token / ranked[0].seconds_per_token

    first_found, second_found = ranked

    def seconds(found: Found, changed_config, changed_hardware, *, free: bool) -> float:
        split = found.config.split
        held = {} if free else {"replicas": split.replicas, "stages": split.stages}
        best = search(
            changed_config, changed_hardware, num_devices, split.placement,
            dataclasses.replace(fixed, **held), load_factor,
        )  # fmt: skip
        return best.seconds_per_token if best else math.inf

    def outcome(*changed) -> str | None:
        """None if the order stays; else why, where it is not speed."""
        other = seconds(second_found, *changed, free=False)
        if seconds(first_found, *changed, free=False) <= other:
            return None
        # The faster one may now want other stages.
        own = seconds(first_found, *changed, free=True)
        if own <= other:
            return None
        return "" if own < math.inf else ", where it no longer fits the memory"

    changes = []
    for attempts in _attempts(config, hardware, num_devices):
        for words, changed_config, changed_hardware in attempts:
            reason = outcome(changed_config, changed_hardware)
            if reason is not None:
                changes.append(words + reason)
                break
    balance = None
    if first is PlacementKind.COLOCATED:
        balance = uneven_roles(second_found.config, hardware, load_factor)
    return Advice(first, advantage, changes, fixed, balance)


def uneven_roles(config: Config, hardware: Hardware, load_factor: float | None) -> str | None:
    """How uneven the roles of a disaggregated split are, and which workers would make them even.

    None where they are about even. No role gets fewer workers than it has, so that memory is no
    worse; how the time of a unit changes with its size is left out.
    """
    split = config.split
    units = Costs(Sizes.of(config, assumed_load_factor(config, load_factor)), hardware).unit_seconds
    attention, expert = (
        units[f"{role}_forward"] + units[f"{role}_backward"] for role in ("attention", "expert")
    )
    now = split.attention_workers, split.expert_workers
    work = attention * now[0], expert * now[1]

    def longest(workers) -> float:
        """Time of the busier role over that of both alike."""
        return max(w / n for w, n in zip(work, workers, strict=True)) * sum(workers) / sum(work)

    if longest(now) <= 1 + UNEVEN:
        return None
    text = (
        f"as {now[0]} + {now[1]} an attention worker has {attention / expert:.2g} times the work "
        "of an expert worker"
    )
    experts = range(now[1], config.model.num_experts + 1)
    for total in range(sum(now) + 1, MOST_WORKERS + 1):
        for n in experts:
            even = total - n, n
            if even[0] >= now[0] and longest(even) <= 1 + EVEN:
                devices = split.replicas * split.stages * total
                return f"{text}: {even[0]} + {n} ({devices} devices) would be about even"
    return text


def _attempts(config: Config, hardware: Hardware, num_devices: int):
    """Series of (words, config, hardware), each of growing changes of one kind."""
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
            series.append((f"sequences of {size:,} tokens", changed, hardware))
        yield series
    is_far = num_devices > hardware.devices_per_node
    name = "inter_node" if is_far else "intra_node"
    for factors, word in ((RATES, "faster"), ([1 / rate for rate in RATES], "slower")):
        yield [
            (
                f"{name.replace('_', '-')} links {max(factor, 1 / factor):g} times {word}",
                config,
                dataclasses.replace(hardware, **{name: getattr(hardware, name).scaled(factor)}),
            )
            for factor in factors
        ]
