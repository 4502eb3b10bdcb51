"""The model's layers as the units see them: one attention layer, one expert layer, the vocabulary.

Layers are `flax.nnx` modules; outside a unit their parameters are plain nested dicts of arrays.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from disag_jax.config import ModelConfig
from layers.attention import Attention
from layers.experts import Experts
from layers.norm import RMSNorm
from layers.router import Router

POST_NORM, EXPERTS = "post_norm", "experts"


class AttentionLayer(nnx.Module):
    """What an attention worker holds of a layer.

    `post_norm` is read by the router here and by the experts there; it is stored here.
    """

    def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps, dtype=dtype)
        self.attention = Attention(
            d_model=config.d_model,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
            init_std=config.init_std,
            out_init_std=_out_init_std(config),
            dtype=dtype,
            rngs=rngs,
        )
        self.post_norm = RMSNorm(config.d_model, config.norm_eps, dtype=dtype)
        self.router = Router(
            d_model=config.d_model,
            num_experts=config.num_experts,
            init_std=config.init_std,
            dtype=dtype,
            rngs=rngs,
        )


class ExpertLayer(nnx.Module):
    """What an expert worker holds of a layer: its experts, shared ones after the routed ones."""

    def __init__(self, config: ModelConfig, expert_ids, dtype, rngs: nnx.Rngs):
        self.experts = Experts(
            expert_ids,
            d_model=config.d_model,
            expert_width=config.expert_width,
            init_std=config.init_std,
            out_init_std=_out_init_std(config),
            dtype=dtype,
            rngs=rngs,
        )


@dataclasses.dataclass(frozen=True)
class RoleModule:
    """A role's layer as a pure function of its parameters.

    Attributes:
      graphdef: for `nnx.merge(graphdef, params)` inside a unit.
      params: the parameters of one layer, a nested dict of ShapeDtypeStructs.
    """

    graphdef: nnx.GraphDef
    params: dict

    @classmethod
    def of(cls, make_module) -> "RoleModule":
        graphdef, state = nnx.split(nnx.eval_shape(make_module), nnx.Param)
        return cls(graphdef, nnx.to_pure_dict(state))

    def merge(self, params):
        return nnx.merge(self.graphdef, params)


def attention_module(config: ModelConfig, dtype) -> RoleModule:
    """The attention layer, with parameters of `dtype`."""
    return RoleModule.of(lambda: AttentionLayer(config, dtype, nnx.Rngs(0)))


def expert_module(config: ModelConfig, num_places: int, dtype) -> RoleModule:
    """The expert layer of one worker: `num_places` routed and all shared experts."""
    num_places += config.num_shared_experts
    return RoleModule.of(lambda: ExpertLayer(config, jnp.arange(num_places), dtype, nnx.Rngs(0)))


def init_attention_layer(config: ModelConfig, dtype, key, layer):
    """Fresh parameters of attention layer `layer`, a function of the key and the index alone."""
    rngs = nnx.Rngs(jax.random.fold_in(jax.random.fold_in(key, 0), layer))
    return _pure_params(AttentionLayer(config, dtype, rngs))


def init_experts(config: ModelConfig, dtype, key, layer, expert_ids):
    """Fresh weights of some experts of a layer, [len(expert_ids), ...]; zeros where the id is -1.

    An expert's weights depend on the key, the layer and its id alone. Shared experts have the ids
    after the routed ones.
    """
    rngs = nnx.Rngs(jax.random.fold_in(jax.random.fold_in(key, 1), layer))
    params = _pure_params(ExpertLayer(config, expert_ids, dtype, rngs))["experts"]
    return jax.tree.map(lambda w: jnp.where((expert_ids >= 0)[:, None, None], w, 0), params)


def init_vocabulary(config: ModelConfig, dtype, key, num_rows: int):
    """Fresh embedding and head [num_rows, D] (rows past the vocabulary are never read) and norm."""
    draw = functools.partial(jax.random.normal, shape=(num_rows, config.d_model), dtype=dtype)
    embedding_key, head_key = jax.random.split(jax.random.fold_in(key, 2))
    return {
        "embedding": draw(embedding_key) * config.embedding_init_std,
        "final_norm": jnp.ones((config.d_model,), dtype),
        "head": draw(head_key) * config.init_std,
    }


def _pure_params(module):
    return nnx.to_pure_dict(nnx.split(module, nnx.Param)[1])


def _out_init_std(config: ModelConfig) -> float:
    """Smaller for what is added to the residual stream. Source: GPT-2."""
    return config.init_std / math.sqrt(2 * config.num_layers)
