"""Phases of the twin that interleaves: one micro-batch's all-to-all under another's compute."""

from jax import lax

from disag_jax.colocated import ColocatedPhases
from disag_jax.phases import Entry, Grads, Stats


class InterleavedPhases(ColocatedPhases):
    """Runs the two phases of a period together, cut at their exchanges.

    The forward phase of one micro-batch and the backward phase of another need nothing of each
    other. Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", section 3.2.1 (DualPipe).
    """

    def forward_and_backward(
        self, inbox_f, inbox_b, forward: Entry, backward: Entry, stash, stats: Stats, grads: Grads
    ):
        """Returns (outbox_f, outbox_b, stash, stats, grads) of a forward and a backward unit.

            under way   rows' gradients       rows             rows' gradients       rows
            computed    attention, forward    experts, back    experts, forward      attention, back

        Each exchange has one piece of the other phase's compute to run under. Barriers keep them
        in step: what a piece made leaves when what travelled beside it has arrived.
        """
        sent = self._return_to_experts(inbox_b, backward, stash)
        # The stash passes the barriers too: what reads it must be done before it is written again,
        # or XLA would copy it.
        sent, stash = lax.optimization_barrier((sent, stash))
        under_way = self._exchange_all(sent, "all_to_all_backward")
        made, stash, stats = self._attend(inbox_f, forward, stash, stats)

        sent, arrived, stash = lax.optimization_barrier((made, under_way, stash))
        under_way = self._exchange_all(sent, "all_to_all_forward")
        (words,) = arrived
        words, grads = self._apply_experts_back(0, words, backward, stash, grads)

        sent, arrived, stash = lax.optimization_barrier(([words], under_way, stash))
        under_way = self._exchange_all(sent, "all_to_all_backward")
        (words,) = arrived
        words, stash, stats = self._apply_experts(0, words, forward, stash, stats)

        sent, arrived, stash = lax.optimization_barrier(([words], under_way, stash))
        under_way = self._exchange_all(sent, "all_to_all_forward")
        outbox_b, grads = self._attend_back(arrived, backward, stash, grads)

        outbox_b, arrived = lax.optimization_barrier((outbox_b, under_way))
        return self._combine(arrived), outbox_b, stash, stats, grads
