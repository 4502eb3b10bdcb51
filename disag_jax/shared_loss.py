"""The loss of a micro-batch, shared by all workers of the pipeline.

The last hidden states arrive at the M attention workers of one stage. The head is as much work as
several layers, and on those workers alone it would stall the whole ring; so each of them scatters
its tokens over floor(W / M) workers, every worker runs the head on its share, and the gradients
return. All workers call these functions in the same periods: the permutes are safe inside a
conditional whose predicate is the same everywhere.
"""

import jax
import jax.numpy as jnp
from jax import lax

from disag_jax.geometry import Geometry
from layers.head import HeadParams, cross_entropy, cross_entropy_and_grads
from mesh.placement import WORKER
from mesh.roles import Role
from mesh.wire import WordCodec


class SharedLoss:
    """Head and cross-entropy over shares of t = ceil(T / shares) tokens."""

    def __init__(self, geometry: Geometry):
        placement = geometry.placement
        self.geometry = geometry
        self.owner_stage = geometry.config.model.num_layers % placement.stages
        self.num_shares = placement.workers // placement.attention_workers
        # One co-located stage: every worker owns its tokens' loss.
        self.is_local = placement.workers == placement.attention_workers
        self.share_tokens = -(-geometry.T // self.num_shares)
        self.codec = WordCodec(
            (geometry.floats(self.share_tokens, geometry.D), geometry.ints(self.share_tokens)),
            geometry.compute_dtype,
        )
        owners = [
            placement.worker(self.owner_stage, Role.ATTENTION, rank)
            for rank in range(placement.attention_workers)
        ]
        self.pairs = [
            [(owner, share * len(owners) + rank) for rank, owner in enumerate(owners)]
            for share in range(self.num_shares)
        ]

    def loss(self, params: HeadParams, h_TD, label_T):
        """This worker's share of the sum of -log p(label) of the owners' tokens."""
        h_share, label_share = self._scatter(h_TD, label_T)
        return cross_entropy(params, h_share, label_share, **self._head_options())

    def loss_and_backward(self, params: HeadParams, h_TD, label_T, scale, grads: HeadParams):
        """Returns (share of the sum, dh [T, D] on the owners, head gradients added to `grads`)."""
        h_share, label_share = self._scatter(h_TD, label_T)
        total, dh_share, grads = cross_entropy_and_grads(
            params, h_share, label_share, scale, grads, **self._head_options()
        )
        if self.is_local:
            return total, dh_share, grads
        with jax.named_scope("gather_loss_gradient"):
            back = [[(b, a) for a, b in pairs] for pairs in self.pairs]
            parts = [lax.ppermute(dh_share, WORKER, pairs) for pairs in back]
        return total, jnp.concatenate(parts)[: self.geometry.T], grads

    def _scatter(self, h_TD, label_T):
        """This worker's share of the tokens of its owner; a worker without one has no labels."""
        if self.is_local:
            return h_TD, label_T
        missing = self.num_shares * self.share_tokens - self.geometry.T
        shape = (self.num_shares, self.share_tokens)
        h = jnp.pad(h_TD, ((0, missing), (0, 0))).reshape(*shape, -1)
        # On the wire 0 means no label: it is what a worker without an owner receives.
        coded = jnp.pad(label_T + 1, (0, missing)).reshape(shape)
        with jax.named_scope("scatter_loss_tokens"):
            words = self.codec.encode((h, coded))
            received = [
                lax.ppermute(words[share], WORKER, pairs) for share, pairs in enumerate(self.pairs)
            ]
        # A worker is the target of one share at most; the others arrive as zeros.
        h_share, coded_share = self.codec.decode(sum(received[1:], received[0]))
        return h_share, coded_share - 1

    def _head_options(self):
        config = self.geometry.config
        return dict(eps=config.model.norm_eps, chunk=config.run.loss_chunk)
