"""Static sizes that the program is compiled for, derived from a config and a transport bucket."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from disag_jax.config import Config, Dtype
from layers.dtypes import accumulation_dtype
from layers.grouped_matmul import sorted_rows, tile_rows
from mesh.placement import ExpertPlaces, Placement


def enable_float64(config: Config):
    """Lets JAX compute in float64 if the config does; call before anything is traced."""
    if config.run.compute_dtype is Dtype.FLOAT64:
        jax.config.update("jax_enable_x64", True)


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """Capacities of the transport; never a property of the model.

    Attributes:
      rows: C, rows of one message slot (one token each).
      sorted_rows: P, expert-sorted rows of one expert worker, tile padding included.
    """

    rows: int
    sorted_rows: int

    def holds(self, needed: "Bucket") -> bool:
        """Whether what needs this much fits."""
        return needed.rows <= self.rows and needed.sorted_rows <= self.sorted_rows


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of one worker's units.

    The letters are the ones used as shape suffixes: T tokens of an attention worker, S sequence
    length, D model width, E experts, K choices per token, F copies of a token at most (fan-out),
    R message slots, C rows per slot, M attention workers that an expert worker hears from, n = M*C
    rows of an expert worker, P expert-sorted rows, v layer rows per worker.

    chunks: of how many chunks of a micro-batch's rows C, n and P are one; T is the whole's.
    """

    config: Config
    placement: Placement
    places: ExpertPlaces
    bucket: Bucket
    tile: int
    chunks: int = 1

    @property
    def T(self) -> int:
        return self.config.batch.tokens_per_worker

    @property
    def S(self) -> int:
        return self.config.batch.sequence_length

    @property
    def D(self) -> int:
        return self.config.model.d_model

    @property
    def E(self) -> int:
        return self.config.model.num_experts

    @property
    def K(self) -> int:
        return self.config.model.top_k

    @property
    def F(self) -> int:
        return self.config.fanout

    @property
    def R(self) -> int:
        return self.placement.rounds

    @property
    def C(self) -> int:
        return self.bucket.rows

    @property
    def M(self) -> int:
        return self.placement.senders

    @property
    def P(self) -> int:
        return self.bucket.sorted_rows

    @property
    def compute_dtype(self):
        return jnp.dtype(self.config.run.compute_dtype.value)

    @property
    def wide_dtype(self):
        """Type of gates, losses, master weights and gradient sums."""
        return accumulation_dtype(self.compute_dtype)

    @property
    def num_groups(self) -> int:
        """Groups of expert-sorted rows: the experts that a worker holds, shared ones included."""
        return self.places.per_worker + self.config.model.num_shared_experts

    @property
    def rows_are_tokens(self) -> bool:
        """Whether a message's rows are the tokens in their order, for there is one receiver."""
        return self.places.num_workers == 1 and self.R == 1 and self.C == self.T

    def in_chunks(self, count: int) -> "Geometry":
        """The sizes of one of `count` equal chunks of the rows of every slot."""
        assert self.chunks == 1 and self.C % count == 0, (self.chunks, self.C, count)
        if count == 1:
            return self
        bucket = chunk_bucket(self.bucket, count, self.num_groups, self.tile)
        return dataclasses.replace(self, bucket=bucket, chunks=count)

    def whole_sorted_rows(self, needed):
        """P that the whole must have for each of its chunks to have the `needed` sorted rows."""
        if self.chunks == 1:
            return needed
        fewest = needed - self.tile  # A chunk's P is rounded up: it is more than this.
        return self.chunks * fewest - (self.chunks - 1) * self._worst_padding + 1

    @property
    def _worst_padding(self) -> int:
        return self.num_groups * (self.tile - 1)

    def floats(self, *shape) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, self.compute_dtype)

    def wides(self, *shape) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, self.wide_dtype)

    def ints(self, *shape) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.dtype(np.int32))


def placement_of(config: Config) -> Placement:
    """The placement that `config.split` describes."""
    split = config.split
    return Placement(
        replicas=split.replicas,
        stages=split.stages,
        attention_workers=split.attention_workers,
        expert_workers=split.expert_workers,
        colocated=split.colocated,
    )


def make_geometry(config: Config, bucket: Bucket | None = None) -> Geometry:
    """Sizes for `bucket`, or for the worst case, which nothing overflows."""
    return Geometry(
        config=config,
        placement=placement_of(config),
        places=ExpertPlaces(config.model.num_experts, config.split.expert_workers),
        bucket=bucket or buckets(config)[-1],
        tile=tile_rows(),
    )


def chunk_bucket(bucket: Bucket, count: int, num_groups: int, tile: int) -> Bucket:
    """The capacities of one of `count` equal chunks of a bucket's rows.

    In the worst case each chunk has as many part-filled tiles as the whole.
    """
    needed = (bucket.sorted_rows + (count - 1) * num_groups * (tile - 1)) / count
    return Bucket(bucket.rows // count, int(_round_up(needed, tile)))


def expected_load(config: Config) -> tuple[float, float]:
    """(rows of a slot, pairs of an expert worker) of a micro-batch if all experts are as likely.

    A pair is a token and one of its experts, shared ones included.
    """
    model, tokens = config.model, config.batch.tokens_per_worker
    num_workers = config.split.expert_workers
    held = ExpertPlaces(model.num_experts, num_workers).per_worker
    # One chance in how many subsets of top_k experts that a token needs none of this worker's.
    missed = math.comb(model.num_experts - held, model.top_k)
    rows = tokens * (1 - missed / math.comb(model.num_experts, model.top_k))
    routed_share = model.top_k * held / model.num_experts
    shared_share = model.num_shared_experts / num_workers
    return rows, placement_of(config).senders * tokens * (routed_share + shared_share)


def buckets(config: Config, tile: int | None = None) -> list[Bucket]:
    """Transport capacities from the expected load to the worst case, each larger than the last.

    tile: rows of a tile of the grouped product; None takes this backend's.
    """
    model, tokens = config.model, config.batch.tokens_per_worker
    held = ExpertPlaces(model.num_experts, config.split.expert_workers).per_worker
    expected_rows, expected_pairs = expected_load(config)
    total_tokens = placement_of(config).senders * tokens
    worst_pairs = total_tokens * (min(model.top_k, held) + model.num_shared_experts)
    groups = held + model.num_shared_experts
    whole = math.lcm(8, config.split.forward_chunks, config.split.backward_chunks)
    tile, found = tile or tile_rows(), []
    for factor in (*sorted(config.split.bucket_factors), math.inf):
        bucket = Bucket(
            rows=int(min(tokens, _round_up(factor * expected_rows, whole))),
            sorted_rows=sorted_rows(
                int(min(worst_pairs, _round_up(factor * expected_pairs, 8))), groups, tile
            ),
        )
        if bucket not in found:
            found.append(bucket)
    return found


def _round_up(value: float, multiple: int) -> float:
    return value if math.isinf(value) else math.ceil(value / multiple) * multiple
