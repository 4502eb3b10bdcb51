"""Phases of the co-located twin: both units of a layer on every worker, an all-to-all between.

The baseline that disaggregation is measured against, and plain training on one device: the same
units, weights and schedule tables, with the exchange among the workers of a group in the middle of
a phase, where the compute waits for it.
"""

import jax
import jax.numpy as jnp

from disag_jax.conditional import update_if
from disag_jax.dispatch import combine, combine_cotangent
from disag_jax.geometry import Geometry
from disag_jax.phases import Entry, Grads, Phases, Stats
from disag_jax.schedule import IDLE, Schedule
from mesh.m2n import StageTransport, exchange_in_group
from mesh.roles import Role


class ColocatedPhases(Phases):
    """What passes between periods is hidden states [T, D], from stage to stage.

    The exchanges stand outside the conditionals: idle workers of a pipeline take part in them.
    """

    # Slot i of a message goes to the i-th worker of the group, whoever sends it.
    sender = 0

    def __init__(self, geometry: Geometry, schedule: Schedule):
        super().__init__(geometry, schedule)
        self.transport = StageTransport(geometry.placement)

    def empty_boxes(self):
        hidden = jnp.zeros((self.geometry.T, self.geometry.D), self.geometry.compute_dtype)
        return hidden, hidden

    def forward(self, inbox, entry: Entry, stash, stats: Stats):
        has_unit = entry.micro_batch != IDLE

        def attention(_, stash, stats):
            with jax.named_scope("attention_forward"):
                h_TD = jnp.where(self._is_first_layer(entry), self._embed(entry), inbox)
                message, stash, stats = self._attention_forward(h_TD, None, entry, stash, stats)
                return self.message.encode(message), stash, stats

        def experts(words, stash, stats):
            with jax.named_scope("expert_forward"):
                message = self.message.decode(words)
                message, stash, stats = self._expert_forward(message, entry, stash, stats)
                return self.message.encode(message), stash, stats

        state = (self.message.zeros(self.geometry.R), stash, stats)
        words, stash, stats = update_if(has_unit, attention, *state)
        words = self._exchange(words, "all_to_all_forward")
        words, stash, stats = update_if(has_unit, experts, words, stash, stats)
        words = self._exchange(words, "all_to_all_forward")
        return combine(self.geometry, self.message.decode(words)), stash, stats

    def backward(self, inbox, entry: Entry, stash, grads: Grads):
        has_unit = entry.micro_batch != IDLE

        def send(_):
            with jax.named_scope("combine"):
                origin = self.pool.read(stash, Role.ATTENTION, entry.slot).dispatch.origin
                origin = origin.reshape(self.geometry.R, self.geometry.C)
                return (self.cotangent.encode(combine_cotangent(self.geometry, inbox, origin)),)

        def experts(words, rows, post_norm):
            with jax.named_scope("expert_backward"):
                dy = self.cotangent.decode(words).x
                cotangent, rows, post_norm = self._expert_backward(
                    dy, entry, stash, rows, post_norm
                )
                return self.cotangent.encode(cotangent), rows, post_norm

        def attention(_, rows, embedding):
            with jax.named_scope("attention_backward"):
                kept = self.pool.read(stash, Role.ATTENTION, entry.slot)
                cotangent = self.cotangent.decode(words)
                return self._attention_backward(cotangent, kept, entry, rows, embedding)

        (words,) = update_if(has_unit, send, self.cotangent.zeros(self.geometry.R))
        words = self._exchange(words, "all_to_all_backward")
        words, rows, post_norm = update_if(has_unit, experts, words, grads.rows, grads.post_norm)
        words = self._exchange(words, "all_to_all_backward")
        dh_TD, rows, embedding = update_if(
            has_unit, attention, jnp.zeros_like(inbox), rows, grads.embedding
        )
        return dh_TD, grads._replace(rows=rows, embedding=embedding, post_norm=post_norm)

    def _exchange(self, words, name: str):
        with jax.named_scope(name):
            return exchange_in_group(words, self.geometry.placement)

    def _finished(self, inbox):
        return inbox

    def _send_back(self, inbox, dh_TD):
        return dh_TD
