"""Phases of the co-located twin: both units of a layer on every worker, an all-to-all between.

The baseline that disaggregation is measured against, and plain training on one device: the same
units, weights and schedule tables, with the exchange among the workers of a group in the middle of
a phase. Here the compute waits for it; disag_jax/chunked.py and disag_jax/interleaved.py hide it.
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

    A phase is pieces of compute with exchanges between them. Each piece is a conditional that does
    nothing on an idle worker; the exchanges stand outside, and idle workers take part in them.
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
        words, stash, stats = self._attend(inbox, entry, stash, stats)
        words = self._exchange(words, "all_to_all_forward")
        words, stash, stats = self._apply_experts(words, entry, stash, stats)
        words = self._exchange(words, "all_to_all_forward")
        return self._combine(words), stash, stats

    def backward(self, inbox, entry: Entry, stash, grads: Grads):
        words = self._return_to_experts(inbox, entry, stash)
        words = self._exchange(words, "all_to_all_backward")
        words, grads = self._apply_experts_back(words, entry, stash, grads)
        words = self._exchange(words, "all_to_all_backward")
        return self._attend_back(words, entry, stash, grads)

    def _attend(self, inbox, entry: Entry, stash, stats: Stats):
        """Attention and routing: returns (words of the message to the experts, stash, stats)."""

        def attention(_, stash, stats):
            with jax.named_scope("attention_forward"):
                h_TD = jnp.where(self._is_first_layer(entry), self._embed(entry), inbox)
                message, stash, stats = self._attention_forward(h_TD, None, entry, stash, stats)
                return self.message.encode(message), stash, stats

        empty = self.message.zeros(self.geometry.R)
        return update_if(_has_unit(entry), attention, empty, stash, stats)

    def _apply_experts(self, words, entry: Entry, stash, stats: Stats):
        """Returns (words of the finished rows, stash, stats)."""

        def experts(words, stash, stats):
            with jax.named_scope("expert_forward"):
                message = self.message.decode(words)
                message, stash, stats = self._expert_forward(message, entry, stash, stats)
                return self.message.encode(message), stash, stats

        return update_if(_has_unit(entry), experts, words, stash, stats)

    def _combine(self, words):
        return combine(self.geometry, self.message.decode(words))

    def _return_to_experts(self, inbox, entry: Entry, stash):
        """The words of the finished rows' gradients, from that of the hidden states `inbox`."""

        def send(_):
            with jax.named_scope("combine"):
                origin = self.pool.read(stash, Role.ATTENTION, entry.slot).dispatch.origin
                origin = origin.reshape(self.geometry.R, self.geometry.C)
                return (self.cotangent.encode(combine_cotangent(self.geometry, inbox, origin)),)

        (words,) = update_if(_has_unit(entry), send, self.cotangent.zeros(self.geometry.R))
        return words

    def _apply_experts_back(self, words, entry: Entry, stash, grads: Grads):
        """Returns (words of the sent rows' gradients, grads)."""

        def experts(words, rows, post_norm):
            with jax.named_scope("expert_backward"):
                dy = self.cotangent.decode(words).x
                cotangent, rows, post_norm = self._expert_backward(
                    dy, entry, stash, rows, post_norm
                )
                return self.cotangent.encode(cotangent), rows, post_norm

        words, rows, post_norm = update_if(
            _has_unit(entry), experts, words, grads.rows, grads.post_norm
        )
        return words, grads._replace(rows=rows, post_norm=post_norm)

    def _attend_back(self, words, entry: Entry, stash, grads: Grads):
        """Returns (gradient [T, D] of the layer's input, grads)."""

        def attention(_, rows, embedding):
            with jax.named_scope("attention_backward"):
                kept = self.pool.read(stash, Role.ATTENTION, entry.slot)
                cotangent = self.cotangent.decode(words)
                return self._attention_backward(cotangent, kept, entry, rows, embedding)

        _, dh_TD = self.empty_boxes()
        dh_TD, rows, embedding = update_if(
            _has_unit(entry), attention, dh_TD, grads.rows, grads.embedding
        )
        return dh_TD, grads._replace(rows=rows, embedding=embedding)

    def _exchange(self, words, name: str):
        with jax.named_scope(name):
            return exchange_in_group(words, self.geometry.placement)

    def _finished(self, inbox):
        return inbox

    def _send_back(self, inbox, dh_TD):
        return dh_TD


def _has_unit(entry: Entry):
    return entry.micro_batch != IDLE
