"""Parameters and bytes of a config by arithmetic alone, for searches over many splits.

Each equals what the program itself would allocate (tests/test_planner_sizes.py compares them); the
program's own classes would trace the model once per split.
"""

import dataclasses
import functools

from disag_jax.config import Config, Dtype, ModelConfig, MuDtype, Recompute
from disag_jax.geometry import Bucket, buckets, chunk_bucket, expected_load, placement_of
from disag_jax.stash import BLOCK_WORDS, alignment
from mesh.placement import ExpertPlaces, Placement
from mesh.roles import Role

# Rows of a tile of the grouped product on a GPU (layers/grouped_matmul.py): plans are for GPUs.
TILE = 128
ITEM_BYTES = {Dtype.BFLOAT16: 2, Dtype.FLOAT32: 4, Dtype.FLOAT64: 8}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of one config in one transport bucket.

    Attributes:
      load_factor: rows of the busiest expert worker over those that the fullest one, with most
        experts, is expected to have (`geometry.expected_load`).
      chunks: of how many chunks of a micro-batch's rows the bucket, rows, pairs and messages are
        one, as `geometry.Geometry.chunks`.
    """

    config: Config
    bucket: Bucket
    load_factor: float
    chunks: int = 1

    @classmethod
    def of(cls, config: Config, load_factor: float = 1.0) -> "Sizes":
        """In the smallest bucket that holds `load_factor` times the expected load."""
        rows, pairs = expected_load(config)
        options = buckets(config, TILE)
        needed = min(config.batch.tokens_per_worker, load_factor * rows)
        needed_sorted = load_factor * pairs + half_full_tiles(config)
        for bucket in options:
            if bucket.rows >= needed and bucket.sorted_rows >= needed_sorted:
                return cls(config, bucket, load_factor)
        return cls(config, options[-1], load_factor)

    def in_chunks(self, count: int) -> "Sizes":
        """The sizes of one of `count` equal chunks, as `geometry.Geometry.in_chunks` makes them."""
        if count == 1:
            return self
        held = self.experts_held + self.config.model.num_shared_experts
        bucket = chunk_bucket(self.bucket, count, held, TILE)
        return dataclasses.replace(self, bucket=bucket, chunks=count)

    @functools.cached_property
    def placement(self) -> Placement:
        return placement_of(self.config)

    @property
    def item_bytes(self) -> int:
        """Of weights and activations."""
        return ITEM_BYTES[self.config.run.compute_dtype]

    @property
    def wide_bytes(self) -> int:
        """Of gates, gradient sums, masters and optimizer state but for a shorter first moment."""
        return max(4, self.item_bytes)

    @property
    def mu_bytes(self) -> int:
        """Of the first moment."""
        return 2 if self.config.optimizer.mu_dtype is MuDtype.BFLOAT16 else self.wide_bytes

    @property
    def state_bytes(self) -> int:
        """Of a parameter's master and moments."""
        return 2 * self.wide_bytes + self.mu_bytes

    @property
    def _int_bytes(self) -> int:
        # Words on the wire and in the stash are as wide as the compute type.
        return max(4, self.item_bytes)

    @property
    def experts_held(self) -> int:
        """Routed experts of one worker."""
        return ExpertPlaces(
            self.config.model.num_experts, self.config.split.expert_workers
        ).per_worker

    @property
    def rows(self) -> int:
        """n, rows of an expert worker, empty ones included."""
        return self.placement.senders * self.bucket.rows

    @functools.cached_property
    def pairs(self) -> float:
        """Expected (token, expert) pairs of the busiest expert worker."""
        return self.load_factor * expected_load(self.config)[1] / self.chunks

    @property
    def message_bytes(self) -> int:
        """One slot of a forward message: hidden states, gates, expert ids, origins."""
        model = self.config.model
        of_choices = model.top_k * (self.wide_bytes + self._int_bytes)
        row = model.d_model * self.item_bytes + of_choices + self._int_bytes
        return self.bucket.rows * row

    @property
    def cotangent_bytes(self) -> int:
        """One slot of a backward message: gradients of hidden states and gates."""
        model = self.config.model
        return self.bucket.rows * (model.d_model * self.item_bytes + model.top_k * self.wide_bytes)

    @property
    def layer_parameters(self) -> dict[Role, int]:
        """Parameters that a worker of each role holds of one layer."""
        model = self.config.model
        experts = self.experts_held + model.num_shared_experts
        return {
            Role.ATTENTION: attention_parameters(model),
            Role.EXPERT: experts * expert_parameters(model),
        }

    @property
    def layer_masters(self) -> dict[Role, float]:
        """Parameters of one layer that a worker of each role holds the masters of."""
        held = dict(self.layer_parameters)
        if self.config.optimizer.sharded:
            routed = self.experts_held * expert_parameters(self.config.model)
            held[Role.EXPERT] -= routed * (1 - 1 / self.config.split.expert_holders)
        return held

    @property
    def row_columns(self) -> dict[Role, int]:
        """Columns of the arrays that hold a worker's rows, one row a layer.

        Disaggregated, there is one array, as wide as the larger role needs, and the expert role's
        entry is 0; co-located there is one for each role.
        """
        model, counts = self.config.model, self.layer_parameters
        matrix = model.d_model * model.expert_width
        used = dict(counts)
        if not self.config.split.colocated:
            used = {Role.ATTENTION: max(used.values()), Role.EXPERT: 0}
        return {role: -(-columns // matrix) * matrix for role, columns in used.items()}

    @property
    def vocabulary_parameters(self) -> int:
        """Embedding, head and final norm, of the whole model."""
        model = self.config.model
        return 2 * model.vocab_size * model.d_model + model.d_model

    @property
    def stash_entry_bytes(self) -> dict[Role, int]:
        """One stash slot of each role: its leaves, each in whole blocks.

        An expert's is that of all chunks of a micro-batch, each with leaves of its own.
        """
        model, ints, placement = self.config.model, self._int_bytes, self.placement
        tokens, choices = self.config.batch.tokens_per_worker, model.top_k
        slot_rows, hidden = placement.rounds * self.bucket.rows, model.d_model * self.item_bytes
        # Choices, what capacity kept, origins and positions; disaggregated also origins received.
        attention = [
            tokens * hidden,
            *[tokens * choices * ints] * 2,
            tokens * self.config.fanout * ints,
        ]
        attention += [slot_rows * ints] * (1 if self.config.split.colocated else 2)
        chunks = self.config.split.backward_chunks
        return {
            Role.ATTENTION: self._in_blocks(attention + self.attention_kept_bytes),
            Role.EXPERT: chunks * self._in_blocks(self.in_chunks(chunks)._expert_leaves),
        }

    @property
    def _expert_leaves(self) -> list[int]:
        """Bytes of each leaf that an expert unit stashes of one chunk."""
        model, ints, sorted_rows = self.config.model, self._int_bytes, self.bucket.sorted_rows
        return [
            self.rows * model.d_model * self.item_bytes,
            self.rows * model.top_k * self.wide_bytes,
            self.rows * ints,
            sorted_rows * ints,
            self.rows * (model.top_k + model.num_shared_experts) * ints,
            sorted_rows // TILE * ints,
            *self.expert_kept_bytes,
        ]

    def _in_blocks(self, leaves: list[int]) -> int:
        block = alignment(self.config.model.expert_width) * BLOCK_WORDS * self.item_bytes
        return sum(-(-size // block) * block for size in leaves)

    @property
    def attention_kept_bytes(self) -> list[int]:
        """Arrays that an attention unit keeps for its backward unit, by `run.recompute`."""
        model, recompute = self.config.model, self.config.run.recompute
        tokens = self.config.batch.tokens_per_worker
        queries, keys = (
            tokens * heads * model.head_dim * self.item_bytes
            for heads in (model.num_heads, model.num_kv_heads)
        )
        attended = [queries, tokens * model.num_heads * self.wide_bytes]
        projected = [queries, keys, keys]
        return {
            Recompute.FULL: [],
            Recompute.SELECTIVE: attended,
            Recompute.NONE: projected + attended,
        }[recompute]

    @property
    def expert_kept_bytes(self) -> list[int]:
        """Arrays that an expert unit keeps for its backward unit, by `run.recompute`."""
        if self.config.run.recompute is not Recompute.NONE:
            return []
        return [2 * self.bucket.sorted_rows * self.config.model.expert_width * self.item_bytes]


def half_full_tiles(config: Config) -> float:
    """Rows without a pair among an expert worker's sorted ones: half of each expert's last tile."""
    held = ExpertPlaces(config.model.num_experts, config.split.expert_workers).per_worker
    return (held + config.model.num_shared_experts) * TILE / 2


def attention_parameters(model: ModelConfig) -> int:
    """Of one layer: projections, router and both norms."""
    heads = model.num_heads + model.num_kv_heads
    projections = 2 * model.d_model * heads * model.head_dim
    return projections + model.d_model * model.num_experts + 2 * model.d_model


def expert_parameters(model: ModelConfig) -> int:
    """Of one expert: gate, up and down."""
    return 3 * model.d_model * model.expert_width
