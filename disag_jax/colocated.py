"""Phases of the co-located twin: both units of a layer on every worker, an all-to-all between.

The baseline that disaggregation is measured against, and plain training on one device: the same
units, weights and schedule tables, with the exchange among the workers of a group in the middle of
a phase. `split.overlap` says what is computed meanwhile: nothing, or the experts' work on other
chunks of the same micro-batch ("FSMoE", arXiv 2501.10714; one chunk is the whole).
"""

import jax
import jax.numpy as jnp
from jax import lax

from disag_jax.chunks import Chunks
from disag_jax.conditional import update_if
from disag_jax.dispatch import (
    combine,
    combine_cotangent,
    cotangent_template,
    message_template,
)
from disag_jax.geometry import Geometry
from disag_jax.phases import Entry, Grads, Phases, Stats, add_sorted
from disag_jax.reduction import attention_row, sum_over_stage
from disag_jax.schedule import IDLE, Schedule
from disag_jax.units import ExpertUnit
from mesh.m2n import StageTransport, exchange_in_group
from mesh.roles import Role


class ColocatedPhases(Phases):
    """What passes between periods is hidden states [T, D], from stage to stage.

    A phase is pieces of compute with exchanges between them. Each piece is a conditional that does
    nothing on an idle worker; the exchanges stand outside, and idle workers take part in them.
    """

    # Slot i of a message goes to the i-th worker of the group, whoever sends it.
    sender = 0

    def __init__(self, geometry: Geometry, schedule: Schedule):
        split = geometry.config.split
        super().__init__(geometry, schedule, expert_chunks=split.backward_chunks)
        self.transport = StageTransport(geometry.placement)
        self.messages = Chunks(geometry, message_template, split.forward_chunks)
        self.cotangents = Chunks(geometry, cotangent_template, split.backward_chunks)
        # The unit of the forward phase, where its chunks are not those of the backward phase.
        self.regroups = split.forward_chunks != split.backward_chunks
        self.forward_expert = ExpertUnit(geometry.in_chunks(split.forward_chunks))

    def empty_boxes(self):
        hidden = jnp.zeros((self.geometry.T, self.geometry.D), self.geometry.compute_dtype)
        return hidden, hidden

    def forward(self, inbox, outbox, entry: Entry, stash, stats: Stats):
        del outbox
        chunks, stash, stats = self._attend(inbox, entry, stash, stats)

        def experts(chunk, words, stash, stats):
            return self._apply_experts(chunk, words, entry, stash, stats)

        arrived, finished, (stash, stats) = self._through_experts(
            chunks, experts, (stash, stats), "all_to_all_forward"
        )
        if self.regroups and self.keeps_stash:
            stash, stats = self._regroup(arrived, entry, stash, stats)
        return self._combine(finished), stash, stats

    def backward(self, inbox, outbox, entry: Entry, stash, grads: Grads):
        del outbox
        words, grads = self._back_through_experts(inbox, entry, stash, grads)
        return self._attend_back(words, entry, stash, grads)

    def cool_down(self, inbox, outbox, entry: Entry, stash, grads: Grads):
        """As `backward`, on the only stage and with no forward phase beside it.

        In the last micro-batch, the attention gradients of the layer above, complete since the
        period before, are summed over the workers under this layer's attention, where the link is
        idle.
        """
        del outbox
        config = self.geometry.config
        words, grads = self._back_through_experts(inbox, entry, stash, grads)
        above = entry.layer_row + 1
        is_complete = (entry.micro_batch == config.batch.micro_batches - 1) & (
            above < config.layers_per_stage
        )
        above = jnp.where(is_complete, above, 0)
        complete_P = attention_row(self.layouts, grads, above)
        words, complete_P = lax.optimization_barrier((words, complete_P))
        with jax.named_scope("reduce_gradients"):
            sum_P = sum_over_stage(self.geometry, complete_P)
        dh_TD, grads = self._attend_back(words, entry, stash, grads)
        dh_TD, sum_P = lax.optimization_barrier((dh_TD, sum_P))
        rows = grads.rows[Role.ATTENTION.label]
        rows = rows.at[above].set(jnp.where(is_complete, sum_P, rows[above]))
        return dh_TD, grads._replace(rows=grads.rows | {Role.ATTENTION.label: rows})

    def _back_through_experts(self, inbox, entry: Entry, stash, grads: Grads):
        """Returns (words of the gradients that came back to attention, grads)."""
        chunks = self._return_to_experts(inbox, entry, stash)

        def experts(chunk, words, grads):
            return self._apply_experts_back(chunk, words, entry, stash, grads)

        _, words, (grads,) = self._through_experts(chunks, experts, (grads,), "all_to_all_backward")
        return words, grads

    def _through_experts(self, chunks: list, experts, state: tuple, scope: str):
        """Exchanges words, works on what arrives and exchanges what that makes, chunk by chunk.

            under way   d0    d1    d2 c0    c1    c2      (3 chunks: d dispatched, c combined)
            computed             e0       e1    e2

        experts: function of (a chunk's number, its words, *state) that returns (words, *state).
        Returns (the words that arrived at the experts, those that came back, state).
        """
        arrived, finished, made = [self._exchange(chunks[0], scope)], [], []
        for chunk in range(len(chunks)):
            dispatched = chunks[chunk + 1 : chunk + 2]
            received = self._exchange_together([*dispatched, *made], scope)
            words, *state = experts(chunk, arrived[chunk], *state)
            if received:
                # One exchange after the other, one beside each chunk's work.
                words, received = lax.optimization_barrier((words, received))
            arrived += received[: len(dispatched)]
            finished += received[len(dispatched) :]
            made = [words]
        finished.append(self._exchange(made[0], scope))
        if len(chunks) > 1:
            # Else XLA lets the last two exchanges run on, in the time of those of the next phase.
            finished, state = lax.optimization_barrier((finished, state))
        return arrived, finished, state

    def _attend(self, inbox, entry: Entry, stash, stats: Stats):
        """Attention and routing: returns (words of the chunks to the experts, stash, stats)."""

        def attention(_, stash, stats):
            with jax.named_scope("attention_forward"):
                h_TD = jnp.where(self._is_first_layer(entry), self._embed(entry), inbox)
                message, stash, stats = self._attention_forward(h_TD, None, entry, stash, stats)
                return self.messages.encode(message), stash, stats

        return update_if(_has_unit(entry), attention, self.messages.zeros(), stash, stats)

    def _apply_experts(self, chunk: int, words, entry: Entry, stash, stats: Stats):
        """Returns (words of the chunk's finished rows, stash, stats)."""

        def experts(words, stash, stats):
            with jax.named_scope("expert_forward"):
                message = self.messages.codec.decode(words)
                if self.regroups:
                    params = self._expert_params(entry)
                    message, _, needed = self.forward_expert.forward(params, message)
                    stats = add_sorted(stats, self.forward_expert, needed)
                else:
                    message, stash, stats = self._expert_forward(
                        message, self._part(entry, chunk), stash, stats
                    )
                return self.messages.codec.encode(message), stash, stats

        return update_if(_has_unit(entry), experts, words, stash, stats)

    def _regroup(self, arrived: list, entry: Entry, stash, stats: Stats):
        """Stashes the rows that arrived at the experts in the chunks of the backward phase."""

        def keep(stash, stats):
            with jax.named_scope("regroup"):
                chunks = self.cotangents.cut(self.messages.decode(arrived))
                for chunk, message in enumerate(chunks):
                    kept, needed = self.expert.receive(message)
                    slot = self._part(entry, chunk).slot
                    stash = self.pool.write(stash, Role.EXPERT, slot, kept)
                    stats = add_sorted(stats, self.expert, needed)
                return stash, stats

        return update_if(_has_unit(entry), keep, stash, stats)

    def _combine(self, words: list):
        return combine(self.geometry, self.messages.decode(words))

    def _return_to_experts(self, inbox, entry: Entry, stash):
        """The words of the finished rows' gradients, from that of the hidden states `inbox`."""

        def send(_):
            with jax.named_scope("combine"):
                origin = self.pool.read(stash, Role.ATTENTION, entry.slot).dispatch.origin
                origin = origin.reshape(self.geometry.R, self.geometry.C)
                cotangent = combine_cotangent(self.geometry, inbox, origin)
                return (self.cotangents.encode(cotangent),)

        (words,) = update_if(_has_unit(entry), send, self.cotangents.zeros())
        return words

    def _apply_experts_back(self, chunk: int, words, entry: Entry, stash, grads: Grads):
        """Returns (words of the gradients of the chunk's rows, grads)."""

        def experts(words, rows, post_norm):
            with jax.named_scope("expert_backward"):
                dy = self.cotangents.codec.decode(words).x
                cotangent, rows, post_norm = self._expert_backward(
                    dy, self._part(entry, chunk), stash, rows, post_norm
                )
                return self.cotangents.codec.encode(cotangent), rows, post_norm

        words, rows, post_norm = update_if(
            _has_unit(entry), experts, words, grads.rows, grads.post_norm
        )
        return words, grads._replace(rows=rows, post_norm=post_norm)

    def _attend_back(self, words: list, entry: Entry, stash, grads: Grads):
        """Returns (gradient [T, D] of the layer's input, grads)."""

        def attention(_, rows, embedding):
            with jax.named_scope("attention_backward"):
                kept = self.pool.read(stash, Role.ATTENTION, entry.slot)
                cotangent = self.cotangents.decode(words)
                return self._attention_backward(cotangent, kept, entry, rows, embedding)

        _, dh_TD = self.empty_boxes()
        dh_TD, rows, embedding = update_if(
            _has_unit(entry), attention, dh_TD, grads.rows, grads.embedding
        )
        return dh_TD, grads._replace(rows=rows, embedding=embedding)

    def _part(self, entry: Entry, chunk: int) -> Entry:
        """The entry with a backward chunk's own slot of the experts' stash."""
        count = self.cotangents.count
        return entry if count == 1 else entry._replace(slot=count * entry.slot + chunk)

    def _exchange(self, words, scope: str):
        with jax.named_scope(scope):
            return exchange_in_group(words, self.geometry.placement)

    def _exchange_all(self, chunks: list, scope: str) -> list:
        return [self._exchange(words, scope) for words in chunks]

    def _exchange_together(self, chunks: list, scope: str) -> list:
        """Exchanges the words [R, ...] of some chunks in one all-to-all.

        Two beside the same work would need XLA's scheduler to keep two in flight, which by default
        it does not.
        """
        if len(chunks) < 2:
            return self._exchange_all(chunks, scope)
        return jnp.split(
            self._exchange(jnp.concatenate(chunks, axis=1), scope), len(chunks), axis=1
        )

    def _finished(self, inbox):
        return inbox

    def _send_back(self, inbox, outbox, dh_TD):
        return dh_TD


def _has_unit(entry: Entry):
    return entry.micro_batch != IDLE
