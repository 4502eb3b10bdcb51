"""Bytes that each kind of worker holds at once, from shapes.

What stays for the whole run (masters, optimizer state, compute copies) and what the pipeline
program holds (gradient sums, stash, vocabulary) are exact sums of arrays. What a unit needs while
it runs is an estimate: the arrays that its backward pass must have at the same time.
"""

import dataclasses

from disag_jax.config import Overlap, Recompute
from disag_jax.memory import in_words
from disag_jax.planner.hardware import Hardware
from disag_jax.planner.simulator import stash_slots
from disag_jax.planner.sizes import Sizes
from mesh.roles import Role


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one worker.

    Attributes:
      state: masters and optimizer state.
      weights: compute copies in rows, and this device's part of the vocabulary's.
      gradients: sums in rows, and the vocabulary's, gathered and summed.
      stash: what forward units leave for their backward units.
      transport: messages made, under way and received.
      workspace: of the largest unit, an estimate.
    """

    state: float
    weights: float
    gradients: float
    stash: float
    transport: float
    workspace: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def predict_memory(
    sizes: Sizes, resident: dict[str, dict[str, float]] | None = None
) -> dict[str, Memory]:
    """The memory of each kind of worker, named as `Placement.kind_of` does.

    resident: `resident_bytes` of these sizes, where they are known.
    """
    program = {
        "stash": _stash(sizes),
        "transport": _transport(sizes),
        "workspace": max(_workspaces(sizes).values()),
    }
    resident = resident or resident_bytes(sizes)
    return {kind: Memory(**kept, **program) for kind, kept in resident.items()}


def resident_bytes(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Bytes of each kind of worker, by `Memory`'s names, that recomputing does not change."""
    config, item, wide = sizes.config, sizes.item_bytes, sizes.wide_bytes
    rows = config.layers_per_stage * sum(sizes.row_columns.values())
    vocabulary, devices = sizes.vocabulary_parameters, sizes.placement.num_devices
    tokens = config.batch.micro_batches * config.batch.tokens_per_worker
    program = {
        "weights": item * (rows + vocabulary / devices) + 8 * tokens,
        "gradients": wide * (rows + vocabulary / devices) + (item + wide) * vocabulary,
    }
    held = {role: config.layers_per_stage * n for role, n in sizes.layer_masters.items()}
    if config.split.colocated:
        held = {"worker": sum(held.values())}
    else:
        held = {f"{role.label} worker": parameters for role, parameters in held.items()}
    return {
        kind: {"state": sizes.state_bytes * (parameters + vocabulary / devices), **program}
        for kind, parameters in held.items()
    }


def missing_bytes(memory: dict[str, Memory], hardware: Hardware) -> dict[str, float]:
    """Bytes over the device's memory, of the kinds of worker that do not fit."""
    over = {kind: worker.total - hardware.usable_bytes for kind, worker in memory.items()}
    return {kind: size for kind, size in over.items() if size > 0}


def missing_in_words(missing: dict[str, float]) -> str:
    """Each kind of worker that does not fit, and by how much."""
    return ", ".join(f"{kind} {in_words(size)} over" for kind, size in missing.items())


def against_usable(memory: dict[str, Memory], hardware: Hardware) -> str:
    """Each kind of worker, by how much it does not fit, or what it leaves."""
    left = {kind: hardware.usable_bytes - worker.total for kind, worker in memory.items()}
    return ", ".join(
        f"{kind} {in_words(abs(size))} {'over' if size < 0 else 'to spare'}"
        for kind, size in left.items()
    )


def _stash(sizes: Sizes) -> float:
    config, split = sizes.config, sizes.config.split
    slots = stash_slots(
        config.model.num_layers, split.stages, config.batch.micro_batches, split.hop,
        split.colocated,
    )  # fmt: skip
    entries = sizes.stash_entry_bytes
    pools = [slots[role] * entries[role] for role in Role]
    # The roles' pools share a shape, as rows do.
    return sum(pools) if split.colocated else max(pools)


def _transport(sizes: Sizes) -> float:
    """Messages received and made of either direction, and each once more while it travels."""
    placement = sizes.placement
    boxes = placement.rounds * (sizes.message_bytes + sizes.cotangent_bytes)
    if placement.colocated:
        # Boxes live within a phase, hidden states between phases.
        tokens = sizes.config.batch.tokens_per_worker
        hidden = 4 * tokens * sizes.config.model.d_model * sizes.item_bytes
        return _twin_boxes(sizes, boxes) + hidden
    return (2 if sizes.config.split.hop == 1 else 3) * boxes


def _twin_boxes(sizes: Sizes, boxes: float) -> float:
    """Messages of the twin; `boxes`: one forward and one backward, about a phase's sent and back.

    Two phases in turns have what either sends and what it receives. In chunks, the two that travel
    side by side are joined before and cut after; rows to be dealt again wait for their last one.
    """
    split = sizes.config.split
    if split.overlap is Overlap.INTERLEAVED:
        return 2 * boxes
    fewest, most = sorted((split.forward_chunks, split.backward_chunks))
    joined = 4 * boxes / most if most > 2 else 0.0
    waiting = sizes.placement.rounds * sizes.message_bytes if fewest < most else 0.0
    return boxes + joined + waiting


def _workspaces(sizes: Sizes) -> dict[str, float]:
    """Arrays that the backward units and the loss need at once."""
    config, model = sizes.config, sizes.config.model
    item, wide = sizes.item_bytes, sizes.wide_bytes
    tokens = config.batch.tokens_per_worker
    hidden = tokens * model.d_model * item
    heads = tokens * (model.num_heads + model.num_kv_heads) * model.head_dim * item
    chunk = min(tokens, config.run.loss_chunk) * model.vocab_size
    return {
        # Hidden states and their gradients at four places; q k v, output and their gradients;
        # scores of the router.
        "attention": 8 * hidden + 4 * heads + 3 * tokens * model.num_experts * wide,
        "expert": _expert_workspace(sizes.in_chunks(config.split.backward_chunks)),
        # Logits, probabilities, and their gradient in the compute type.
        "loss": chunk * (2 * wide + item) + 4 * hidden,
    }


def _expert_workspace(sizes: Sizes) -> float:
    """What the expert's backward unit holds of one chunk, beside what it takes from the stash.

    Counted in programs compiled for two H100. Gate and up, if they are made again, are gone before
    the gradient of the rows is there as a third array; co-located there are never three.
    """
    config, model, item = sizes.config, sizes.config.model, sizes.item_bytes
    hidden = sizes.bucket.sorted_rows * model.d_model * item
    inner = sizes.bucket.sorted_rows * model.expert_width * item
    again = 0 if config.run.recompute is Recompute.NONE else 2 * inner
    # Sorted rows and their gradient; the gradients of gate and up, and their product.
    both = 2 * hidden + 3 * inner
    if config.split.colocated:
        return both + again
    # The rows that came, that go, and between.
    return both + max(hidden, again) + 3 * sizes.rows * model.d_model * item
