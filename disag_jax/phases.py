"""What one worker does in the forward and in the backward phase of a period: what all share.

The units' work on a worker's weights, stash and gradient sums, and the loss. Which units a phase
runs and what passes between them is the placement's: disag_jax/disaggregated.py and
disag_jax/colocated.py.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from disag_jax.batches import Batch
from disag_jax.conditional import update_if
from disag_jax.dispatch import Cotangent, Message, cotangent_template, message_template
from disag_jax.geometry import Geometry
from disag_jax.model import POST_NORM
from disag_jax.schedule import IDLE, Schedule
from disag_jax.shared_loss import SharedLoss
from disag_jax.stash import StashPool
from disag_jax.units import AttentionStash, AttentionUnit, ExpertUnit, RoutingStats
from layers.grouped_matmul import GroupWeights
from layers.head import HeadParams
from mesh.packing import RowLayout
from mesh.placement import Whoami
from mesh.roles import Role
from mesh.wire import WordCodec


class Weights(NamedTuple):
    """What one worker computes with.

    Attributes:
      rows: [v, P], the packed weights of the worker's role; co-located a dict of both roles'.
      post_norm: [v, D], of this stage's layers, on both roles.
      embedding: [V, D].
      head: final norm and head.
      router_bias: [L, E].
    """

    rows: jax.Array | dict[str, jax.Array]
    post_norm: jax.Array
    embedding: jax.Array
    head: HeadParams
    router_bias: jax.Array


class Grads(NamedTuple):
    """Sums of gradients, as `Weights`; post_norm holds the expert units' part only."""

    rows: jax.Array | dict[str, jax.Array]
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


@dataclasses.dataclass(frozen=True)
class Layouts:
    """How the weights of each role lie in a worker's rows.

    Disaggregated, rows are one array [v, P] as wide as the larger role's layout; co-located, a dict
    with an array of each role.

    alignment: P is a multiple of it, so that rows are stacks of experts' matrices too.
    """

    by_role: dict[Role, RowLayout]
    colocated: bool
    alignment: int

    @classmethod
    def of(cls, geometry: Geometry) -> "Layouts":
        units = {Role.ATTENTION: AttentionUnit(geometry), Role.EXPERT: ExpertUnit(geometry)}
        layouts = {role: RowLayout(unit.module.params) for role, unit in units.items()}
        model = geometry.config.model
        return cls(layouts, geometry.placement.colocated, model.d_model * model.expert_width)

    def __getitem__(self, role: Role) -> RowLayout:
        return self.by_role[role]

    def num_columns(self, role: Role) -> int:
        """P, columns of the array that holds the role's rows."""
        layouts = [self.by_role[role]] if self.colocated else self.by_role.values()
        used = max(layout.num_columns for layout in layouts)
        return -(-used // self.alignment) * self.alignment

    @property
    def worker_columns(self) -> int:
        """Columns of all rows of one worker."""
        widths = [self.num_columns(role) for role in Role]
        return sum(widths) if self.colocated else widths[0]

    def read(self, rows, role: Role, layer_row):
        """The parameters of one layer (a traced index) from a worker's rows.

        The experts' weights stay where they are, as `GroupWeights`.
        """
        array, layout = rows[role.label] if self.colocated else rows, self.by_role[role]
        if role is Role.ATTENTION:
            return layout.read(array, layer_row)
        return jax.tree.map(
            lambda leaf, view: GroupWeights(*view, leaf.shape[0]),
            layout.template,
            layout.as_stacks(array, layer_row),
        )

    def add(self, rows, role: Role, layer_row, tree):
        """A worker's rows with a layer's tree added in place."""
        if not self.colocated:
            return self.by_role[role].add(rows, layer_row, tree)
        return rows | {role.label: self.by_role[role].add(rows[role.label], layer_row, tree)}


class Phases:
    """The phases of the executing worker, for one program: static sizes plus traced weights.

    expert_chunks: parts of a micro-batch, each with a stash slot of its own, that the expert unit
      works on one after the other.

    What a placement adds:
      transport: moves what passes from period to period.
      sender: the rank by which an attention unit finds its receivers' slots.
      empty_boxes(): (forward, backward) values of what passes, to start with.
      forward(inbox, outbox, entry, stash, stats): runs this worker's forward work of a period;
        returns (outbox, stash, stats). `outbox` is memory for the result: one that was sent.
      backward(inbox, outbox, entry, stash, grads): the backward work; returns (outbox, grads).
      _finished(inbox): the last hidden states [T, D] in a forward inbox.
      _send_back(inbox, outbox, dh_TD): the backward outbox for their gradient.
    """

    def __init__(self, geometry: Geometry, schedule: Schedule, expert_chunks: int = 1):
        self.geometry = geometry
        self.attention = AttentionUnit(geometry)
        self.expert = ExpertUnit(geometry.in_chunks(expert_chunks))
        self.layouts = Layouts.of(geometry)
        self.shared_loss = SharedLoss(geometry)
        self.message = WordCodec(message_template(geometry), geometry.compute_dtype)
        self.cotangent = WordCodec(cotangent_template(geometry), geometry.compute_dtype)
        templates = {
            Role.ATTENTION: self.attention.stash_template(),
            Role.EXPERT: self.expert.stash_template(),
        }
        attention_slots, expert_slots = schedule.stash_slots
        self.pool = StashPool(
            templates,
            (attention_slots, expert_chunks * expert_slots),
            geometry.compute_dtype,
            geometry.placement.colocated,
            row_words=geometry.config.model.expert_width,
        )
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

    def loss_backward(self, inbox, micro_batch, outbox, grads: Grads, stats: Stats):
        """Adds a due loss to the backward phase: returns (outbox, grads, stats).

        inbox: the forward message of this period; outbox: the backward phase's so far. The owners
        of the loss send its gradient instead; their only backward unit that may share the period
        is layer 0's, whose message nobody reads.
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
            h_TD, labels_T = self._finished(inbox), self.labels_KT[micro_batch]
            share = self.shared_loss.loss(self.weights.head, h_TD, labels_T, self._owns_loss)
            return (nll + share,)

        (nll,) = update_if(micro_batch != IDLE, due, stats.nll)
        return stats._replace(nll=nll)

    def zero_stats(self) -> Stats:
        g, num_rows = self.geometry, self.geometry.config.layers_per_stage
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
        return jax.tree.map(
            lambda w: jnp.zeros(w.shape, self.geometry.wide_dtype),
            Grads(weights.rows, weights.post_norm, weights.embedding, weights.head),
        )

    def _is_first_layer(self, entry: Entry):
        return (entry.layer_row == 0) & (self.me.stage == 0)

    def _embed(self, entry: Entry):
        return self.weights.embedding[self.tokens_KT[entry.micro_batch]]

    def _segments(self, entry: Entry):
        """Document numbers [B, S] of a micro-batch, or None if attention crosses documents."""
        return None if self.segments_KBS is None else self.segments_KBS[entry.micro_batch]

    def _attention_forward(self, h_TD, origin, entry: Entry, stash, stats: Stats):
        """Returns (Message, stash, stats); origin: of the message that h came from."""
        g, weights = self.geometry, self.weights
        params = self.layouts.read(weights.rows, Role.ATTENTION, entry.layer_row)
        bias_E = weights.router_bias[entry.layer_row * g.placement.stages + self.me.stage]
        message, kept, routing = self.attention.forward(
            params, bias_E, h_TD, origin, self.sender, self._segments(entry)
        )
        if self.keeps_stash:
            stash = self.pool.write(stash, Role.ATTENTION, entry.slot, kept)
        return message, stash, _add_routing(stats, entry, routing)

    def _expert_forward(self, message: Message, entry: Entry, stash, stats: Stats):
        """Returns (Message, stash, stats)."""
        params = self._expert_params(entry)
        received, needed = self.expert.receive(message)
        if self.keeps_stash:
            kept = self.expert.keep(params, received)
            stash = self.pool.write(stash, Role.EXPERT, entry.slot, kept)
            # The products are made where they are kept: the unit goes on with these.
            kept = self.pool.read(stash, Role.EXPERT, entry.slot)
            received = received._replace(products=kept.products)
        message = self.expert.finish(params, message, received)
        return message, stash, add_sorted(stats, self.expert, needed)

    def _attention_backward(
        self, cotangent: Cotangent, kept: AttentionStash, entry: Entry, rows, embedding
    ):
        """Returns (dh [T, D], rows, embedding), the gradient sums with this unit's added."""
        params = self.layouts.read(self.weights.rows, Role.ATTENTION, entry.layer_row)
        dparams, dh_TD = self.attention.backward(
            params, kept, cotangent, self.sender, self.aux_scales, self._segments(entry)
        )
        with jax.named_scope("add_gradients"):
            rows = self.layouts.add(rows, Role.ATTENTION, entry.layer_row, dparams)
            embedding = self._add_embedding(embedding, entry, dh_TD)
        return dh_TD, rows, embedding

    def _add_embedding(self, embedding, entry: Entry, dh_TD):
        tokens_T = self.tokens_KT[entry.micro_batch]

        def add(sums):
            return (sums.at[tokens_T].add(dh_TD.astype(sums.dtype)),)

        return update_if(self._is_first_layer(entry), add, embedding)[0]

    def _expert_backward(self, dy, entry: Entry, stash, rows, post_norm):
        """Returns (Cotangent, rows, post_norm), the gradient sums with this unit's added."""
        kept = self.pool.read(stash, Role.EXPERT, entry.slot)
        dparams, cotangent = self.expert.backward(self._expert_params(entry), kept, dy)
        dnorm_D = dparams.pop(POST_NORM)["scale"].astype(post_norm.dtype)
        with jax.named_scope("add_gradients"):
            rows = self.layouts.add(rows, Role.EXPERT, entry.layer_row, dparams)
            post_norm = post_norm.at[entry.layer_row].add(dnorm_D)
        return cotangent, rows, post_norm

    def _expert_params(self, entry: Entry):
        params = self.layouts.read(self.weights.rows, Role.EXPERT, entry.layer_row)
        return {**params, POST_NORM: {"scale": self.weights.post_norm[entry.layer_row]}}

    def _loss_backward(self, inbox, micro_batch, outbox, head, nll):
        share, dh_TD, head = self.shared_loss.loss_and_backward(
            self.weights.head,
            self._finished(inbox),
            self.labels_KT[micro_batch],
            self._owns_loss,
            self.loss_scale,
            head,
        )
        (outbox,) = update_if(
            self._owns_loss, lambda outbox: (self._send_back(inbox, outbox, dh_TD),), outbox
        )
        return outbox, head, nll + share

    @property
    def _owns_loss(self):
        return self.me.plays[Role.ATTENTION] & (self.me.stage == self.shared_loss.owner_stage)


def add_sorted(stats: Stats, unit: ExpertUnit, needed) -> Stats:
    """The stats with the sorted rows that `unit` needed, in rows of the whole micro-batch."""
    needed = unit.geometry.whole_sorted_rows(needed)
    return stats._replace(sorted_needed=jnp.maximum(stats.sorted_needed, needed))


def _add_routing(stats: Stats, entry: Entry, routing: RoutingStats) -> Stats:
    total, row = stats.routing, entry.layer_row
    sums = {
        name: getattr(total, name).at[row].add(getattr(routing, name))
        for name in ("counts", "dropped", "balance_loss", "z_loss")
    }
    needed = jnp.maximum(total.rows_needed, routing.rows_needed)
    return stats._replace(routing=RoutingStats(**sums, rows_needed=needed))
