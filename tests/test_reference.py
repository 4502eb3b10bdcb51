"""The oracle against brute force, finite differences and properties that need no oracle."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from disag_jax.config import BatchConfig, Config, ModelConfig, OptimizerConfig, RouterScore
from tests import reference

S = 12
CLOSE = {"rtol": 1e-12, "atol": 1e-13}

BASE = ModelConfig(
    vocab_size=19,
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    num_experts=5,
    top_k=2,
    expert_width=8,
)

VARIANTS = {
    "softmax": {},
    "softmax-plain-gates": {"normalize_gates": False, "gate_scale": 2.5},
    "sigmoid": {"router_score": RouterScore.SIGMOID, "num_shared_experts": 2, "gate_scale": 1.5},
    "sigmoid-plain-gates": {"router_score": RouterScore.SIGMOID, "normalize_gates": False},
    "dropping": {"capacity_factor": 0.6, "num_shared_experts": 1},
    "top-1": {"top_k": 1, "normalize_gates": False, "capacity_factor": 1.0},
    "every-expert": {"top_k": 5},
}
LOSSES = {"balance_loss_weight": 0.3, "z_loss_weight": 0.2}


def make_config(**model) -> Config:
    return Config(
        model=dataclasses.replace(BASE, **model),
        batch=BatchConfig(sequence_length=S, tokens_per_worker=S),
        optimizer=OptimizerConfig(warmup_steps=0),
    ).validate()


def make_inputs(config: Config, num_sequences: int = 3):
    """Returns params, a router bias that moves some choices, and sequences of one document."""
    rng = np.random.default_rng(1)
    params = reference.init(config, jax.random.key(1))
    bias = reference.init_router_bias(config)
    bias += 0.05 * rng.normal(size=bias.shape)
    drawn = jnp.asarray(rng.integers(config.model.vocab_size, size=(num_sequences, S + 1)))
    return params, bias, (drawn[:, :-1], drawn[:, 1:], None)


def random_logits():
    return jnp.asarray(np.random.default_rng(2).normal(size=(S, BASE.num_experts)))


def random_tokens():
    return jnp.asarray(np.random.default_rng(3).normal(size=(S, BASE.d_model)))


def stats_of(model: ModelConfig, logits_SE) -> reference.LayerStats:
    routing = reference.route(model, logits_SE, jnp.zeros(model.num_experts))
    return reference.layer_stats(model, logits_SE, routing)


def jitted(function, config: Config):
    return jax.jit(functools.partial(function, config))


def brute_force_experts(model, kernel_DE, weights, bias_E, x_SD):
    """One token and one expert at a time. Returns y [S, D], choices [S][k] and dropped pairs."""
    weights = jax.tree.map(np.asarray, weights)
    used = [0] * model.num_experts
    outputs, choices, dropped = [], [], []
    for position, x in enumerate(np.asarray(x_SD)):
        logits = x @ np.asarray(kernel_DE)
        if model.router_score == RouterScore.SOFTMAX:
            scores = np.exp(logits) / np.exp(logits).sum()
        else:
            scores = 1 / (1 + np.exp(-logits))
        order = sorted(range(model.num_experts), key=lambda e: (-(scores[e] + bias_E[e]), e))
        chosen = order[: model.top_k]
        total = sum(scores[e] for e in chosen) if model.normalize_gates else 1.0
        y = np.zeros_like(x)
        for e in chosen:
            used[e] += 1
            if model.capacity_factor is not None:
                load = model.capacity_factor * len(x_SD) * model.top_k / model.num_experts
                if used[e] > math.ceil(load):
                    dropped.append((position, e))
                    continue
            matrices = [weights["experts"][name][e] for name in ("gate", "up", "down")]
            y += model.gate_scale * scores[e] / total * brute_force_swiglu(*matrices, x)
        if model.num_shared_experts > 0:
            shared = weights["shared_experts"]
            for e in range(model.num_shared_experts):
                y += brute_force_swiglu(**{n: w[e] for n, w in shared.items()}, x=x)
        outputs.append(y)
        choices.append(chosen)
    return np.stack(outputs), choices, dropped


def brute_force_swiglu(gate, up, down, x):
    gated = x @ gate
    return (gated / (1 + np.exp(-gated)) * (x @ up)) @ down


@pytest.mark.parametrize("variant", VARIANTS)
def test_experts_match_brute_force(variant):
    config = make_config(**VARIANTS[variant])
    model = config.model
    params, bias_LE, _ = make_inputs(config)
    kernel_DE = params["attention"]["router"]["kernel"][0]
    weights = jax.tree.map(lambda leaf: leaf[0], params["expert"])
    x_SD = random_tokens()

    routing = reference.route(model, x_SD @ kernel_DE, bias_LE[0])
    y_SD = reference.experts(weights, routing, x_SD)
    stats = reference.layer_stats(model, x_SD @ kernel_DE, routing)

    expected_SD, choices, dropped = brute_force_experts(model, kernel_DE, weights, bias_LE[0], x_SD)
    np.testing.assert_allclose(y_SD, expected_SD, **CLOSE)
    counts = [sum(e in chosen for chosen in choices) for e in range(model.num_experts)]
    np.testing.assert_array_equal(stats.expert_counts, counts)
    pairs = np.argwhere(np.asarray(routing.chosen & ~routing.kept))
    assert sorted(map(tuple, pairs)) == sorted(dropped)
    assert stats.dropped == len(dropped)
    assert variant != "dropping" or len(dropped) > 0


def test_router_bias_moves_the_choice_but_not_the_gates():
    model = make_config(normalize_gates=False).model
    logits_SE = random_logits()
    routing = reference.route(model, logits_SE, jnp.array([0.0, 0.0, 0.0, 9.0, 8.0]))
    assert jnp.all(routing.chosen == jnp.array([False, False, False, True, True]))
    np.testing.assert_allclose(routing.gates[:, 3:], jax.nn.softmax(logits_SE)[:, 3:], **CLOSE)


def test_ties_go_to_the_lower_index():
    model = make_config().model
    routing = reference.route(model, jnp.zeros((S, model.num_experts)), jnp.zeros(5))
    assert jnp.all(routing.chosen == jnp.array([True, True, False, False, False]))


def test_huge_capacity_drops_nothing():
    logits_SE, bias_E = random_logits(), jnp.zeros(5)
    routing = reference.route(make_config(capacity_factor=100.0).model, logits_SE, bias_E)
    expected = reference.route(make_config().model, logits_SE, bias_E)
    jax.tree.map(np.testing.assert_array_equal, routing, expected)
    assert jnp.all(routing.kept == routing.chosen)


def test_tiny_capacity_keeps_the_first_token_of_each_expert():
    model = make_config(capacity_factor=1e-6).model
    routing = reference.route(model, random_logits(), jnp.zeros(5))
    for chosen_S, kept_S in zip(routing.chosen.T, routing.kept.T, strict=True):
        first = [int(jnp.argmax(chosen_S))] if jnp.any(chosen_S) else []
        assert np.flatnonzero(kept_S).tolist() == first


def test_normalized_gate_of_top_1_is_constant():
    # A config with it is refused: the router would learn nothing from the loss.
    model = dataclasses.replace(BASE, top_k=1, normalize_gates=True, gate_scale=2.5)
    gates = jax.jacobian(lambda logits_SE: reference.route(model, logits_SE, jnp.zeros(5)).gates)
    np.testing.assert_allclose(gates(random_logits()), 0.0, atol=1e-15)


@pytest.mark.parametrize("score", RouterScore)
def test_router_losses_of_uniform_scores(score):
    stats = stats_of(make_config(router_score=score).model, jnp.zeros((S, 5)))
    np.testing.assert_allclose(stats.balance_loss, 1.0, **CLOSE)
    np.testing.assert_allclose(stats.z_loss, math.log(5) ** 2, **CLOSE)


@pytest.mark.parametrize("score", RouterScore)
def test_balance_loss_of_uniform_choice_is_one(score):
    stats = stats_of(make_config(router_score=score, top_k=5).model, random_logits())
    np.testing.assert_allclose(stats.balance_loss, 1.0, **CLOSE)


def test_balance_loss_of_a_collapsed_router_is_the_number_of_experts():
    logits_SE = jnp.zeros((S, 5)).at[:, 2].set(50.0)
    stats = stats_of(make_config(top_k=1, normalize_gates=False).model, logits_SE)
    np.testing.assert_allclose(stats.balance_loss, 5.0, rtol=1e-12)


def test_losses_are_means_over_sequences_and_total_weighs_the_parts():
    config = make_config(capacity_factor=0.6, **LOSSES)
    params, bias, sequences = make_inputs(config)
    loss = jitted(reference.loss, config)
    total, aux = loss(params, bias, sequences)
    # A batch of one sequence thrice instead of once, so that the loss compiles once.
    alone = [
        loss(params, bias, jax.tree.map(lambda x, i=i: jnp.tile(x[i], (3, 1)), sequences))[1]
        for i in range(3)
    ]
    for name in ("cross_entropy", "balance_loss", "z_loss"):
        np.testing.assert_allclose(aux[name], np.mean([one[name] for one in alone]), **CLOSE)
    for name in ("expert_counts", "dropped"):
        np.testing.assert_array_equal(aux[name], sum(one[name] // 3 for one in alone))
    assert np.all(aux["expert_counts"].sum(axis=1) == 3 * S * config.model.top_k)
    expected = aux["cross_entropy"] + 0.3 * aux["balance_loss"] + 0.2 * aux["z_loss"]
    np.testing.assert_allclose(total, expected, **CLOSE)


def test_rope_is_a_rotation_of_the_halves():
    x_SHA = jnp.asarray(np.random.default_rng(0).normal(size=(S, 4, 6)))
    turned = np.asarray(reference.rope(x_SHA, theta=100.0))
    pairs = np.asarray(x_SHA[..., :3] + 1j * x_SHA[..., 3:])
    for position in range(S):
        for i in range(3):
            turn = np.exp(1j * position * 100.0 ** (-2 * i / 6))
            expected = pairs[position, :, i] * turn
            np.testing.assert_allclose(turned[position, :, i], expected.real, **CLOSE)
            np.testing.assert_allclose(turned[position, :, i + 3], expected.imag, **CLOSE)


def test_rope_products_depend_on_the_distance_alone():
    q_A, k_A = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6)))
    q_SA = reference.rope(jnp.tile(q_A, (S, 1, 1)), theta=100.0)[:, 0]
    k_SA = reference.rope(jnp.tile(k_A, (S, 1, 1)), theta=100.0)[:, 0]
    products_SS = q_SA @ k_SA.T
    np.testing.assert_allclose(products_SS[1:, 1:], products_SS[:-1, :-1], **CLOSE)
    assert abs(products_SS[1, 0] - products_SS[0, 1]) > 1e-3


def test_attention_matches_brute_force():
    config = make_config()
    model = config.model
    params, _, _ = make_inputs(config)
    weights = jax.tree.map(lambda leaf: leaf[0], params["attention"]["attention"])
    x_SD = random_tokens()
    expected_SD = np.zeros((S, model.d_model))
    for n in range(model.num_heads):
        group = n // (model.num_heads // model.num_kv_heads)
        q = np.asarray(reference.rope((x_SD @ weights["query"][:, n])[:, None], model.rope_theta))
        k = np.asarray(reference.rope((x_SD @ weights["key"][:, group])[:, None], model.rope_theta))
        v = np.asarray(x_SD @ weights["value"][:, group])
        for t in range(S):
            attended = np.exp(k[: t + 1, 0] @ q[t, 0] / math.sqrt(model.head_dim))
            attended = attended @ v[: t + 1] / attended.sum()
            expected_SD[t] += attended @ np.asarray(weights["out"][n])
    np.testing.assert_allclose(reference.attention(model, weights, x_SD), expected_SD, **CLOSE)


def test_grouped_queries_equal_repeated_key_value_heads():
    config = make_config()
    params, _, _ = make_inputs(config)
    weights = jax.tree.map(lambda leaf: leaf[0], params["attention"]["attention"])
    x_SD = random_tokens()
    grouped_SD = reference.attention(config.model, weights, x_SD)
    for name in ("key", "value"):
        weights[name] = weights[name][:, np.array([0, 0, 1, 1])]
    expected_SD = reference.attention(make_config(num_kv_heads=4).model, weights, x_SD)
    np.testing.assert_allclose(grouped_SD, expected_SD, **CLOSE)


def test_a_later_token_does_not_change_earlier_losses():
    config = make_config(capacity_factor=0.6, num_shared_experts=1)
    params, bias, sequences = make_inputs(config)
    token_losses = jitted(reference.token_losses, config)
    changed_at = 7
    tokens, labels, _ = jax.tree.map(lambda x: x[0], sequences)
    other = (tokens[changed_at] + 1) % config.model.vocab_size
    changed = (tokens.at[changed_at].set(other), labels.at[changed_at - 1].set(other), None)
    nll_S, _ = token_losses(params, bias, (tokens, labels, None))
    changed_nll_S, _ = token_losses(params, bias, changed)
    # The token at 7 is first read as the label of position 6.
    np.testing.assert_array_equal(nll_S[: changed_at - 1], changed_nll_S[: changed_at - 1])
    assert np.all(nll_S[changed_at - 1 :] != changed_nll_S[changed_at - 1 :])


def test_documents_do_not_see_each_other():
    config = make_config(num_shared_experts=1)
    params, bias, (tokens, labels, _) = make_inputs(config)
    token_losses = jitted(reference.token_losses, config)
    first = S // 2
    segments = jnp.asarray(np.arange(S) >= first, jnp.int32)
    nll_S, _ = token_losses(params, bias, (tokens[0], labels[0], segments))
    # The documents change places. RoPE counts distances only, so each may begin anywhere.
    moved = [jnp.roll(x[0], -first) for x in (tokens, labels)]
    moved_nll_S, _ = token_losses(params, bias, (*moved, jnp.roll(segments, -first)))
    np.testing.assert_allclose(nll_S, jnp.roll(moved_nll_S, first), **CLOSE)


def test_untrained_loss_of_a_zero_head_is_uniform():
    config = make_config()
    params, bias, sequences = make_inputs(config)
    params["vocabulary"]["head"] = jnp.zeros_like(params["vocabulary"]["head"])
    total, _ = jitted(reference.loss, config)(params, bias, sequences)
    np.testing.assert_allclose(total, math.log(config.model.vocab_size), **CLOSE)


@pytest.mark.parametrize("variant", ["sigmoid", "dropping", "top-1"])
def test_gradients_match_finite_differences(variant):
    config = make_config(**VARIANTS[variant], **LOSSES)
    params, bias, sequences = make_inputs(config)
    loss_and_grads = jitted(reference.loss_and_grads, config)
    _, grads = loss_and_grads(params, bias, sequences)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    for i, grad in enumerate(jax.tree.leaves(grads)):
        largest = np.unravel_index(np.argmax(np.abs(grad)), grad.shape)
        for entry in (largest, tuple(rng.integers(grad.shape))):
            totals = []
            for step in (1e-5, -1e-5):
                moved = [*leaves[:i], leaves[i].at[entry].add(step), *leaves[i + 1 :]]
                (total, _), _ = loss_and_grads(jax.tree.unflatten(tree, moved), bias, sequences)
                totals.append(total)
            difference = (totals[0] - totals[1]) / 2e-5
            np.testing.assert_allclose(grad[entry], difference, rtol=1e-6, atol=1e-9)
        assert np.abs(grad[largest]) > 1e-5, "a trivial gradient tests nothing"


def test_optimizer_is_clipped_adamw_with_decay_of_matrices_alone():
    config = make_config(num_shared_experts=1)
    optimizer = config.optimizer
    params = reference.init(config, jax.random.key(0))
    grads = reference.init(config, jax.random.key(1))
    norm = math.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(grads)))
    assert norm > optimizer.max_grad_norm

    @jax.jit
    def first_update(grads, params):
        transformation = reference.make_optimizer(config)
        return transformation.update(grads, transformation.init(params), params)[0]

    updates = jax.tree_util.tree_leaves_with_path(first_update(grads, params))
    leaves = [jax.tree.leaves(tree) for tree in (params, grads)]
    for (path, update), param, grad in zip(updates, *leaves, strict=True):
        clipped = np.asarray(grad) * optimizer.max_grad_norm / norm
        # The bias corrections of the first step undo b1 and b2.
        expected = clipped / (np.abs(clipped) + optimizer.eps)
        if "norm" not in jax.tree_util.keystr(path):
            expected += optimizer.weight_decay * np.asarray(param)
        expected *= -optimizer.peak_learning_rate
        np.testing.assert_allclose(update, expected, **CLOSE, err_msg=str(path))


def test_learning_rate_warms_up_from_zero_and_ends_at_the_final_rate():
    config = make_config()
    config.optimizer.warmup_steps = 4
    schedule = reference.learning_rate(config)
    rates = [float(schedule(step)) for step in (0, 1, 4, config.run.num_steps)]
    np.testing.assert_allclose(rates, [0.0, 1e-3 / 4, 1e-3, 1e-4], rtol=1e-6)


def test_router_bias_moves_against_the_load():
    config = make_config(bias_update_rate=0.01)
    bias_LE = jnp.zeros((2, 5))
    counts_LE = jnp.array([[10, 2, 6, 6, 6], [0, 0, 0, 0, 30]])
    expected = 0.01 * np.array([[-1, 1, 0, 0, 0], [1, 1, 1, 1, -1]])
    np.testing.assert_allclose(
        reference.update_router_bias(config, bias_LE, counts_LE), expected, **CLOSE
    )
    frozen = make_config(bias_update_rate=0.0)
    assert reference.update_router_bias(frozen, bias_LE, counts_LE) is bias_LE


def test_training_learns_a_batch_by_heart():
    config = make_config(bias_update_rate=0.01, balance_loss_weight=0.01)
    config.optimizer.peak_learning_rate = 1e-2
    params, bias, sequences = make_inputs(config)
    opt_state = reference.make_optimizer(config).init(params)
    train_step = jitted(reference.train_step, config)
    losses = []
    for _ in range(60):
        params, opt_state, bias, aux = train_step(params, opt_state, bias, sequences)
        losses.append(float(aux["loss"]))
    assert losses[-1] < 0.3 * losses[0]
    assert optax.tree_utils.tree_get(opt_state, "ScaleByAdamState").count == 60
