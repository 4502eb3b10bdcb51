"""Expert parallelism on shared devices, as other systems run it: what disaggregation is up against.

Every device plays both roles; a stage's devices hold all experts among them and exchange tokens in
an all-to-all before and after the experts. Times of units are those of `costs`, so what differs is
the schedule alone. Three ways to deal with the exchange:

  blocking           the device waits for each (Megatron-LM's interleaved 1F1B)
  chunked            a micro-batch goes in pieces, exchange beside experts (Tutel, Comet)
  two micro-batches  one's forward beside another's backward, exchange under compute (DualPipe)

Assumed in the baselines' favour: gradients need no exchange again for recomputation, sends between
stages cost nothing outside the bubble, the output head is shared by all devices as it is here, and
chunks and overlap do not slow the kernels down.
"""

import dataclasses
import enum

from disag_jax.config import Config
from disag_jax.planner.costs import Costs
from disag_jax.planner.hardware import Hardware
from disag_jax.planner.sizes import Sizes


class Overlap(enum.StrEnum):
    """What the exchange hides under."""

    BLOCKING = "blocking"
    CHUNKED = "chunked"
    TWO_MICRO_BATCHES = "two micro-batches"


@dataclasses.dataclass(frozen=True)
class Layer:
    """Seconds of a layer of one micro-batch: units, one exchange of either direction."""

    attention_forward: float
    attention_backward: float
    expert_forward: float
    expert_backward: float
    exchange: float

    def forward(self, overlap: Overlap, chunks: int = 1) -> float:
        """A forward layer with both exchanges."""
        return self.attention_forward + _exchanged(
            self.expert_forward, self.exchange, overlap, chunks
        )

    def backward(self, overlap: Overlap, chunks: int = 1) -> float:
        return self.attention_backward + _exchanged(
            self.expert_backward, self.exchange, overlap, chunks
        )

    @property
    def exchange_share(self) -> float:
        """Share of a blocking forward layer that is exchange."""
        return 2 * self.exchange / self.forward(Overlap.BLOCKING)

    def pair(self, quality: float) -> float:
        """One forward and one backward layer side by side.

        quality: share of what could hide (the lesser of compute and exchange) that does.
        """
        compute = (
            self.attention_forward + self.attention_backward
            + self.expert_forward + self.expert_backward
        )  # fmt: skip
        exchange = 4 * self.exchange
        return compute + exchange - quality * min(compute, exchange)


def _exchanged(experts: float, exchange: float, overlap: Overlap, chunks: int) -> float:
    """Experts between two exchanges: in chunks, a pipeline of one network and one device."""
    if overlap is not Overlap.CHUNKED:
        return experts + 2 * exchange
    moved = 2 * exchange
    return (experts + moved) / chunks + (1 - 1 / chunks) * max(experts, moved)


def layer_of(config: Config, hardware: Hardware, load_factor: float = 1.0) -> Layer:
    """A layer of a co-located config; a token is sent once for each of its choices."""
    assert config.split.colocated
    sizes = Sizes.of(config, load_factor)
    costs = Costs(sizes, hardware)
    model, units = config.model, costs.unit_seconds
    sent = config.batch.tokens_per_worker * model.top_k * model.d_model * sizes.item_bytes
    slot = load_factor * sent / config.split.expert_workers
    return Layer(
        units["attention_forward"], units["attention_backward"],
        units["expert_forward"], units["expert_backward"],
        exchange=costs.links.all_to_all_seconds(slot),
    )  # fmt: skip


def shared_step_seconds(
    config: Config,
    hardware: Hardware,
    overlap: Overlap,
    *,
    chunks: int = 4,
    quality: float = 1.0,
    load_factor: float = 1.0,
) -> float:
    """A step of a co-located config under another system's schedule.

    Blocking and chunked: 1F1B with one layer per virtual stage, whose bubble is
    (p - 1) (F + B) / v of the stage's F and B (Narayanan et al., 2021). Two micro-batches:
    DualPipe's bubble (p / 2 - 1) (F&B + B - 3 W), W being the weight gradients, taken to be as long
    as the forward units (DeepSeek-V3 report, table of schedules).
    """
    layer = layer_of(config, hardware, load_factor)
    costs = Costs(Sizes.of(config, load_factor), hardware)
    split, rows = config.split, config.layers_per_stage
    loss = costs.unit_seconds["loss"] + 2 * costs.loss_transfer
    if overlap is Overlap.TWO_MICRO_BATCHES:
        pair, weights = layer.pair(quality), layer.attention_forward + layer.expert_forward
        backward = layer.backward(Overlap.BLOCKING)
        bubble = max(0.0, split.stages / 2 - 1) * rows * max(0.0, pair + backward - 3 * weights)
    else:
        pair = layer.forward(overlap, chunks) + layer.backward(overlap, chunks)
        bubble = (split.stages - 1) * (pair + 2 * costs.forward_transfer)
    work = config.batch.micro_batches * (rows * pair + loss)
    return work + bubble + sum(costs.outside_loop.values())
