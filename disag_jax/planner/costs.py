"""Times of everything that a step is made of, from the work in it and what the hardware does.

A unit's work is counted in three kinds: FLOPs of matrix products, FLOPs of attention scores, and
bytes that the other operations move. Backward units count what recomputation adds. Which kinds take
how long is the hardware's (`Hardware.unit_seconds`).
"""

import dataclasses
import functools

from disag_jax.chunk_model import Operation
from disag_jax.config import Config, Overlap, Recompute
from disag_jax.flops import FORWARD_AND_BACKWARD, attention_layer
from disag_jax.planner.hardware import Hardware
from disag_jax.planner.roofline import expected_copies
from disag_jax.planner.sizes import Sizes, expert_parameters, half_full_tiles
from disag_jax.planner.topology import StageLinks
from disag_jax.reduction import sums_rows_early
from disag_jax.shared_loss import tokens_of_workers
from mesh.roles import Role

# Score products of the fused backward pass, which makes the scores anew, over those of the forward
# pass, two (Dao et al., "FlashAttention", section 3.1).
SCORE_BACKWARD = 2.5

# Bytes that the update programs move for each parameter: a float32 gradient, weight and two moments
# are read, the last three and the compute copy written.
UPDATE_BYTES_PER_PARAMETER = 30

# Passes over the boxes of messages and of cotangents that the loop makes in a period, by hop: what
# arrived is kept for the loss; with hop 2 every box is still under way, and written anew. Counted
# in the programs compiled for two H100.
BOX_PASSES = {1: (2, 0), 2: (7, 7)}

# Passes over a worker's gradient sums in the pipeline program: zeros at first, norms at last.
GRADIENT_PASSES = 2


@dataclasses.dataclass(frozen=True)
class Work:
    """What a unit does once.

    Attributes:
      products: FLOPs of matrix products.
      scores: FLOPs of causal attention, without its masked half.
      num_bytes: bytes that everything else reads and writes.
    """

    products: float
    scores: float
    num_bytes: float


def unit_work(sizes: Sizes, pairs: float | None = None) -> dict[str, Work]:
    """The work of each unit (`hardware.UNITS`).

    pairs: (token, expert) pairs of the expert worker, where they are known rather than expected.

    Passes over memory are those of arrays that some operation must read or write, counted from
    disag_jax/units.py and disag_jax/dispatch.py: elementwise chains are one pass.
    """
    config, model = sizes.config, sizes.config.model
    recompute = config.run.recompute
    item, wide = sizes.item_bytes, sizes.wide_bytes
    tokens, width = config.batch.tokens_per_worker, model.d_model
    products, scores = (
        tokens * flops for flops in attention_layer(model, config.batch.sequence_length)
    )
    hidden = tokens * width * item
    slots = sizes.placement.rounds * sizes.bucket.rows * width * item
    heads = tokens * (model.num_heads + model.num_kv_heads) * model.head_dim * item
    sums = sizes.layer_parameters[Role.ATTENTION] * (item + 2 * wide)
    products_again, scores_again = products, scores if recompute is Recompute.FULL else 0
    if recompute is Recompute.NONE:
        projected = model.num_heads + 2 * model.num_kv_heads
        products_again -= 2 * tokens * width * projected * model.head_dim
    attention_kept = sum(sizes.attention_kept_bytes)

    return {
        # Sum of copies, two norms, residual, stash; RoPE; gather, encode and decode of messages;
        # what is kept is read and written.
        "attention_forward": Work(
            products, scores,
            (config.fanout + 9) * hidden + 2 * heads + 6 * slots + 2 * attention_kept,
        ),
        # Norms and residuals again and back; RoPE again and back; four passes of messages; what was
        # kept is taken out of the stash.
        "attention_backward": Work(
            2 * products + products_again,
            SCORE_BACKWARD * scores + scores_again,
            17 * hidden + 4 * heads + 8 * slots + sums + 2 * attention_kept,
        ),
        **expert_work(sizes, pairs),
        "loss": loss_work(sizes, loss_tokens(sizes)[0]),
    }  # fmt: skip


def expert_work(sizes: Sizes, pairs: float | None = None) -> dict[str, Work]:
    """The work of the expert units alone, of one chunk if `sizes` are a chunk's.

    Every chunk fills up the tiles of each expert, reads its weights, and reads and writes its sums
    of gradients.

    pairs: as `unit_work`.
    """
    config, model = sizes.config, sizes.config.model
    recompute, item, wide = config.run.recompute, sizes.item_bytes, sizes.wide_bytes
    width = model.d_model
    pairs = sizes.pairs if pairs is None else pairs
    padded = min(pairs + half_full_tiles(config), max(sizes.bucket.sorted_rows, pairs))
    expert_products = 2 * padded * expert_parameters(model)
    rows = sizes.rows * width * item
    sorted_hidden = sizes.bucket.sorted_rows * width * item
    sorted_inner = sizes.bucket.sorted_rows * model.expert_width * item
    expert_weights = sizes.layer_parameters[Role.EXPERT]
    # The gate and up products; that of `down` is not needed again.
    expert_again = 0 if recompute is Recompute.NONE else 2 / 3
    return {
        # Decode, norm, stash, residual, encode; sort, sum over choices; SwiGLU; weights. What is
        # kept is written there by the product's kernel.
        "expert_forward": Work(
            expert_products, 0, 10 * rows + 3 * sorted_hidden + 3 * sorted_inner
            + expert_weights * item,
        ),
        # The same twice, where what was kept is read instead of made; but the rows are not summed
        # again, and the gate's and the up product's gradient leave their kernel as a sum. Each
        # weight is read, and its gradient added to a sum.
        "expert_backward": Work(
            (2 + expert_again) * expert_products, 0,
            20 * rows + 5 * sorted_hidden + 6 * sorted_inner
            + expert_weights * (item + 2 * wide),
        ),
    }  # fmt: skip


def loss_work(sizes: Sizes, tokens: int) -> Work:
    """Head and cross-entropy of some of a micro-batch's tokens, forward and backward."""
    if not tokens:
        return Work(0, 0, 0)
    config, model = sizes.config, sizes.config.model
    head = model.vocab_size * model.d_model
    # The last chunk is filled up, and all its rows are computed (layers/head.py).
    chunk = min(tokens, config.run.loss_chunk)
    chunks = -(-tokens // chunk)
    rows = chunks * chunk
    # Logits are written, read for the maximum and the sum, and for their gradient, which is
    # written and read by two products. So XLA makes it; the kernel of Hopper GPUs, which takes some
    # vocabularies, reads them once.
    logits = rows * model.vocab_size * (3 * sizes.wide_bytes + 3 * sizes.item_bytes)
    sums = chunks * head * (2 * sizes.item_bytes + 2 * sizes.wide_bytes)
    return Work(FORWARD_AND_BACKWARD * 2 * rows * head, 0, logits + sums)


def loss_tokens(sizes: Sizes) -> tuple[int, int, int]:
    """(tokens of a micro-batch's loss that its owner computes, helpers, tokens of each)."""
    config = sizes.config
    return tokens_of_workers(
        config.batch.tokens_per_worker, config.split.loss_share, sizes.placement
    )


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a step of one config on some hardware.

    Attributes:
      two_level: whether a many-to-many transfer sends a token to another node once and spreads it
        there. The system sends it to each worker; this is to see what the other way would bring.
      copies_boxes: whether the loop copies its boxes (`BOX_PASSES`), as XLA makes it; not, to see
        the schedule alone.
    """

    sizes: Sizes
    hardware: Hardware
    two_level: bool = False
    copies_boxes: bool = True

    @property
    def config(self) -> Config:
        return self.sizes.config

    @functools.cached_property
    def links(self) -> StageLinks:
        return StageLinks.of(self.sizes.placement, self.hardware)

    @functools.cached_property
    def unit_seconds(self) -> dict[str, float]:
        """Seconds of each unit, of all its chunks, and of the owner's loss, by `hardware.UNITS`."""
        degrees = self.chunks
        return {
            name: degrees[name] * self.expert_seconds(name, degrees[name])
            if name in degrees
            else self._seconds(name, work)
            for name, work in unit_work(self.sizes).items()
        }

    @property
    def helper_loss(self) -> float:
        """Seconds of the loss of those tokens that a helper computes; without one 0."""
        _, helpers, tokens = loss_tokens(self.sizes)
        return self._seconds("loss", loss_work(self.sizes, tokens)) if helpers else 0.0

    @property
    def chunks(self) -> dict[str, int]:
        """In how many chunks a worker's rows pass each expert unit."""
        split = self.config.split
        return {"expert_forward": split.forward_chunks, "expert_backward": split.backward_chunks}

    def expert_seconds(self, unit: str, chunks: int) -> float:
        """Seconds of one of `chunks` chunks in an expert unit."""
        work = expert_work(self.sizes.in_chunks(chunks))[unit]
        return self._seconds(unit, work, chunks)

    def _seconds(self, unit: str, work: Work, chunks: int = 1) -> float:
        seconds = self.hardware.unit_seconds(unit, work.products, work.scores, work.num_bytes)
        lost = self.hardware.lost_beside_transfers.get(unit, 0.0)
        return seconds + lost * min(self._beside(unit, chunks), seconds)

    def _beside(self, unit: str, chunks: int) -> float:
        """Seconds of the transfer or exchange that runs beside a unit, or beside one of its chunks.

        Phases hide what the other direction's phases made; chunks hide each other's exchanges.
        """
        if unit == "loss":
            return 0.0
        split, sizes = self.config.split, self.sizes
        directions = ("forward", "backward")
        own, other = directions if unit.endswith("forward") else directions[::-1]
        if not split.colocated:
            return {"forward": self.forward_transfer, "backward": self.backward_transfer}[other]
        words = {"forward": sizes.message_bytes, "backward": sizes.cotangent_bytes}
        if split.overlap is Overlap.INTERLEAVED:
            return self.exchange(words[other]).of_chunk(1)
        return self.exchange(words[own], chunks).of_chunk(chunks) if chunks > 1 else 0.0

    def regroup_seconds(self, forward_chunks: int, backward_chunks: int) -> float:
        """Dealing the arrived rows to other chunks for the backward phase, where there are such."""
        if forward_chunks == backward_chunks:
            return 0.0
        # Joined, cut and stashed: each a read and a write; every chunk is sorted by itself.
        hidden = self.sizes.rows * self.config.model.d_model * self.sizes.item_bytes
        overhead = 1e-6 * self.hardware.unit_overhead_microseconds
        return backward_chunks * overhead + 6 * hidden / self.hardware.bytes_per_second

    @property
    def box_copies(self) -> tuple[float, float]:
        """Seconds by which the loop's copies of boxes lengthen a (forward, backward) phase."""
        split, sizes = self.config.split, self.sizes
        if split.colocated or not self.copies_boxes:
            return 0.0, 0.0
        slots = (sizes.message_bytes, sizes.cotangent_bytes)
        return tuple(
            passes * sizes.placement.rounds * slot / self.hardware.bytes_per_second
            for passes, slot in zip(BOX_PASSES[split.hop], slots, strict=True)
        )

    @property
    def forward_transfer(self) -> float:
        """All rounds of a forward transfer; co-located, of hidden states to the next stage."""
        return self._transfer(self.sizes.message_bytes)

    @property
    def backward_transfer(self) -> float:
        return self._transfer(self.sizes.cotangent_bytes)

    def _transfer(self, slot_bytes: float) -> float:
        placement, config = self.sizes.placement, self.config
        if not placement.colocated:
            rounds = placement.rounds
            seconds = self.links.pipeline.many_to_many.seconds(rounds * slot_bytes, rounds)
            return min(seconds, self._two_levels(slot_bytes)) if self.two_level else seconds
        if placement.stages == 1:
            return 0.0
        hidden = config.batch.tokens_per_worker * config.model.d_model * self.sizes.item_bytes
        return self.links.pipeline.many_to_many.seconds(hidden)

    def _two_levels(self, slot_bytes: float) -> float:
        """Copies to nodes over the network, and from there to workers, one after the other."""
        model, placement = self.config.model, self.sizes.placement
        workers = placement.expert_workers
        nodes = -(-workers // self.hardware.devices_per_node)
        share = expected_copies(model.num_experts, model.top_k, nodes) / expected_copies(
            model.num_experts, model.top_k, workers
        )
        num_bytes, rounds = placement.rounds * slot_bytes, placement.rounds
        far = self.links.pipeline.many_to_many.seconds(share * num_bytes, rounds)
        return far + self.hardware.intra_node.many_to_many.seconds(num_bytes, rounds)

    def exchange(self, slot_bytes: float, chunks: int = 1) -> Operation:
        """One all-to-all of the twin within a group of expert workers, in `chunks` chunks.

        slot_bytes: `sizes.message_bytes` forward, `sizes.cotangent_bytes` backward.
        """
        if not self.sizes.placement.colocated:
            return Operation()
        return self.links.all_to_all_parts(slot_bytes, chunks)

    @property
    def loss_transfer(self) -> float:
        """Scattering last hidden states over the helpers, or gathering their gradients."""
        _, helpers, tokens = loss_tokens(self.sizes)
        if not helpers:
            return 0.0
        share = tokens * self.config.model.d_model * self.sizes.item_bytes
        return self.links.pipeline.many_to_many.seconds(helpers * share, helpers)

    @property
    def gather_weights(self) -> float:
        """Embedding and head from all devices, at the beginning of the pipeline program."""
        num_bytes = self.sizes.vocabulary_parameters * self.sizes.item_bytes
        return self.links.world.all_gather(num_bytes)

    @property
    def reduce_gradients(self) -> float:
        """Sums of gradients at the end of the pipeline program, one after the other.

        Attention rows over a stage's attention workers (co-located, both roles' rows over those
        that hold the same), whole rows over the replicas, the vocabulary over all devices. Where
        the loop sums attention's, that of one layer is left.
        """
        placement, wide = self.sizes.placement, self.sizes.wide_bytes
        rows = self.config.layers_per_stage * wide
        layer, columns = self.sizes.layer_parameters, sum(self.sizes.row_columns.values())
        shared = self.config.model.num_shared_experts * expert_parameters(self.config.model)
        # Disaggregated, the workers of both roles take part with as many columns as either needs.
        alike = layer[Role.ATTENTION] if placement.colocated else max(layer[Role.ATTENTION], shared)
        if sums_rows_early(self.config):
            seconds = self.reduce_layer
        else:
            seconds = self.links.stage.all_reduce(rows * alike)
        if placement.colocated:
            seconds += self.links.expert_copies.all_reduce(rows * layer[Role.EXPERT])
            seconds += self.links.expert_groups.all_reduce(rows * shared)
        seconds += self.links.replicas.all_reduce(rows * columns)
        return seconds + self.links.world.all_gather(self.sizes.vocabulary_parameters * wide)

    @property
    def reduce_layer(self) -> float:
        """The sum of a layer's attention gradients over a stage's workers."""
        num_bytes = self.sizes.wide_bytes * self.sizes.layer_parameters[Role.ATTENTION]
        return self.links.stage.all_reduce(num_bytes)

    @property
    def update(self) -> float:
        """Optimizer and packing on the devices that hold most, and gathering divided experts."""
        layer, devices = self.sizes.layer_masters, self.sizes.placement.num_devices
        held = sum(layer.values()) if self.config.split.colocated else max(layer.values())
        parameters = (
            self.config.layers_per_stage * held + self.sizes.vocabulary_parameters / devices
        )
        # A shorter first moment is read and written with fewer bytes.
        moved = self.sizes.wide_bytes / 4 * UPDATE_BYTES_PER_PARAMETER
        share = 1 - 2 * (self.sizes.wide_bytes - self.sizes.mu_bytes) / moved
        measured = self.hardware.update_milliseconds_per_gigaparameter
        if measured is not None:
            return 1e-12 * measured * share * parameters + self._gather_experts
        return moved * share * parameters / self.hardware.bytes_per_second + self._gather_experts

    @property
    def _gather_experts(self) -> float:
        """The compute copies of a worker's routed experts, from the devices that divide them."""
        if not self.config.optimizer.sharded:
            return 0.0
        layer = self.sizes.experts_held * expert_parameters(self.config.model)
        num_bytes = self.config.layers_per_stage * layer * self.sizes.item_bytes
        seconds = self.links.replicas.all_gather(num_bytes)
        if self.sizes.placement.colocated:
            seconds += self.links.expert_copies.all_gather(num_bytes)
        return seconds

    @property
    def gradient_passes(self) -> float:
        """Passes over the worker's gradient sums before and after the loop."""
        columns = self.config.layers_per_stage * sum(self.sizes.row_columns.values())
        num_bytes = GRADIENT_PASSES * columns * self.sizes.wide_bytes
        return num_bytes / self.hardware.bytes_per_second

    @property
    def outside_loop(self) -> dict[str, float]:
        """What a step takes besides the periods of the schedule, by its name."""
        return {
            "gather weights": self.gather_weights,
            "reduce gradients": self.reduce_gradients + self.gradient_passes,
            "optimizer": self.update,
            "host": 1e-3 * self.hardware.host_milliseconds,
        }
