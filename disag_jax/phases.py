"""What one worker does in the forward and in the backward phase of a period.

A phase runs the unit of the worker's role, or none. No transfer happens in a phase: messages come
in and go out as words (mesh/wire.py) and the loop moves them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from disag_jax.batches import Batch
from disag_jax.conditional import update_if
from disag_jax.dispatch import combine, combine_cotangent, cotangent_template, message_template
from disag_jax.geometry import Geometry
from disag_jax.model import POST_NORM
from disag_jax.schedule import IDLE, Schedule
from disag_jax.shared_loss import SharedLoss
from disag_jax.stash import StashPool
from disag_jax.units import AttentionUnit, ExpertUnit, RoutingStats
from layers.head import HeadParams
from mesh.m2n import pick_slots, place_slots
from mesh.packing import RowLayout
from mesh.placement import Whoami
from mesh.roles import Role
from mesh.wire import WordCodec


class Weights(NamedTuple):
    """What one worker computes with.

    Attributes:
      rows: [v, P], the packed weights of the worker's role.
      post_norm: [v, D], of this stage's layers, on both roles.
      embedding: [V, D].
      head: final norm and head.
      router_bias: [L, E].
    """

    rows: jax.Array
    post_norm: jax.Array
    embedding: jax.Array
    head: HeadParams
    router_bias: jax.Array


class Grads(NamedTuple):
    """Sums of gradients, as `Weights`; post_norm holds the expert units' part only."""

    rows: jax.Array
    post_norm: jax.Array
    embedding: jax.Array
    head: HeadParams


class Stats(NamedTuple):
    """Sums over the step on one worker: nll, and RoutingStats with a leading dim v.

    The needs are largest values: rows of a slot (in `routing`), sorted rows.
    """

    nll: jax.Array
    routing: RoutingStats
    sorted_needed: jax.Array


class Entry(NamedTuple):
    """One worker's unit in a period, traced: a row of the schedule table."""

    micro_batch: jax.Array
    layer_row: jax.Array
    slot: jax.Array


class Layouts(NamedTuple):
    """How the weights of each role lie in a worker's rows; num_columns is P, for both."""

    attention: RowLayout
    expert: RowLayout
    num_columns: int

    @classmethod
    def of(cls, geometry: Geometry) -> "Layouts":
        attention = RowLayout(AttentionUnit(geometry).module.params)
        expert = RowLayout(ExpertUnit(geometry).module.params)
        return cls(attention, expert, max(attention.num_columns, expert.num_columns))


class Phases:
    """The phases of the executing worker, for one program: static sizes plus traced weights."""

    def __init__(self, geometry: Geometry, schedule: Schedule):
        self.geometry = geometry
        self.attention, self.expert = AttentionUnit(geometry), ExpertUnit(geometry)
        self.layouts = Layouts.of(geometry)
        self.shared_loss = SharedLoss(geometry)
        self.message = WordCodec(message_template(geometry), geometry.compute_dtype)
        self.cotangent = WordCodec(cotangent_template(geometry), geometry.compute_dtype)
        templates = {
            Role.ATTENTION: self.attention.stash_template(),
            Role.EXPERT: self.expert.stash_template(),
        }
        self.pool = StashPool(templates, schedule.stash_slots, geometry.compute_dtype)
        self.keeps_stash = max(schedule.stash_slots) > 0

    def bind(self, weights: Weights, batch: Batch, aux_scales, loss_scale) -> "Phases":
        """Sets the traced values of this step; batch: [K, B, S], this worker's sequences."""
        self.me = Whoami.of(self.geometry.placement)
        self.weights = weights
        num_micro_batches = batch.tokens.shape[0]
        self.tokens_KT = batch.tokens.reshape(num_micro_batches, -1)
        self.labels_KT = batch.labels.reshape(num_micro_batches, -1)
        self.segments_KBS = batch.segments
        self.aux_scales, self.loss_scale = aux_scales, loss_scale
        return self

    def forward(self, inbox, entry: Entry, stash, stats: Stats):
        """Runs this worker's forward unit: returns (outbox, stash, stats)."""

        def attention(_, stash, stats):
            with jax.named_scope("attention_forward"):
                return self._attention_forward(inbox, entry, stash, stats)

        def experts(_, stash, stats):
            with jax.named_scope("expert_forward"):
                return self._expert_forward(inbox, entry, stash, stats)

        state = (jnp.zeros_like(inbox), stash, stats)
        state = update_if(self._plays(entry, Role.ATTENTION), attention, *state)
        return update_if(self._plays(entry, Role.EXPERT), experts, *state)

    def backward(self, inbox, entry: Entry, stash, grads: Grads):
        """Runs this worker's backward unit: returns (outbox, grads)."""

        def attention(_, rows, embedding):
            with jax.named_scope("attention_backward"):
                return self._attention_backward(inbox, entry, stash, rows, embedding)

        def experts(_, rows, post_norm):
            with jax.named_scope("expert_backward"):
                return self._expert_backward(inbox, entry, stash, rows, post_norm)

        outbox, rows, embedding = update_if(
            self._plays(entry, Role.ATTENTION),
            attention,
            jnp.zeros_like(inbox),
            grads.rows,
            grads.embedding,
        )
        outbox, rows, post_norm = update_if(
            self._plays(entry, Role.EXPERT), experts, outbox, rows, grads.post_norm
        )
        return outbox, grads._replace(rows=rows, embedding=embedding, post_norm=post_norm)

    def loss_backward(self, inbox, micro_batch, outbox, grads: Grads, stats: Stats):
        """Adds a due loss to the backward phase: returns (outbox, grads, stats).

        inbox: the forward message of this period; outbox: the backward phase's so far. The owners
        of the loss send its gradient instead; their only backward unit that may share the period
        is layer 0's, which sends nothing.
        """

        def due(outbox, head, nll):
            with jax.named_scope("loss"):
                return self._loss_backward(inbox, micro_batch, outbox, head, nll)

        outbox, head, nll = update_if(micro_batch != IDLE, due, outbox, grads.head, stats.nll)
        return outbox, grads._replace(head=head), stats._replace(nll=nll)

    def loss_forward(self, inbox, micro_batch, stats: Stats) -> Stats:
        """Adds a due loss to the stats, without gradients."""

        @jax.named_scope("loss")
        def due(nll):
            h_TD = combine(self.geometry, self.message.decode(inbox))
            labels_T = self.labels_KT[micro_batch]
            return (nll + self.shared_loss.loss(self.weights.head, h_TD, labels_T),)

        (nll,) = update_if(micro_batch != IDLE, due, stats.nll)
        return stats._replace(nll=nll)

    def zero_stats(self) -> Stats:
        g, num_rows = self.geometry, self.weights.rows.shape[0]
        zero, zeros = jnp.zeros((), g.wide_dtype), jnp.zeros((num_rows,), g.wide_dtype)
        count = jnp.zeros((), jnp.int32)
        routing = RoutingStats(
            counts=jnp.zeros((num_rows, g.E), jnp.int32),
            dropped=jnp.zeros((num_rows,), jnp.int32),
            balance_loss=zeros,
            z_loss=zeros,
            rows_needed=count,
        )
        return Stats(nll=zero, routing=routing, sorted_needed=count)

    def zero_grads(self) -> Grads:
        weights = self.weights
        zeros = lambda w: jnp.zeros(w.shape, self.geometry.wide_dtype)  # noqa: E731
        return Grads(
            rows=zeros(weights.rows),
            post_norm=zeros(weights.post_norm),
            embedding=zeros(weights.embedding),
            head=jax.tree.map(zeros, weights.head),
        )

    def _plays(self, entry: Entry, role: Role):
        """Whether this worker has a unit of `role` to run."""
        in_role = self.me.is_attention if role is Role.ATTENTION else ~self.me.is_attention
        return (entry.micro_batch != IDLE) & in_role

    def _is_first_layer(self, entry: Entry):
        return (entry.layer_row == 0) & (self.me.stage == 0)

    def _segments(self, entry: Entry):
        """Document numbers [B, S] of a micro-batch, or None if attention crosses documents."""
        return None if self.segments_KBS is None else self.segments_KBS[entry.micro_batch]

    def _attention_forward(self, inbox, entry, stash, stats):
        g, weights = self.geometry, self.weights
        message = self.message.decode(inbox)
        is_first = self._is_first_layer(entry)
        embedded_TD = weights.embedding[self.tokens_KT[entry.micro_batch]]
        h_TD = jnp.where(is_first, embedded_TD, combine(g, message))
        # The first layer's input came from no message: its backward unit sends nothing.
        origin = jnp.where(is_first, 0, message.origin)
        params = self.layouts.attention.read(weights.rows, entry.layer_row)
        bias_E = weights.router_bias[entry.layer_row * g.placement.stages + self.me.stage]
        message, kept, routing = self.attention.forward(
            params, bias_E, h_TD, origin, self.me.rank, self._segments(entry)
        )
        if self.keeps_stash:
            stash = self.pool.write(stash, Role.ATTENTION, entry.slot, kept)
        return self.message.encode(message), stash, _add_routing(stats, entry, routing)

    def _expert_forward(self, inbox, entry, stash, stats):
        g = self.geometry
        message = self.message.decode(pick_slots(inbox, self.me.rank, g.M))
        message, kept, needed = self.expert.forward(self._expert_params(entry), message)
        if self.keeps_stash:
            stash = self.pool.write(stash, Role.EXPERT, entry.slot, kept)
        outbox = place_slots(self.message.encode(message), self.me.rank, g.R)
        stats = stats._replace(sorted_needed=jnp.maximum(stats.sorted_needed, needed))
        return outbox, stash, stats

    def _attention_backward(self, inbox, entry, stash, rows, embedding):
        kept = self.pool.read(stash, Role.ATTENTION, entry.slot)
        params = self.layouts.attention.read(self.weights.rows, entry.layer_row)
        dparams, dh_TD = self.attention.backward(
            params,
            kept,
            self.cotangent.decode(inbox),
            self.me.rank,
            self.aux_scales,
            self._segments(entry),
        )
        with jax.named_scope("add_gradients"):
            rows = self.layouts.attention.add(rows, entry.layer_row, dparams)
            embedding = self._add_embedding(embedding, entry, dh_TD)
        outbox = self.cotangent.encode(combine_cotangent(self.geometry, dh_TD, kept.origin))
        return outbox, rows, embedding

    def _add_embedding(self, embedding, entry, dh_TD):
        tokens_T = self.tokens_KT[entry.micro_batch]

        def add(sums):
            return (sums.at[tokens_T].add(dh_TD.astype(sums.dtype)),)

        return update_if(self._is_first_layer(entry), add, embedding)[0]

    def _expert_backward(self, inbox, entry, stash, rows, post_norm):
        g = self.geometry
        kept = self.pool.read(stash, Role.EXPERT, entry.slot)
        dy = self.cotangent.decode(pick_slots(inbox, self.me.rank, g.M)).x
        dparams, cotangent = self.expert.backward(self._expert_params(entry), kept, dy)
        dnorm_D = dparams.pop(POST_NORM)["scale"].astype(post_norm.dtype)
        with jax.named_scope("add_gradients"):
            rows = self.layouts.expert.add(rows, entry.layer_row, dparams)
            post_norm = post_norm.at[entry.layer_row].add(dnorm_D)
        outbox = place_slots(self.cotangent.encode(cotangent), self.me.rank, g.R)
        return outbox, rows, post_norm

    def _expert_params(self, entry):
        params = self.layouts.expert.read(self.weights.rows, entry.layer_row)
        return {**params, POST_NORM: {"scale": self.weights.post_norm[entry.layer_row]}}

    def _loss_backward(self, inbox, micro_batch, outbox, head, nll):
        g = self.geometry
        message = self.message.decode(inbox)
        share, dh_TD, head = self.shared_loss.loss_and_backward(
            self.weights.head,
            combine(g, message),
            self.labels_KT[micro_batch],
            self.loss_scale,
            head,
        )
        sent = self.cotangent.encode(combine_cotangent(g, dh_TD, message.origin))
        is_owner = self.me.is_attention & (self.me.stage == self.shared_loss.owner_stage)
        return jnp.where(is_owner, sent, outbox), head, nll + share


def _add_routing(stats: Stats, entry: Entry, routing: RoutingStats) -> Stats:
    total, row = stats.routing, entry.layer_row
    sums = {
        name: getattr(total, name).at[row].add(getattr(routing, name))
        for name in ("counts", "dropped", "balance_loss", "z_loss")
    }
    needed = jnp.maximum(total.rows_needed, routing.rows_needed)
    return stats._replace(routing=RoutingStats(**sums, rows_needed=needed))
