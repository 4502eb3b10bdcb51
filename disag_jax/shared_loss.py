"""The loss of a micro-batch, shared by all workers of the pipeline.

The last hidden states arrive at the M attention workers of one stage. The head is as much work as
several layers, and on those workers alone it would stall the whole ring; so each of them, the owner
of its tokens' loss, keeps `split.loss_share` of them and scatters the rest over its share of the
other workers. Those run the head on what they get, and the gradients return. All workers call these
functions in the same periods: the permutes are safe inside a conditional whose predicate is the
same everywhere.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from disag_jax.conditional import update_if
from disag_jax.geometry import Geometry
from layers.head import HeadParams, cross_entropy, cross_entropy_and_grads
from mesh.placement import WORKER, Placement
from mesh.roles import Role
from mesh.wire import WordCodec


def tokens_of_workers(tokens: int, loss_share: float | None, placement: Placement):
    """(tokens that an owner keeps, helpers of an owner, tokens that each of them gets).

    tokens: T. loss_share: as in SplitConfig. The last helper may get fewer.
    """
    helpers = placement.workers // placement.attention_workers - 1
    kept = -(-tokens // (helpers + 1)) if loss_share is None else math.ceil(loss_share * tokens)
    if helpers == 0 or kept >= tokens:
        return tokens, 0, 0
    return kept, helpers, -(-(tokens - kept) // helpers)


class SharedLoss:
    """Head and cross-entropy over the owners' own tokens and over those that others help with.

    Attributes:
      owner_stage: whose attention workers own the losses.
      own_tokens, helpers, share_tokens: as `tokens_of_workers`.
      codec: of the words that a helper gets: hidden states and labels.
    """

    def __init__(self, geometry: Geometry):
        placement, config = geometry.placement, geometry.config
        self.geometry = geometry
        self.owner_stage = config.model.num_layers % placement.stages
        self.own_tokens, self.helpers, self.share_tokens = tokens_of_workers(
            geometry.T, config.split.loss_share, placement
        )
        self.codec = WordCodec(
            (geometry.floats(self.share_tokens, geometry.D), geometry.ints(self.share_tokens)),
            geometry.compute_dtype,
        )
        owners = [
            placement.worker(self.owner_stage, Role.ATTENTION, rank)
            for rank in range(placement.attention_workers)
        ]
        others = [worker for worker in range(placement.workers) if worker not in owners]
        self.pairs = [
            [(owner, others[helper * len(owners) + rank]) for rank, owner in enumerate(owners)]
            for helper in range(self.helpers)
        ]
        # One co-located stage: every worker owns its tokens' loss.
        self.all_own = not others

    def loss(self, params: HeadParams, h_TD, label_T, is_owner):
        """This worker's part of the sum of -log p(label) of the owners' tokens."""

        def of(h, label):
            return cross_entropy(params, h, label, **self._head_options())

        own = h_TD[: self.own_tokens], label_T[: self.own_tokens]
        if self.all_own:
            return of(*own)
        if not self.helpers:
            zero = jnp.zeros((), self.geometry.wide_dtype)
            return lax.cond(is_owner, lambda: of(*own), lambda: zero)
        shared = self._scatter(h_TD, label_T)
        return lax.cond(is_owner, lambda: of(*own), lambda: of(*shared))

    def loss_and_backward(
        self, params: HeadParams, h_TD, label_T, is_owner, scale, grads: HeadParams
    ):
        """Returns (part of the sum, dh [T, D] on the owners, head gradients added to `grads`)."""

        def of(h, label, grads):
            return self.gradients(params, h, label, scale, grads)

        own = h_TD[: self.own_tokens], label_T[: self.own_tokens]
        if self.all_own:
            return of(*own, grads)
        shared = self._scatter(h_TD, label_T) if self.helpers else None
        dh_own, dh_share = (
            jnp.zeros((tokens, self.geometry.D), h_TD.dtype)
            for tokens in (self.own_tokens, self.share_tokens)
        )
        total = jnp.zeros((), self.geometry.wide_dtype)
        # Two conditionals: with a part in either branch of one, XLA copies the sums.
        total, dh_own, grads = update_if(
            is_owner, lambda total, dh, grads: of(*own, grads), total, dh_own, grads
        )
        if shared is not None:
            total, dh_share, grads = update_if(
                ~is_owner, lambda total, dh, grads: of(*shared, grads), total, dh_share, grads
            )
        with jax.named_scope("gather_loss_gradient"):
            back = [[(b, a) for a, b in pairs] for pairs in self.pairs]
            parts = [lax.ppermute(dh_share, WORKER, pairs) for pairs in back]
        return total, jnp.concatenate([dh_own, *parts])[: self.geometry.T], grads

    def gradients(self, params: HeadParams, h_TD, label_T, scale, grads: HeadParams):
        """`cross_entropy_and_grads` of any tokens, as the config has it computed."""
        return cross_entropy_and_grads(params, h_TD, label_T, scale, grads, **self._head_options())

    def _scatter(self, h_TD, label_T):
        """What this worker helps with; one that helps nobody gets tokens without labels."""
        missing = self.own_tokens + self.helpers * self.share_tokens - self.geometry.T
        shape = (self.helpers, self.share_tokens)
        h = jnp.pad(h_TD[self.own_tokens :], ((0, missing), (0, 0))).reshape(*shape, -1)
        # On the wire 0 means no label: it is what a worker without an owner receives.
        coded = jnp.pad(label_T[self.own_tokens :] + 1, (0, missing)).reshape(shape)
        with jax.named_scope("scatter_loss_tokens"):
            words = self.codec.encode((h, coded))
            received = [
                lax.ppermute(words[helper], WORKER, pairs)
                for helper, pairs in enumerate(self.pairs)
            ]
        # A worker helps one owner at most; what others are sent arrives as zeros.
        h_share, coded_share = self.codec.decode(sum(received[1:], received[0]))
        return h_share, coded_share - 1

    def _head_options(self):
        config = self.geometry.config
        return dict(eps=config.model.norm_eps, chunk=config.run.loss_chunk)
