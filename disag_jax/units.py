"""The four units of work: attention and experts, forward and backward, as pure functions.

A forward unit takes parameters and a message and returns the next message and what its backward
unit needs (its stash); a backward unit takes parameters, stash and the cotangent of the message it
sent and recomputes what `run.recompute` did not have kept. Integers (choices, rows, order) are made
in the forward unit only: a fresh top-k in the backward pass may choose differently in bfloat16, and
one flip would misalign every row after it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from disag_jax.config import Recompute
from disag_jax.dispatch import (
    Cotangent,
    Dispatch,
    Message,
    carries_residual,
    dispatch_template,
    make_message,
    plan_dispatch,
)
from disag_jax.geometry import Geometry
from disag_jax.model import EXPERTS, POST_NORM, attention_module, expert_module
from layers.attention import Attended, AttentionKept
from layers.experts import apply_experts, sort_rows
from layers.grouped_matmul import (
    ExpertOrder,
    GroupWeights,
    PairProduct,
    PairWeights,
    WeightGradient,
    multiply_by_group,
    multiply_by_pair,
    order_by_expert,
)
from layers.norm import rms_norm
from layers.recall import recalled, tap
from layers.router import (
    balance_loss,
    choice_counts,
    choose_experts,
    expert_capacity,
    gates_at,
    router_scores,
    within_capacity,
    z_loss,
)


class AttentionStash(NamedTuple):
    """What an attention unit leaves for its backward unit.

    Attributes:
      h: [T, D], its input.
      origin: int32 [R, C] of the message that h came from; None co-located, where there is none.
      dispatch: where its tokens went.
      kept: what need not be computed again, by `run.recompute`.
    """

    h: jax.Array
    origin: jax.Array | None
    dispatch: Dispatch
    kept: AttentionKept


class ExpertStash(NamedTuple):
    """What an expert unit leaves for its backward unit.

    Attributes:
      x: [n, D], its input.
      gate: [n, K].
      residual: int32 [n], 1 on copy 0 of a token.
      order: of the sorted rows.
      products: [2, P, width] of the rows with the gate and up weights, as "gate_up"; empty where
        `run.recompute` has them computed again.
    """

    x: jax.Array
    gate: jax.Array
    residual: jax.Array
    order: ExpertOrder
    products: dict[str, jax.Array]


class RoutingStats(NamedTuple):
    """What one attention unit's routing did.

    Attributes:
      counts: int32 [E], times each expert was chosen.
      dropped: int32, pairs that capacity_factor dropped.
      balance_loss: sum over the unit's sequences.
      z_loss: sum over the unit's tokens.
      rows_needed: int32, rows of the fullest slot.
    """

    counts: jax.Array
    dropped: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array
    rows_needed: jax.Array


class AttentionUnit:
    """combine -> attention block -> router -> dispatch."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        self.module = attention_module(geometry.config.model, geometry.compute_dtype)

    def stash_template(self) -> AttentionStash:
        g = self.geometry
        origin = None if g.placement.colocated else g.ints(g.R, g.C)
        return AttentionStash(
            g.floats(g.T, g.D), origin, dispatch_template(g), self._kept_template()
        )

    def _kept_template(self) -> AttentionKept:
        g, model = self.geometry, self.geometry.config.model

        def heads(count):
            return g.floats(g.T // g.S, g.S, count, model.head_dim)

        q, k = heads(model.num_heads), heads(model.num_kv_heads)
        lse = g.wides(g.T // g.S, model.num_heads, g.S)
        return self._choose_kept(AttentionKept(q, k, k, Attended(q, lse)))

    def _choose_kept(self, computed: AttentionKept) -> AttentionKept:
        """What of a forward pass the stash keeps."""
        recompute = self.geometry.config.run.recompute
        if recompute is Recompute.NONE:
            return computed
        if recompute is Recompute.SELECTIVE:
            return AttentionKept(attended=computed.attended)
        return AttentionKept()

    def forward(self, params, bias_E, h_TD, origin, rank, segments_BS=None):
        """Returns (Message, AttentionStash, RoutingStats) for the combined input h.

        segments_BS: int32, numbers of the documents that attention stays in; None lets it cross.
        """
        g = self.geometry
        out_TD, logits_TE, computed = self._block(params, h_TD, segments_BS, AttentionKept())
        scores_TE = self._scores(logits_TE)
        with jax.named_scope("choose_experts"):
            ids_TK = choose_experts(scores_TE, bias_E, g.K)
            kept_TK = self._kept(ids_TK)
        with jax.named_scope("dispatch"):
            dispatch, rows_needed = plan_dispatch(g, ids_TK, kept_TK, rank)
            gate_TK = self._gates(scores_TE, ids_TK)
            message = make_message(g, out_TD, gate_TK, dispatch, rank)
        balance, z = self._auxiliary(logits_TE, scores_TE, ids_TK)
        stats = RoutingStats(
            counts=choice_counts(ids_TK[None], g.E)[0],
            dropped=jnp.sum(kept_TK == 0, dtype=jnp.int32),
            balance_loss=balance,
            z_loss=z,
            rows_needed=rows_needed.astype(jnp.int32),
        )
        stash = AttentionStash(h_TD, origin, dispatch, self._choose_kept(computed))
        return message, stash, stats

    def backward(
        self, params, stash: AttentionStash, cotangent: Cotangent, rank, aux_scales,
        segments_BS=None,
    ):  # fmt: skip
        """Returns (parameter gradients, dh [T, D]).

        aux_scales: factors of (balance loss sum, z-loss sum) in the training loss.
        """
        g = self.geometry

        def outputs(params, h_TD):
            out_TD, logits_TE, _ = self._block(params, h_TD, segments_BS, stash.kept)
            scores_TE = self._scores(logits_TE)
            gate_TK = self._gates(scores_TE, stash.dispatch.ids)
            message = make_message(g, out_TD, gate_TK, stash.dispatch, rank)
            balance, z = self._auxiliary(logits_TE, scores_TE, stash.dispatch.ids)
            auxiliary = aux_scales[0] * balance + aux_scales[1] * z
            return Cotangent(message.x, message.gate), auxiliary

        _, vjp = jax.vjp(outputs, params, stash.h)
        return vjp((cotangent, jnp.ones((), g.wide_dtype)))

    def _block(self, params, h_TD, segments_BS, kept: AttentionKept):
        """Returns (attention with its residual, the router's logits, what could be kept)."""
        g = self.geometry
        layer = self.module.merge(params)
        with jax.named_scope("attention_block"):
            x_BSD = layer.attention_norm(h_TD).reshape(-1, g.S, g.D)
            y_BSD, computed = layer.attention.attend(x_BSD, segments_BS, kept=kept)
            h_TD = h_TD + y_BSD.reshape(g.T, g.D)
        with jax.named_scope("router"):
            return h_TD, layer.router(h_TD, layer.post_norm), computed

    def _scores(self, logits_TE):
        return router_scores(logits_TE, self.geometry.config.model.router_score.value)

    def _gates(self, scores_TE, ids_TK):
        model = self.geometry.config.model
        return gates_at(scores_TE, ids_TK, normalize=model.normalize_gates, scale=model.gate_scale)

    def _kept(self, ids_TK):
        """Pairs within the model's capacity, int32 [T, K]."""
        g, factor = self.geometry, self.geometry.config.model.capacity_factor
        if factor is None:
            return jnp.ones_like(ids_TK)
        capacity = expert_capacity(factor, g.S, g.K, g.E)
        kept = within_capacity(ids_TK.reshape(-1, g.S, g.K), g.E, capacity)
        return kept.reshape(g.T, g.K).astype(jnp.int32)

    def _auxiliary(self, logits_TE, scores_TE, ids_TK):
        """(sum over sequences of the balance loss, sum over tokens of the z-loss)."""
        g = self.geometry
        counts_BE = choice_counts(ids_TK.reshape(-1, g.S, g.K), g.E)
        scores_BSE = scores_TE.reshape(-1, g.S, g.E)
        return jnp.sum(balance_loss(scores_BSE, counts_BE, g.K)), jnp.sum(z_loss(logits_TE))


class ExpertUnit:
    """norm -> sort rows by expert -> grouped SwiGLU -> weighted sum per row, plus the residual.

    Its parameters are the expert layer's and, borrowed from the attention side, `post_norm`. Every
    worker holds the shared experts after its own; a token visits them, with gate 1, on the worker
    of its first choice.
    """

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        self.module = expert_module(
            geometry.config.model, geometry.places.per_worker, geometry.compute_dtype
        )
        self.num_shared = geometry.config.model.num_shared_experts

    def stash_template(self) -> ExpertStash:
        g = self.geometry
        n = g.M * g.C
        order = ExpertOrder(
            g.ints(g.P), g.ints(n, g.K + self.num_shared), g.ints(2 * g.P // g.tile)
        )
        products = self._choose_kept({"gate_up": g.floats(2, g.P, g.config.model.expert_width)})
        return ExpertStash(g.floats(n, g.D), g.wides(n, g.K), g.ints(n), order, products)

    def _choose_kept(self, products: dict) -> dict:
        """What of the products the stash keeps."""
        keeps = self.geometry.config.run.recompute is Recompute.NONE
        return {"gate_up": products["gate_up"]} if keeps else {}

    def forward(self, params, message: Message):
        """Returns (Message [M, C] of finished shares, ExpertStash, sorted rows needed)."""
        received, needed = self.receive(message)
        products = self.keep(params, received).products
        products = {name: product.dense() for name, product in products.items()}
        stash = received._replace(products=products)
        return self.finish(params, message, stash), stash, needed

    def receive(self, message: Message):
        """Sorts the rows of a message: (ExpertStash without products, sorted rows needed)."""
        g = self.geometry
        origin = message.origin.reshape(-1)
        residual = carries_residual(origin, g.F)
        # A slot that nobody sent arrives as zeros: only its origins say that it is empty.
        expert_id = jnp.where(origin[:, None] > 0, message.expert_id.reshape(-1, g.K), -1)
        with jax.named_scope("order_by_expert"):
            order, needed = order_by_expert(
                self._with_shared(expert_id, residual), g.num_groups, g.P, g.tile
            )
        stash = ExpertStash(
            x=message.x.reshape(-1, g.D),
            gate=message.gate.reshape(-1, g.K),
            residual=residual.astype(jnp.int32),
            order=order,
            products={},
        )
        return stash, needed.astype(jnp.int32)

    def keep(self, params, received: ExpertStash) -> ExpertStash:
        """What is received, with the products that the stash keeps, not yet made (PairProduct)."""
        product = PairProduct(
            sort_rows(self._normed(params, received.x), received.order),
            _gate_up_weights(params),
            received.order.half_expert,
        )
        return received._replace(products=self._choose_kept({"gate_up": product}))

    def finish(self, params, message: Message, kept: ExpertStash) -> Message:
        """As `forward` after `keep`, whose products are made now."""
        y, _ = self._experts(params, kept.x, kept.gate, kept)
        return message._replace(x=y.reshape(message.x.shape))

    def backward(self, params, stash: ExpertStash, dy):
        """Returns (parameter gradients, Cotangent [M, C]) for dy [M, C, D].

        The gradients of the experts' weights are `WeightGradient`s: factors of a product.
        """
        g = self.geometry
        wide_PF = jnp.zeros((g.P, g.config.model.expert_width), g.compute_dtype)
        taps = {"gate_up": (wide_PF, wide_PF), "down": jnp.zeros((g.P, g.D), g.compute_dtype)}
        scale = params[POST_NORM]["scale"]

        def outputs(scale, x_nD, gate_nK, taps):
            return self._experts(
                {**params, POST_NORM: {"scale": scale}}, x_nD, gate_nK, stash, taps
            )

        _, vjp, inputs = jax.vjp(outputs, scale, stash.x, stash.gate, taps, has_aux=True)
        dscale, dx, dgate, doutputs = vjp(dy.reshape(-1, g.D))

        def gradient(name, dy):
            return WeightGradient(inputs[name], dy, stash.order.half_expert, g.num_groups)

        experts = {
            "gate": gradient("gate_up", doutputs["gate_up"][0]),
            "up": gradient("gate_up", doutputs["gate_up"][1]),
            "down": gradient("down", doutputs["down"]),
        }
        dparams = {EXPERTS: experts, POST_NORM: {"scale": dscale}}
        return dparams, Cotangent(dx.reshape(g.M, g.C, g.D), dgate.reshape(g.M, g.C, g.K))

    def _with_shared(self, expert_id_nK, residual_n):
        """Adds the shared experts to the choices of each token's copy 0."""
        first = self.geometry.places.per_worker
        shared = first + jnp.arange(self.num_shared, dtype=jnp.int32)
        shared_id = jnp.where(residual_n[:, None], shared, -1)
        return jnp.concatenate([expert_id_nK, shared_id], axis=1)

    def _experts(self, params, x_nD, gate_nK, stash: ExpertStash, taps=None):
        """Returns (outputs [n, D], the rows that are inputs of the products "gate_up" and "down").

        taps: differentiable stand-ins for the products' outputs, by name.
        """
        inputs, half_expert = {}, stash.order.half_expert

        def gate_up(rows):
            return multiply_by_pair(rows, _gate_up_weights(params), half_expert)

        def down(rows):
            return multiply_by_group(rows, GroupWeights.of(params[EXPERTS]["down"]), half_expert)

        def observed(name, product_of, rows):
            if name in stash.products:
                product = recalled(product_of, tuple(stash.products[name]), rows)
            else:
                product = product_of(rows)
            inputs[name] = rows
            return product if taps is None else tap(product, taps[name])

        gate = jnp.pad(gate_nK, ((0, 0), (0, self.num_shared)), constant_values=1)
        y_nD = apply_experts(
            functools.partial(observed, "gate_up", gate_up),
            functools.partial(observed, "down", down),
            self._normed(params, x_nD), gate, stash.order,
        )  # fmt: skip
        return y_nD + jnp.where(stash.residual[:, None] > 0, x_nD, 0), inputs

    def _normed(self, params, x_nD):
        return rms_norm(x_nD, params[POST_NORM]["scale"], self.geometry.config.model.norm_eps)


def _gate_up_weights(params) -> PairWeights:
    return PairWeights.of(params[EXPERTS]["gate"], params[EXPERTS]["up"])
