"""Many-to-many transfers between the attention and the expert workers of a pipeline.

A message is R = max(M, N) slots. In slot r, attention rank i talks to expert rank (i + r) mod R, so
a transfer is R rounds, each one `lax.ppermute` in which every worker is a source at most once and a
target at most once. A round carries attention(g, i) -> expert(g, j) together with expert(g, j) ->
attention(g + 1, i): both directions share the operation and links run full duplex. R rounds are the
minimum, by edge colouring. A missing partner (M != N) is not in the pairs and its slot arrives as
zeros, which reads as empty.
"""

import jax.numpy as jnp
from jax import lax

from mesh.placement import WORKER, Placement
from mesh.roles import Role


def receiver_of_slot(sender, slot, rounds: int):
    """The expert rank that attention rank `sender` talks to in a slot."""
    return (sender + slot) % rounds


def slot_of_receiver(sender, receiver, rounds: int):
    """The slot in which attention rank `sender` talks to an expert rank."""
    return (receiver - sender) % rounds


def forward_pairs(placement: Placement) -> list[list[tuple[int, int]]]:
    """The (source, target) workers of each of the R rounds of a forward transfer."""
    rounds = []
    for r in range(placement.rounds):
        pairs = []
        for stage in range(placement.stages):
            next_stage = (stage + 1) % placement.stages
            for i in range(placement.attention_workers):
                j = receiver_of_slot(i, r, placement.rounds)
                if j >= placement.expert_workers:
                    continue
                expert = placement.worker(stage, Role.EXPERT, j)
                pairs.append((placement.worker(stage, Role.ATTENTION, i), expert))
                pairs.append((expert, placement.worker(next_stage, Role.ATTENTION, i)))
        rounds.append(pairs)
    return rounds


class RingTransport:
    """Flat transport: every pair of workers exchanges its slot directly.

    The interface that a transport offers to the pipeline: `send_forward` and `send_backward` take
    and return words [R, num_words], and must run outside any conditional whose predicate differs
    between devices (there a ppermute deadlocks).
    """

    def __init__(self, placement: Placement):
        self._forward = forward_pairs(placement)
        self._backward = [[(b, a) for a, b in pairs] for pairs in self._forward]

    def send_forward(self, words):
        """Sends each slot along the layer order: attention to expert, expert to next attention."""
        return _exchange(words, self._forward)

    def send_backward(self, words):
        """Sends each slot against the layer order."""
        return _exchange(words, self._backward)


class StageTransport:
    """Transport of the co-located twin: whole hidden states between the stages' equal ranks.

    `send_forward` and `send_backward` as in `RingTransport`, for one array of any shape.
    """

    def __init__(self, placement: Placement):
        size = placement.stage_workers
        next_stage = [(w, (w + size) % placement.workers) for w in range(placement.workers)]
        self._is_single = placement.stages == 1
        self._forward = next_stage
        self._backward = [(b, a) for a, b in next_stage]

    def send_forward(self, x):
        return x if self._is_single else lax.ppermute(x, WORKER, self._forward)

    def send_backward(self, x):
        return x if self._is_single else lax.ppermute(x, WORKER, self._backward)


def exchange_in_group(words, placement: Placement):
    """All-to-all among the workers that hold a stage's experts: slot i goes to the i-th of them.

    Returns words [R, ...], slot i from the i-th. It is its own inverse.
    """
    if placement.expert_workers == 1:
        return words
    groups = placement.expert_groups()
    return lax.all_to_all(words, WORKER, 0, 0, axis_index_groups=groups, tiled=True)


def _exchange(words, rounds):
    received = [lax.ppermute(words[r], WORKER, pairs) for r, pairs in enumerate(rounds)]
    return jnp.stack(received)


def pick_slots(words, rank, num_senders: int):
    """An expert worker's slots that have a sender: [R, ...] -> [M, ...].

    `rank` (traced) is the expert rank. The result is in the senders' order, except that where every
    slot has a sender nothing moves.
    """
    slots = picked_slots(rank, num_senders, rounds=words.shape[0])
    return words if slots is None else words[slots]


def picked_slots(rank, num_senders: int, rounds: int):
    """Where in R slots those lie that `pick_slots` returns: int32 [M], None for where they are."""
    if num_senders == rounds:
        return None
    return slot_of_receiver(jnp.arange(num_senders), rank, rounds)
