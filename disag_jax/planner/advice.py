"""Whether to disaggregate, and which change of circumstances would turn the answer around."""

import copy
import dataclasses
import math

from disag_jax.config import Config, PlacementKind
from disag_jax.planner.hardware import Hardware
from disag_jax.planner.search import Fixed, Found, search

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
      sentence: all of it.
    """

    placement: PlacementKind
    advantage: float | None
    changes: list[str]
    fixed: Fixed

    @property
    def sentence(self) -> str:
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
    return Advice(first, advantage, changes, fixed)


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
