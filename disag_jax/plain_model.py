"""The model on one device, straight from its logical parameters: no mesh, no schedule, no messages.

Made of the same layers as the units of work, so that a checkpoint can be sampled from wherever it
fits. It keeps no cache: every call computes every position.

Legend: B sequences, S positions, T = B*S tokens, D model width, E experts, K choices per token,
n shared experts, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import lax

from disag_jax.config import Config, ModelConfig
from disag_jax.model import attention_module, expert_module
from disag_jax.state import ROUTED, SHARED
from layers.dtypes import accumulation_dtype
from layers.grouped_matmul import order_by_expert, sorted_rows, tile_rows
from layers.norm import rms_norm
from layers.router import (
    choose_experts,
    expert_capacity,
    gates_at,
    router_scores,
    within_capacity,
)


def logits(config: Config, params: dict, router_bias_LE, tokens_BS, segments_BS=None):
    """Logits [B, S, V] in float32 or wider, computed in the type of the parameters.

    An expert keeps as many tokens of a sequence as in training, those of
    `batch.sequence_length` tokens, however long these sequences are. Later tokens never take an
    earlier one's place, so padding at the end changes nothing before it.

    params: the logical tree, layers [L, ...], experts [L, E, ...], vocabulary [V, D].
    segments_BS: int32, numbers of the documents that attention stays in; None lets it cross.
    """
    vocabulary = params["vocabulary"]

    def layer(h_BSD, weights):
        return _layer(config, *weights, h_BSD, segments_BS), None

    h_BSD = vocabulary["embedding"][tokens_BS]
    # The layers are alike: a scan compiles one.
    h_BSD, _ = lax.scan(layer, h_BSD, (params["attention"], params["expert"], router_bias_LE))
    x_BSD = rms_norm(h_BSD, vocabulary["final_norm"], config.model.norm_eps)
    wide = accumulation_dtype(x_BSD.dtype)
    return jnp.einsum("bsd,vd->bsv", x_BSD, vocabulary["head"], preferred_element_type=wide)


def _layer(config: Config, attention_params, expert_params, bias_E, h_BSD, segments_BS):
    model = config.model
    layer = attention_module(model, h_BSD.dtype).merge(attention_params)
    h_BSD = h_BSD + layer.attention(layer.attention_norm(h_BSD), segments_BS)
    h_TD = h_BSD.reshape(-1, model.d_model)
    scores_TE = router_scores(layer.router(h_TD, layer.post_norm), model.router_score.value)
    ids_TK = choose_experts(scores_TE, bias_E, model.top_k)
    gates_TK = gates_at(scores_TE, ids_TK, normalize=model.normalize_gates, scale=model.gate_scale)
    kept_TK = _kept(config, ids_TK.reshape(*h_BSD.shape[:2], -1)).reshape(ids_TK.shape)
    chosen_TK = jnp.where(kept_TK, ids_TK, -1)
    y_TD = _experts(model, expert_params, layer.post_norm(h_TD), chosen_TK, gates_TK)
    return h_BSD + y_TD.reshape(h_BSD.shape)


def _kept(config: Config, ids_BSK):
    """True [B, S, K] for the choices within the model's capacity."""
    model = config.model
    if model.capacity_factor is None:
        return jnp.ones(ids_BSK.shape, bool)
    capacity = expert_capacity(
        model.capacity_factor, config.batch.sequence_length, model.top_k, model.num_experts
    )
    return within_capacity(ids_BSK, model.num_experts, capacity)


def _experts(model: ModelConfig, params, x_TD, ids_TK, gates_TK):
    """Gated sum [T, D] of each token's experts (-1 = none) and of the shared ones."""
    experts, num_shared = params[ROUTED], model.num_shared_experts
    if num_shared:
        # Shared experts come after the routed ones; every token chooses them with gate 1.
        join = lambda routed, shared: jnp.concatenate([routed, shared])  # noqa: E731
        experts = jax.tree.map(join, experts, params[SHARED])
        shared_Tn = jnp.broadcast_to(
            model.num_experts + jnp.arange(num_shared), (len(ids_TK), num_shared)
        )
        ids_TK = jnp.concatenate([ids_TK, shared_Tn], axis=1)
        gates_TK = jnp.pad(gates_TK, ((0, 0), (0, num_shared)), constant_values=1)
    num_experts, tile = model.num_experts + num_shared, tile_rows()
    # The worst case, so that every pair has a row.
    order, _ = order_by_expert(
        ids_TK, num_experts, sorted_rows(ids_TK.size, num_experts, tile), tile
    )
    layer = expert_module(model, model.num_experts, x_TD.dtype).merge({"experts": experts})
    return layer.experts(x_TD, gates_TK, order)
