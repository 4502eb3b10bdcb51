"""The model's mathematics on one device, each piece against loops over single rows and heads."""

import functools
import itertools
import math
import re

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from layers import attention, head, permute, recall, router
from layers.norm import RMSNorm, rms_norm

assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def assert_trees_close(actual, expected):
    jax.tree.map(assert_close, actual, expected)


def random_module(make):
    """(graphdef, parameters) of the module that `make` would make, filled by NumPy."""
    # Compiling JAX's random numbers would take longer than most tests.
    graphdef, state = nnx.split(nnx.eval_shape(make))
    params = nnx.to_pure_dict(state)
    seeds = itertools.count()
    return graphdef, jax.tree.map(lambda w: 0.5 * normal(*w.shape, seed=next(seeds)), params)


# Norm


def test_rms_norm_is_the_formula_row_by_row():
    x, scale, eps = normal(2, 3, 5), normal(5, seed=1), 0.1
    actual = jax.jit(rms_norm)(x, scale, eps)
    for index in np.ndindex(2, 3):
        row = x[index]
        assert_close(actual[index], row / math.sqrt(np.mean(row**2) + eps) * scale)
    graphdef, params = random_module(lambda: RMSNorm(5, eps, dtype=jnp.float64))
    module = nnx.merge(graphdef, params)
    assert_close(module(x), jax.jit(rms_norm)(x, params["scale"], eps))


def test_rms_norm_in_bfloat16_keeps_statistics_and_scale_gradient_wide():
    x, dy = (normal(1000, 8, seed=s).astype(jnp.bfloat16) for s in (0, 1))
    scale = 1 + 0.1 * normal(8, seed=2).astype(np.float32)

    @jax.jit
    def norm_and_scale_gradient(x, scale, dy):
        y, vjp = jax.vjp(lambda scale: rms_norm(x, scale, 1e-6), scale)
        return y, vjp(dy)[0]

    y, dscale = norm_and_scale_gradient(x, scale, dy)
    exact = norm_and_scale_gradient(*(np.float64(array) for array in (x, scale, dy)))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(y), exact[0], rtol=2.0**-8)
    np.testing.assert_allclose(dscale, exact[1], rtol=1e-5, atol=1e-4)


# Attention


def rotated(vector, position, theta):
    """RoPE of one head's vector, pair by pair."""
    half = len(vector) // 2
    out = np.empty_like(vector)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(vector))
        low, high = vector[i], vector[i + half]
        out[i] = low * math.cos(angle) - high * math.sin(angle)
        out[i + half] = high * math.cos(angle) + low * math.sin(angle)
    return out


APPLY_ROPE = jax.jit(attention.apply_rope, static_argnums=1)


def test_rope_rotates_each_pair_by_its_angle():
    x, theta = normal(2, 5, 3, 6), 100.0
    actual = APPLY_ROPE(x, theta)
    for b, s, h in np.ndindex(2, 5, 3):
        assert_close(actual[b, s, h], rotated(x[b, s, h], s, theta))


def test_rope_scores_depend_on_the_distance_alone():
    q, k = np.broadcast_to(normal(2, 1, 1, 1, 6), (2, 1, 9, 1, 6))
    q, k = (APPLY_ROPE(x, 100.0)[0, :, 0] for x in (q, k))
    scores = q @ k.T
    for distance in range(-8, 9):
        diagonal = np.diagonal(scores, distance)
        assert_close(diagonal, diagonal[0])


def test_rope_in_bfloat16_counts_past_256():
    x = jnp.asarray(normal(1, 300, 1, 4), jnp.bfloat16)
    actual = APPLY_ROPE(x, 10_000.0)
    expected = APPLY_ROPE(x.astype(jnp.float32), 10_000.0).astype(jnp.bfloat16)
    np.testing.assert_array_equal(actual, expected)


@functools.partial(jax.jit, static_argnums=3)
def CAUSAL_ATTENTION(*args):
    return attention.causal_attention(*args).out


def attention_of_one_head(q_SA, k_SA, v_SA):
    out = np.empty_like(q_SA)
    for s in range(len(q_SA)):
        scores = k_SA[: s + 1] @ q_SA[s] / math.sqrt(q_SA.shape[1])
        weights = np.exp(scores - scores.max())
        out[s] = weights / weights.sum() @ v_SA[: s + 1]
    return out


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_causal_attention_is_a_loop_over_heads(groups):
    q, k, v = normal(2, 5, 4, 6), normal(2, 5, groups, 6, seed=1), normal(2, 5, groups, 6, seed=2)
    actual = CAUSAL_ATTENTION(q, k, v, attention.AttentionKernel.EINSUM)
    for b, h in np.ndindex(2, 4):
        g = h // (4 // groups)
        expected = attention_of_one_head(q[b, :, h], k[b, :, g], v[b, :, g])
        assert_close(actual[b, :, h], expected)


def test_causal_attention_within_segments_is_that_of_each_alone():
    q, k, v = (normal(1, 5, heads, 6, seed=heads) for heads in (4, 2, 2))
    kernel = attention.AttentionKernel.EINSUM
    actual = CAUSAL_ATTENTION(q, k, v, kernel, np.array([[3, 3, 5, 5, 5]]))
    for part in (np.s_[:, :2], np.s_[:, 2:]):
        assert_close(actual[part], CAUSAL_ATTENTION(q[part], k[part], v[part], kernel))


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("segments", [None, [[3, 3, 5, 5, 5]] * 2])
def test_gradients_of_attention_are_those_of_its_formula(groups, segments):
    qkv = normal(2, 5, 4, 6), normal(2, 5, groups, 6, seed=1), normal(2, 5, groups, 6, seed=2)
    kernel, dout = attention.AttentionKernel.EINSUM, normal(2, 5, 4, 6, seed=3)
    sees = np.tril(np.ones((2, 5, 5), bool))
    if segments:
        segments = np.array(segments)
        sees &= segments[:, :, None] == segments[:, None, :]

    def formula(q, k, v):
        k, v = (jnp.repeat(x, 4 // groups, axis=2) for x in (k, v))
        scores = jnp.einsum("bsha,btha->bhst", q, k) / math.sqrt(6)
        weights = jax.nn.softmax(jnp.where(sees[:, None], scores, -jnp.inf))
        return jnp.einsum("bhst,btha->bsha", weights, v)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(function, *kept):
        return jax.vjp(lambda *qkv: function(*qkv, *kept), *qkv)[1](dout)

    def ours(q, k, v, *kept):
        return attention.causal_attention(q, k, v, kernel, segments, *kept).out

    expected = gradients(formula)
    assert_trees_close(gradients(ours), expected)
    kept = attention.causal_attention(*qkv, kernel, segments)
    assert_trees_close(gradients(ours, kept), expected)
    assert_close(ours(*qkv, attention.Attended(2 * kept.out, kept.lse)), 2 * kept.out)


def test_what_is_kept_is_taken_and_its_gradient_computed():
    function = lambda x, w: jnp.tanh(x @ w)  # noqa: E731
    x, w, cotangent = normal(3, 4), normal(4, 2, seed=1), normal(3, 2, seed=2)
    value, vjp = jax.vjp(function, x, w)
    again, recalled_vjp = jax.vjp(lambda x, w: recall.recalled(function, 2 * value, x, w), x, w)
    assert_close(again, 2 * value)
    assert_trees_close(recalled_vjp(cotangent), vjp(cotangent))


def test_attention_module_is_projections_around_a_loop_over_heads():
    make = lambda: attention.Attention(  # noqa: E731
        d_model=8, num_heads=4, num_kv_heads=2, head_dim=6, rope_theta=100.0,
        init_std=0.5, out_init_std=0.5, dtype=jnp.float64, rngs=nnx.Rngs(0),
    )  # fmt: skip
    graphdef, w = random_module(make)
    x = normal(2, 5, 8)
    expected = np.zeros_like(x)
    for b, h in np.ndindex(2, 4):
        g = h // 2
        q, k = x[b] @ w["query"][:, h], x[b] @ w["key"][:, g]
        q, k = (np.stack([rotated(r, s, 100.0) for s, r in enumerate(rows)]) for rows in (q, k))
        expected[b] += attention_of_one_head(q, k, x[b] @ w["value"][:, g]) @ w["out"][h]
    assert_close(jax.jit(lambda w, x: nnx.merge(graphdef, w)(x))(w, x), expected)


def test_default_kernel_is_einsum_without_a_gpu():
    assert attention.default_kernel(jnp.bfloat16) is attention.AttentionKernel.EINSUM


# Router


def test_choose_experts_takes_the_best_first_and_ties_to_the_lower_id():
    scores = jnp.asarray([[0.1, 0.4, 0.2, 0.3], [0.5, 0.5, 0.5, 0.5], [0.1, 0.3, 0.3, 0.3]])
    ids = router.choose_experts(scores, jnp.zeros(4), 3)
    np.testing.assert_array_equal(ids, [[1, 3, 2], [0, 1, 2], [1, 2, 3]])
    assert ids.dtype == jnp.int32


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.int8, (4, 5), elements=st.integers(0, 3)),
    hnp.arrays(np.int8, 5, elements=st.integers(-3, 3)),
)
def test_choose_experts_is_a_stable_sort_of_score_plus_bias(scores, bias):
    expected = np.argsort(-(scores + bias), axis=1, kind="stable")[:, :3]
    scores, bias = scores.astype(np.float64), bias.astype(np.float64)
    np.testing.assert_array_equal(CHOOSE_THREE(scores, bias), expected)
    # As on a GPU.
    np.testing.assert_array_equal(THREE_IN_TURN(scores + bias), expected)


CHOOSE_THREE = jax.jit(functools.partial(router.choose_experts, top_k=3))
THREE_IN_TURN = jax.jit(functools.partial(router.largest_in_turn, count=3))


def test_router_scores():
    logits = normal(5, 3)
    exp = np.exp(logits)
    assert_close(router.router_scores(logits, "softmax"), exp / exp.sum(1, keepdims=True))
    assert_close(router.router_scores(logits, "sigmoid"), exp / (1 + exp))
    with pytest.raises(ValueError, match="'softmax' or 'sigmoid'"):
        router.router_scores(logits, "tanh")


def logits_of_router(dtype):
    """Logits by `Router` as a function of (kernel, scale, x), which have the type."""
    width, experts, eps = 8, 3, 0.01

    def modules(rngs):
        made = router.Router(d_model=width, num_experts=experts, init_std=1, dtype=dtype, rngs=rngs)
        return {"router": made, "norm": RMSNorm(width, eps, dtype=dtype)}

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: modules(nnx.Rngs(0))))

    def logits(kernel, scale, x):
        merged = nnx.merge(graphdef, {"router": {"kernel": kernel}, "norm": {"scale": scale}})
        return merged["router"](x, merged["norm"])

    def of_normed_rows(kernel, scale, x):
        return rms_norm(x, scale, eps) @ kernel

    return (
        logits,
        of_normed_rows,
        [normal(width, experts), 1 + 0.1 * normal(width), normal(50, width)],
    )


def test_logits_and_their_gradients_are_those_of_normed_rows():
    logits, of_normed_rows, inputs = logits_of_router(jnp.float64)
    dlogits = normal(50, 3, seed=1)
    found, expected = (
        jax.jit(lambda *inputs, f=f: (f(*inputs), jax.vjp(f, *inputs)[1](dlogits)))(*inputs)
        for f in (logits, of_normed_rows)
    )
    assert_trees_close(found, expected)


def test_a_bfloat16_router_is_within_its_rounding():
    logits, of_normed_rows, inputs = logits_of_router(jnp.bfloat16)
    inputs = [jnp.asarray(value, jnp.bfloat16) for value in inputs]
    dlogits = normal(50, 3, seed=1).astype(np.float32)
    y, dinputs = jax.jit(lambda *inputs: (logits(*inputs), jax.vjp(logits, *inputs)[1](dlogits)))(
        *inputs
    )
    assert y.dtype == jnp.float32

    wide = [np.asarray(value, np.float64) for value in inputs]
    exact = jax.vjp(of_normed_rows, *wide)
    exact_y, exact_dinputs = exact[0], exact[1](dlogits.astype(np.float64))
    # What is summed, without its signs.
    kernel, scale, x = map(np.abs, wide)
    weights, dy = scale[:, None] * kernel, np.abs(dlogits)
    factor = np.abs(rms_norm(wide[2], np.ones(8), 0.01) / wide[2])[:, :1]
    terms_y, to_kernel = factor * (x @ weights), x.T @ (factor * dy)
    through_norm = x * factor**2 * np.sum(dy * terms_y, axis=1, keepdims=True) / 8
    terms = [
        to_kernel * scale[:, None],
        np.sum(to_kernel * kernel, axis=1),
        (factor * dy) @ weights.T + through_norm,
    ]
    # Half a unit of the last of eight digits, of each term and of the sum.
    for found, true, of_it in zip(
        [y, *dinputs], [exact_y, *exact_dinputs], [terms_y, *terms], strict=True
    ):
        found, true = np.asarray(found, np.float64), np.asarray(true)
        assert np.all(np.abs(found - true) <= 2**-8 * (1.01 * of_it + np.abs(true)))


@pytest.mark.parametrize("normalize", [True, False])
def test_gates_and_their_gradient_are_those_of_a_gather(normalize):
    scores, ids, dgate = np.exp(normal(6, 5)), np.argsort(normal(6, 5, seed=1))[:, :3], normal(6, 3)

    def gathered(scores):
        chosen = jnp.take_along_axis(scores, ids, axis=1)
        return 2.5 * (chosen / chosen.sum(axis=1, keepdims=True) if normalize else chosen)

    def gates_at(scores):
        return router.gates_at(scores, jnp.asarray(ids), normalize=normalize, scale=2.5)

    @jax.jit
    def both(scores, dgate):
        gates, vjp = jax.vjp(gates_at, scores)
        expected, expected_vjp = jax.vjp(gathered, scores)
        return (gates, vjp(dgate)), (expected, expected_vjp(dgate))

    assert_trees_close(*both(scores, dgate))


def test_balance_loss_is_the_double_sum_and_has_no_gradient_through_the_counts():
    scores = np.exp(normal(2, 6, 4))
    ids = np.argsort(-scores, axis=-1)[..., :2]
    counts = router.choice_counts(jnp.asarray(ids), 4)
    actual = router.balance_loss(jnp.asarray(scores), counts, 2)
    for b in range(2):
        loss = 0.0
        for e in range(4):
            assert counts[b, e] == (ids[b] == e).sum()
            fraction = (ids[b] == e).sum() * 4 / (2 * 6)
            loss += fraction * np.mean(scores[b, :, e] / scores[b].sum(axis=1))
        assert_close(actual[b], loss)


def test_balance_loss_is_one_when_even():
    ids = np.arange(24).reshape(2, 6, 2) % 4
    counts = router.choice_counts(jnp.asarray(ids), 4)
    assert_close(router.balance_loss(jnp.full((2, 6, 4), 0.25), counts, 2), 1)


def test_z_loss_is_the_squared_log_partition_and_does_not_overflow():
    logits = normal(5, 4)
    assert_close(router.z_loss(logits), np.log(np.exp(logits).sum(axis=1)) ** 2)
    assert_close(router.z_loss(jnp.full((1, 4), 1e4)), (1e4 + math.log(4)) ** 2)


def kept_by_counting(ids_BSK, num_experts, capacity):
    kept = np.empty(ids_BSK.shape, bool)
    for b, sequence in enumerate(ids_BSK):
        taken = [0] * num_experts
        for s, choices in enumerate(sequence):
            for k, expert in enumerate(choices):
                kept[b, s, k] = taken[expert] < capacity
                taken[expert] += 1
    return kept


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.int8, (2, 6, 4)), st.integers(1, 7))
def test_within_capacity_keeps_the_first_tokens_of_each_sequence(scores, capacity):
    ids = np.argsort(scores, axis=-1, kind="stable")[..., :2]
    kept = WITHIN_CAPACITY(ids, capacity)
    np.testing.assert_array_equal(kept, kept_by_counting(ids, 4, capacity))


WITHIN_CAPACITY = jax.jit(lambda ids, capacity: router.within_capacity(ids, 4, capacity))


def test_expert_capacity_rounds_up():
    assert router.expert_capacity(1.0, 8, 2, 6) == 3
    assert router.expert_capacity(0.75, 8, 2, 6) == 2
    assert router.expert_capacity(0.01, 8, 2, 6) == 1


def test_updated_bias_steps_towards_the_mean_load():
    bias, counts = normal(2, 4), np.array([[4, 0, 2, 2], [3, 3, 3, 3]])
    expected = bias + 0.1 * np.array([[-1, 1, 0, 0], [0, 0, 0, 0]])
    assert_close(router.updated_bias(jnp.asarray(bias), jnp.asarray(counts), 0.1), expected)


# Permute


@st.composite
def routes(draw):
    """(source [9], position [4, 3]) for a random set of places of each of 4 rows."""
    places = draw(st.permutations(range(9)))
    position, source = np.full((4, 3), -1, np.int32), np.full(9, -1, np.int32)
    for index, used in enumerate(draw(hnp.arrays(bool, 12))):
        if used and places:
            place = places.pop()
            position[index // 3, index % 3], source[place] = place, index // 3
    return source, position


def spread_matrix(source, num_rows):
    """[places, rows], 1 where the place holds the row."""
    return (source[:, None] == np.arange(num_rows)).astype(float)


@jax.jit
def both_ways(x, y, source, position):
    spread, spread_vjp = jax.vjp(lambda x: permute.spread(x, source, position), x)
    summed, summed_vjp = jax.vjp(lambda y: permute.gather_sum(y, position, source), y)
    return spread, spread_vjp(y)[0], summed, summed_vjp(x)[0]


@settings(max_examples=50, deadline=None)
@given(routes())
def test_spread_and_gather_sum_are_transposed_matrices_and_each_others_vjp(route):
    x, y = normal(4, 2), normal(9, 2, seed=1)
    matrix = spread_matrix(route[0], 4)
    spread, spread_vjp, summed, summed_vjp = both_ways(x, y, *route)
    assert_close(spread, matrix @ x)
    assert_close(summed, matrix.T @ y)
    np.testing.assert_array_equal(spread_vjp, summed)
    np.testing.assert_array_equal(summed_vjp, spread)


def test_an_empty_place_is_zero_whatever_row_zero_holds():
    x = jnp.asarray([[jnp.nan], [2.0]])
    np.testing.assert_array_equal(permute.take_rows(x, jnp.asarray([-1, 1])), [[0.0], [2.0]])


def test_gather_sum_of_bfloat16_rounds_once():
    ones = jnp.full((5, 1), 1 + 2.0**-7, jnp.bfloat16).at[0].set(256)
    total = permute.gather_sum(ones, jnp.arange(5)[None], jnp.zeros(5, jnp.int32))
    assert total.dtype == jnp.bfloat16
    np.testing.assert_array_equal(total, jnp.asarray([[256 + 4 * (1 + 2.0**-7)]], jnp.bfloat16))


# Head

TOKENS, WIDTH, VOCABULARY, EPS = 20, 6, 37, 0.1


def head_inputs():
    params = head.HeadParams(1 + 0.1 * normal(WIDTH), normal(VOCABULARY, WIDTH, seed=1))
    label = np.random.default_rng(2).integers(0, VOCABULARY, TOKENS)
    label[[0, 7, 8, 19]] = head.NO_LABEL
    return params, normal(TOKENS, WIDTH), label


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_logsumexp_in_one_pass(scale):
    x = scale * jax.random.normal(jax.random.key(0), (5, 77), jnp.float64)
    x = x.at[0].set(-1e300).at[1, 3].set(-jnp.inf)
    np.testing.assert_allclose(head.one_pass_logsumexp(x), jax.nn.logsumexp(x, axis=-1), rtol=1e-14)
    bad = jnp.array([[1.0, jnp.nan, 2.0], [1.0, jnp.inf, 2.0]])
    assert not np.isfinite(head.one_pass_logsumexp(bad)).any()


def naive_cross_entropy(params, h, label):
    x = h / jnp.sqrt(jnp.mean(h**2, axis=1, keepdims=True) + EPS) * params.final_norm
    probability = jax.nn.softmax(x @ params.head.T)
    chosen = probability[jnp.arange(len(label)), label]  # Without a label: any, masked below.
    return -jnp.sum(jnp.where(label == head.NO_LABEL, 0, jnp.log(chosen)))


@functools.partial(jax.jit, static_argnames="chunk")
def chunked(params, h, label, scale, grads, chunk):
    """(cross_entropy, *cross_entropy_and_grads)"""
    options = dict(eps=EPS, chunk=chunk)
    total = head.cross_entropy(params, h, label, **options)
    return total, *head.cross_entropy_and_grads(params, h, label, scale, grads, **options)


@jax.jit
def whole(params, h, label, scale, grads):
    """What `chunked` should return, by autodiff."""
    total, vjp = jax.vjp(lambda *args: naive_cross_entropy(*args, label), params, h)
    dparams, dh = vjp(scale)
    return total, total, dh, jax.tree.map(jnp.add, grads, dparams)


@pytest.mark.parametrize("chunk", [8, 5, 64])
def test_cross_entropy_in_chunks_and_its_gradients_equal_the_whole(chunk):
    params, h, label = head_inputs()
    before = jax.tree.map(lambda w: normal(*w.shape, seed=5), params)
    inputs = (params, h, label, 0.3, before)
    assert_trees_close(chunked(*inputs, chunk=chunk), whole(*inputs))


def test_tokens_without_labels_count_for_nothing():
    params, h, label = head_inputs()
    zeros = jax.tree.map(np.zeros_like, params)
    outputs = chunked(params, h, np.full_like(label, head.NO_LABEL), 0.3, zeros, chunk=8)
    assert not any(x.any() for x in jax.tree.leaves(outputs))


def test_cross_entropy_does_not_overflow():
    params, h, label = head_inputs()
    params, zeros = params._replace(head=1e4 * params.head), jax.tree.map(np.zeros_like, params)
    outputs = chunked(params, h, label, 0.3, zeros, chunk=8)
    assert outputs[0] > 1e4
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(outputs))


def test_only_one_chunk_of_logits_exists():
    params, h, label = head_inputs()
    chunk = 8
    run = functools.partial(head.cross_entropy_and_grads, eps=EPS, chunk=chunk)
    text = jax.jit(run).lower(params, h, label, 1.0, params).as_text()
    shapes = {tuple(map(int, dims.split("x")[:-1])) for dims in re.findall(r"tensor<([^>]*)>", text)
              if "x" in dims}  # fmt: skip
    with_vocabulary = {shape for shape in shapes if VOCABULARY in shape}
    assert (chunk, VOCABULARY) in with_vocabulary
    assert max(map(math.prod, with_vocabulary)) == chunk * VOCABULARY
