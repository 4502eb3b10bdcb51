"""The oracle: the model, its loss and its trainer on one device, written from the mathematics.

Slow and obvious on purpose: every expert computes every token, and the gate matrix is zero where a
token did not choose the expert. It shares nothing with the system but the configuration.

Shapes: L layers, S tokens of one sequence, D d_model, H query heads, G key/value heads, A head_dim,
E experts, F expert width, V vocabulary,
B sequences of the global batch.

Every function is pure and may be compiled with the configuration closed over:
`jax.jit(functools.partial(reference.loss_and_grads, config))`.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from disag_jax.config import Config, ModelConfig, MuDtype, RouterScore

# Large enough that no gradient is trivial, small enough that no score saturates.
_INIT_SCALE = 0.5


class Routing(NamedTuple):
    """What one layer's router decided for one sequence.

    Attributes:
      scores: [S, E], router scores, without the selection bias.
      chosen: [S, E], True where the token chose the expert.
      kept: [S, E], True where the choice was not dropped.
      gates: [S, E], weight of the expert's output; 0 where not chosen. Dropping leaves it alone.
    """

    scores: jax.Array
    chosen: jax.Array
    kept: jax.Array
    gates: jax.Array


class LayerStats(NamedTuple):
    """Router statistics of one layer and sequence: two scalars, [E] choices, a number of pairs."""

    balance_loss: jax.Array
    z_loss: jax.Array
    expert_counts: jax.Array
    dropped: jax.Array


def init(config: Config, key: jax.Array) -> dict:
    """Returns random parameters as the logical tree, in JAX's default float type."""
    m = config.model
    L, D, H, G, A = m.num_layers, m.d_model, m.num_heads, m.num_kv_heads, m.head_dim
    E, F, V = m.num_experts, m.expert_width, m.vocab_size
    # NumPy, because compiling one jax.random.normal per leaf would take longer than most tests.
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def weight(*shape, fan_in):
        return jnp.asarray(_INIT_SCALE / math.sqrt(fan_in) * rng.normal(size=shape))

    def scale(*shape):
        # Not ones: a forgotten scale must show.
        return jnp.asarray(1.0 + 0.2 * rng.normal(size=shape))

    attention = {
        "attention_norm": {"scale": scale(L, D)},
        "attention": {
            "query": weight(L, D, H, A, fan_in=D),
            "key": weight(L, D, G, A, fan_in=D),
            "value": weight(L, D, G, A, fan_in=D),
            "out": weight(L, H, A, D, fan_in=H * A),
        },
        "post_norm": {"scale": scale(L, D)},
        "router": {"kernel": weight(L, D, E, fan_in=D)},
    }
    expert = {
        "experts": {
            "gate": weight(L, E, D, F, fan_in=D),
            "up": weight(L, E, D, F, fan_in=D),
            "down": weight(L, E, F, D, fan_in=F),
        }
    }
    if m.num_shared_experts > 0:
        shared_E = m.num_shared_experts
        expert["shared_experts"] = {
            "gate": weight(L, shared_E, D, F, fan_in=D),
            "up": weight(L, shared_E, D, F, fan_in=D),
            "down": weight(L, shared_E, F, D, fan_in=F),
        }
    vocabulary = {
        "embedding": weight(V, D, fan_in=1),
        "head": weight(V, D, fan_in=D),
        "final_norm": scale(D),
    }
    return {"attention": attention, "expert": expert, "vocabulary": vocabulary}


def init_router_bias(config: Config) -> jax.Array:
    """Returns the selection bias [L, E] that training starts from."""
    return jnp.zeros((config.model.num_layers, config.model.num_experts))


def rms_norm(x_SD, scale_D, eps: float):
    mean_square_S1 = jnp.mean(x_SD**2, axis=-1, keepdims=True)
    return x_SD * jax.lax.rsqrt(mean_square_S1 + eps) * scale_D


def rope(x_SHA, theta: float):
    """Turns the pair (i, i + A/2) of the token at position t by the angle t * theta^(-2i/A)."""
    S, _, A = x_SHA.shape
    frequency = theta ** (-2.0 * np.arange(A // 2) / A)
    angle = np.arange(S)[:, None, None] * frequency  # [S, 1, A/2]
    cos, sin = np.cos(angle), np.sin(angle)
    x1, x2 = x_SHA[..., : A // 2], x_SHA[..., A // 2 :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def attention(model: ModelConfig, weights: dict, x_SD, segments_S=None):
    """Causal grouped-query attention of normed tokens [S, D]; returns [S, D].

    segments_S: number of each token's document; a token sees its own document only. None: all.
    """
    S = x_SD.shape[0]
    q_SHA = rope(jnp.einsum("sd,dha->sha", x_SD, weights["query"]), model.rope_theta)
    k_SGA = rope(jnp.einsum("sd,dga->sga", x_SD, weights["key"]), model.rope_theta)
    v_SGA = jnp.einsum("sd,dga->sga", x_SD, weights["value"])
    # Query head n reads key/value head n // (H / G).
    heads_per_group = model.num_heads // model.num_kv_heads
    k_SHA = jnp.repeat(k_SGA, heads_per_group, axis=1)
    v_SHA = jnp.repeat(v_SGA, heads_per_group, axis=1)
    logits_HSS = jnp.einsum("sha,tha->hst", q_SHA, k_SHA) / math.sqrt(model.head_dim)
    visible_SS = jnp.tril(jnp.ones((S, S), bool))
    if segments_S is not None:
        visible_SS &= segments_S[:, None] == segments_S
    logits_HSS = jnp.where(visible_SS, logits_HSS, -jnp.inf)
    attended_SHA = jnp.einsum("hst,tha->sha", jax.nn.softmax(logits_HSS, axis=-1), v_SHA)
    return jnp.einsum("sha,had->sd", attended_SHA, weights["out"])


def capacity(model: ModelConfig, S: int) -> float:
    """Returns how many tokens of one sequence of S an expert keeps."""
    if model.capacity_factor is None:
        return math.inf
    return math.ceil(Fraction(str(model.capacity_factor)) * S * model.top_k / model.num_experts)


def route(model: ModelConfig, logits_SE, bias_E) -> Routing:
    """Chooses experts for the tokens of one sequence; `bias_E` moves the choice, not the gates."""
    S, E = logits_SE.shape
    if model.router_score == RouterScore.SOFTMAX:
        scores_SE = jax.nn.softmax(logits_SE, axis=-1)
    else:
        scores_SE = jax.nn.sigmoid(logits_SE)
    preference_SE = jax.lax.stop_gradient(scores_SE + bias_E)
    # A stable sort of the negative: best first, ties to the lower index.
    experts_SK = jnp.argsort(-preference_SE, axis=-1, stable=True)[:, : model.top_k]
    chosen_SE = jnp.any(experts_SK[:, :, None] == jnp.arange(E), axis=1)

    gates_SE = jnp.where(chosen_SE, scores_SE, 0.0)
    if model.normalize_gates:
        gates_SE = gates_SE / jnp.sum(gates_SE, axis=-1, keepdims=True)
    gates_SE = model.gate_scale * gates_SE

    earlier_SE = jnp.cumsum(chosen_SE, axis=0) - chosen_SE  # earlier tokens with the same choice
    kept_SE = chosen_SE & (earlier_SE < capacity(model, S))
    return Routing(scores_SE, chosen_SE, kept_SE, gates_SE)


def swiglu(gate_DF, up_DF, down_FD, x_SD):
    return (jax.nn.silu(x_SD @ gate_DF) * (x_SD @ up_DF)) @ down_FD


def experts(weights: dict, routing: Routing, x_SD):
    """Returns the gated sum of the routed experts and the sum of the shared ones, [S, D]."""
    routed = weights["experts"]
    # Every expert for every token, experts along the leading axis.
    out_ESD = jax.vmap(swiglu, in_axes=(0, 0, 0, None))(
        routed["gate"], routed["up"], routed["down"], x_SD
    )
    kept_gates_SE = jnp.where(routing.kept, routing.gates, 0.0)
    y_SD = jnp.einsum("se,esd->sd", kept_gates_SE, out_ESD)
    if "shared_experts" in weights:
        # A shared expert is one that every token visits, with gate 1.
        shared = weights["shared_experts"]
        out_ESD = jax.vmap(swiglu, in_axes=(0, 0, 0, None))(
            shared["gate"], shared["up"], shared["down"], x_SD
        )
        y_SD += jnp.sum(out_ESD, axis=0)
    return y_SD


def layer_stats(model: ModelConfig, logits_SE, routing: Routing) -> LayerStats:
    S, E = logits_SE.shape
    counts_E = jnp.sum(routing.chosen, axis=0)
    f_E = E / (model.top_k * S) * counts_E
    shares_SE = routing.scores / jnp.sum(routing.scores, axis=-1, keepdims=True)
    return LayerStats(
        balance_loss=jnp.sum(f_E * jnp.mean(shares_SE, axis=0)),
        z_loss=jnp.mean(jax.nn.logsumexp(logits_SE, axis=-1) ** 2),
        expert_counts=counts_E,
        dropped=jnp.sum(routing.chosen & ~routing.kept),
    )


def forward(config: Config, params: dict, router_bias, tokens_S, segments_S=None):
    """Runs one sequence. Returns logits [S, V] and LayerStats with a leading layer axis."""
    model = config.model
    vocabulary = params["vocabulary"]

    def layer(h_SD, weights):
        attention_weights, expert_weights, bias_E = weights
        x_SD = rms_norm(h_SD, attention_weights["attention_norm"]["scale"], model.norm_eps)
        h_SD += attention(model, attention_weights["attention"], x_SD, segments_S)
        # One norm, read by the router and by the experts.
        x_SD = rms_norm(h_SD, attention_weights["post_norm"]["scale"], model.norm_eps)
        logits_SE = x_SD @ attention_weights["router"]["kernel"]
        routing = route(model, logits_SE, bias_E)
        h_SD += experts(expert_weights, routing, x_SD)
        return h_SD, layer_stats(model, logits_SE, routing)

    h_SD = vocabulary["embedding"][tokens_S]
    # A loop over the leading layer axis that compiles one layer.
    h_SD, stats = jax.lax.scan(layer, h_SD, (params["attention"], params["expert"], router_bias))
    x_SD = rms_norm(h_SD, vocabulary["final_norm"], model.norm_eps)
    return x_SD @ vocabulary["head"].T, stats


def token_losses(config: Config, params: dict, router_bias, sequence):
    """Returns the negative log likelihood [S] of one sequence's labels, and its LayerStats.

    sequence: its tokens [S], its labels [S] (a negative one has no loss) and, unless it is None,
    the number of each token's document, [S].
    """
    tokens_S, labels_S, segments_S = sequence
    logits_SV, stats = forward(config, params, router_bias, tokens_S, segments_S)
    log_probs_SV = jax.nn.log_softmax(logits_SV, axis=-1)
    nll_S = -jnp.take_along_axis(log_probs_SV, labels_S[:, None], axis=-1)[:, 0]
    return jnp.where(labels_S >= 0, nll_S, 0.0), stats


def loss(config: Config, params: dict, router_bias, sequences):
    """The loss of one optimizer step.

    Args:
      router_bias: [L, E], moves the choice of experts; no gradient reaches it.
      sequences: tokens, labels and document numbers (or None) of the whole global batch, [B, S]
        each.

    Returns:
      The total loss, and a dict of cross_entropy, balance_loss and z_loss (means, summed over
      layers, before their weights), expert_counts [L, E] (choices, dropped or not) and dropped [L]
      (pairs of token and expert).
    """
    nll_BS, stats = jax.vmap(lambda sequence: token_losses(config, params, router_bias, sequence))(
        sequences
    )
    _, labels_BS, _ = sequences
    cross_entropy = jnp.sum(nll_BS) / jnp.sum(labels_BS >= 0)
    # All sequences have S tokens: the mean of their token means is the mean over tokens.
    balance_loss = jnp.sum(jnp.mean(stats.balance_loss, axis=0))
    z_loss = jnp.sum(jnp.mean(stats.z_loss, axis=0))
    total = (
        cross_entropy
        + config.model.balance_loss_weight * balance_loss
        + config.model.z_loss_weight * z_loss
    )
    aux = {
        "cross_entropy": cross_entropy,
        "balance_loss": balance_loss,
        "z_loss": z_loss,
        "expert_counts": jnp.sum(stats.expert_counts, axis=0),
        "dropped": jnp.sum(stats.dropped, axis=0),
    }
    return total, aux


def loss_and_grads(config: Config, params: dict, router_bias, sequences):
    """Returns ((total, aux), grads), the gradients as the logical tree."""

    def loss_of(params):
        return loss(config, params, router_bias, sequences)

    return jax.value_and_grad(loss_of, has_aux=True)(params)


def learning_rate(config: Config) -> optax.Schedule:
    """Returns the schedule over the 0-based step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.optimizer.peak_learning_rate,
        warmup_steps=config.optimizer.warmup_steps,
        decay_steps=config.run.num_steps,
        end_value=config.optimizer.final_learning_rate,
    )


def decayed(params: dict) -> dict:
    """Returns True for the leaves that weight decay shrinks: two or more dims within a layer."""
    layer_axes = {"attention": 1, "expert": 1, "vocabulary": 0}
    return {
        part: jax.tree.map(lambda leaf, axes=layer_axes[part]: leaf.ndim - axes >= 2, tree)
        for part, tree in params.items()
    }


def make_optimizer(config: Config) -> optax.GradientTransformation:
    optimizer = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(optimizer.max_grad_norm),
        optax.adamw(
            learning_rate(config),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            mask=decayed,
            mu_dtype=None if optimizer.mu_dtype is MuDtype.MASTER else jnp.bfloat16,
        ),
    )


def update_router_bias(config: Config, router_bias, counts_LE):
    """Raises the bias of experts chosen less often than their layer's mean, lowers the others'."""
    rate = config.model.bias_update_rate
    if rate == 0:
        return router_bias
    return router_bias + rate * jnp.sign(jnp.mean(counts_LE, axis=1, keepdims=True) - counts_LE)


def train_step(config: Config, params: dict, opt_state, router_bias, sequences):
    """Takes one optimizer step; the optimizer state, `make_optimizer(...).init`, counts the steps.

    Returns:
      Params, optimizer state and router bias after the step, and `loss`'s aux of the parameters
      before it, with the total as "loss" and the norm before clipping as "grad_norm".
    """
    (total, aux), grads = loss_and_grads(config, params, router_bias, sequences)
    updates, opt_state = make_optimizer(config).update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    router_bias = update_router_bias(config, router_bias, aux["expert_counts"])
    aux = aux | {"loss": total, "grad_norm": optax.tree.norm(grads)}
    return params, opt_state, router_bias, aux
