"""Phases of a disaggregated worker: the unit of its role, or none.

No transfer happens in a phase: messages come in and go out as words (mesh/wire.py) and the loop
moves them.
"""

import jax
import jax.numpy as jnp

from disag_jax.conditional import update_if
from disag_jax.dispatch import combine, combine_cotangent
from disag_jax.geometry import Geometry
from disag_jax.phases import Entry, Grads, Phases, Stats
from disag_jax.schedule import IDLE, Schedule
from mesh.m2n import RingTransport, pick_slots, picked_slots
from mesh.roles import Role


class DisaggregatedPhases(Phases):
    """What passes between periods is a box: the words [R, ...] of a message's slots.

    A unit writes its message over the last one in the outbox. Where a worker has no unit, its
    outbox goes out as it is, and nobody reads it.
    """

    def __init__(self, geometry: Geometry, schedule: Schedule):
        super().__init__(geometry, schedule)
        self.transport = RingTransport(geometry.placement)

    @property
    def sender(self):
        """The rank by which an attention worker finds its slots."""
        return self.me.rank[Role.ATTENTION]

    def empty_boxes(self):
        rounds = self.geometry.R
        return self.message.zeros(rounds), self.cotangent.zeros(rounds)

    def forward(self, inbox, outbox, entry: Entry, stash, stats: Stats):
        def attention(*state):
            with jax.named_scope("attention_forward"):
                return self._attention(inbox, entry, *state)

        def experts(*state):
            with jax.named_scope("expert_forward"):
                return self._experts(inbox, entry, *state)

        state = update_if(self._plays(entry, Role.EXPERT), experts, outbox, stash, stats)
        return update_if(self._plays(entry, Role.ATTENTION), attention, *state)

    def backward(self, inbox, outbox, entry: Entry, stash, grads: Grads):
        def attention(*state):
            with jax.named_scope("attention_backward"):
                return self._attention_back(inbox, entry, stash, *state)

        def experts(*state):
            with jax.named_scope("expert_backward"):
                return self._experts_back(inbox, entry, stash, *state)

        outbox, rows, post_norm = update_if(
            self._plays(entry, Role.EXPERT), experts, outbox, grads.rows, grads.post_norm
        )
        outbox, rows, embedding = update_if(
            self._plays(entry, Role.ATTENTION), attention, outbox, rows, grads.embedding
        )
        return outbox, grads._replace(rows=rows, embedding=embedding, post_norm=post_norm)

    def _plays(self, entry: Entry, role: Role):
        """Whether this worker has a unit of `role` to run."""
        return (entry.micro_batch != IDLE) & self.me.plays[role]

    def _attention(self, inbox, entry, outbox, stash, stats):
        message = self.message.decode(inbox)
        is_first = self._is_first_layer(entry)
        h_TD = jnp.where(is_first, self._embed(entry), combine(self.geometry, message))
        # The first layer's input came from no message: nobody reads what its backward unit sends.
        origin = jnp.where(is_first, 0, message.origin)
        message, stash, stats = self._attention_forward(h_TD, origin, entry, stash, stats)
        return self.message.write(outbox, message), stash, stats

    def _experts(self, inbox, entry, outbox, stash, stats):
        message = self.message.decode(self._from_attention(inbox))
        message, stash, stats = self._expert_forward(message, entry, stash, stats)
        return self.message.write(outbox, message, self._slots()), stash, stats

    def _attention_back(self, inbox, entry, stash, outbox, rows, embedding):
        kept = self.pool.read(stash, Role.ATTENTION, entry.slot)
        cotangent = self.cotangent.decode(inbox)
        dh_TD, rows, embedding = self._attention_backward(cotangent, kept, entry, rows, embedding)
        cotangent = combine_cotangent(self.geometry, dh_TD, kept.origin)
        return self.cotangent.write(outbox, cotangent), rows, embedding

    def _experts_back(self, inbox, entry, stash, outbox, rows, post_norm):
        dy = self.cotangent.decode(self._from_attention(inbox)).x
        cotangent, rows, post_norm = self._expert_backward(dy, entry, stash, rows, post_norm)
        return self.cotangent.write(outbox, cotangent, self._slots()), rows, post_norm

    def _from_attention(self, inbox):
        """An expert worker's slots of a box that have a sender."""
        return pick_slots(inbox, self.me.rank[Role.EXPERT], self.geometry.M)

    def _slots(self):
        """Where those lie in a box."""
        return picked_slots(self.me.rank[Role.EXPERT], self.geometry.M, self.geometry.R)

    def _finished(self, inbox):
        return combine(self.geometry, self.message.decode(inbox))

    def _send_back(self, inbox, outbox, dh_TD):
        origin = self.message.decode(inbox).origin
        return self.cotangent.write(outbox, combine_cotangent(self.geometry, dh_TD, origin))
