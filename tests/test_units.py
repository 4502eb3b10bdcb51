"""Units alone: against plain formulas, and proof that backward units follow the saved routing.

The formulas are taken at given choices of experts, so they can be asked for choices that no top-k
would make.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from disag_jax.config import Recompute, SplitConfig
from disag_jax.dispatch import Cotangent, Message, plan_dispatch
from disag_jax.geometry import make_geometry
from disag_jax.model import POST_NORM
from disag_jax.stash import StashPool
from disag_jax.units import AttentionUnit, ExpertUnit
from layers.grouped_matmul import order_by_expert
from mesh.roles import Role
from tests import reference, support

TOP_K, NUM_EXPERTS, NUM_SHARED, CAPACITY = 3, 7, 2, 3
GEOMETRY = make_geometry(
    support.small_config(
        SplitConfig(attention_workers=2, expert_workers=3, bucket_factors=()),
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        num_shared_experts=NUM_SHARED,
        gate_scale=1.5,
        # ceil(0.8 * 8 tokens * 3 choices / 7 experts) = 3 tokens of a sequence for each expert.
        capacity_factor=0.8,
    )
)
MODEL = GEOMETRY.config.model
RANK = np.int32(1)
AUX_SCALES = np.array([0.3, 0.02])
NO_CHOICE = {"top_k", "approx_top_k", "sort", "argmax", "cumsum", "cummax", "reduce_window_sum"}

assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def random_like(template, seed=0):
    """A tree of random arrays, large enough that no gradient is trivial."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape), template)


def assert_trees_close(actual, expected):
    jax.tree.map(assert_close, actual, expected)


def differ(one, other):
    """Whether every leaf of two trees differs by more than rounding."""
    errors = jax.tree.leaves(jax.tree.map(support.relative_error, one, other))
    return min(errors) > 1e-3


# Attention


@functools.cache
def attention_unit():
    """(unit, parameters, bias, h)"""
    unit = AttentionUnit(GEOMETRY)
    return unit, random_like(unit.module.params), 0.1 * normal(GEOMETRY.E), normal(16, 16, seed=1)


@functools.cache
def attention_forward():
    """(message, stash, stats) of the unit, and the message's origin it was told."""
    unit, params, bias, h = attention_unit()
    origin = np.arange(GEOMETRY.R * GEOMETRY.C, dtype=np.int32).reshape(GEOMETRY.R, -1)
    outputs = jax.jit(unit.forward)(params, bias, h, origin, RANK)
    return jax.tree.map(np.asarray, outputs), origin


@functools.cache
def attention_backward():
    return jax.jit(attention_unit()[0].backward)


def plain_attention(params, h_TD, ids_TK):
    """(out [T, D], gates [T, K], balance loss sum, z-loss sum, scores [T, E]) at given choices."""
    g, outs, gates, balance, z, all_scores = GEOMETRY, [], [], 0.0, 0.0, []
    for first in range(0, g.T, g.S):
        h_SD, ids_SK = h_TD[first : first + g.S], ids_TK[first : first + g.S]
        normed = reference.rms_norm(h_SD, params["attention_norm"]["scale"], MODEL.norm_eps)
        out_SD = h_SD + reference.attention(MODEL, params["attention"], normed)
        normed = reference.rms_norm(out_SD, params["post_norm"]["scale"], MODEL.norm_eps)
        logits_SE = normed @ params["router"]["kernel"]
        scores_SE = jax.nn.softmax(logits_SE)
        chosen_SK = jnp.take_along_axis(scores_SE, ids_SK, axis=1)
        counts_E = jnp.bincount(ids_SK.reshape(-1), length=g.E)
        outs.append(out_SD)
        gates.append(MODEL.gate_scale * chosen_SK / chosen_SK.sum(axis=1, keepdims=True))
        balance += jnp.sum(counts_E * g.E / (g.S * g.K) * scores_SE.mean(axis=0))
        z += jnp.sum(jnp.log(jnp.sum(jnp.exp(logits_SE), axis=1)) ** 2)
        all_scores.append(scores_SE)
    return jnp.concatenate(outs), jnp.concatenate(gates), balance, z, jnp.concatenate(all_scores)


@jax.jit
def plain_attention_gradients(params, h_TD, ids_TK, dout_TD, dgates_TK):
    def objective(params, h_TD):
        out_TD, gates_TK, balance, z, _ = plain_attention(params, h_TD, ids_TK)
        total = jnp.sum(out_TD * dout_TD) + jnp.sum(gates_TK * dgates_TK)
        return total + AUX_SCALES[0] * balance + AUX_SCALES[1] * z

    return jax.grad(objective, argnums=(0, 1))(params, h_TD)


def per_token(dispatch, cotangent):
    """A message's cotangent as (dout [T, D], dgates [T, K]), row by row."""
    g = GEOMETRY
    dout_TD, dgates_TK = np.zeros((g.T, g.D)), np.zeros((g.T, g.K))
    for slot, row in np.ndindex(g.R, g.C):
        origin = dispatch.origin[slot * g.C + row]
        if origin == 0:
            continue
        token, receiver = (origin - 1) // g.F, (RANK + slot) % g.R
        dout_TD[token] += cotangent.x[slot, row]
        for k, expert in enumerate(dispatch.ids[token]):
            if dispatch.kept[token, k] and expert in g.places.share(receiver):
                dgates_TK[token, k] += cotangent.gate[slot, row, k]
    return dout_TD, dgates_TK


@functools.cache
def altered_dispatch():
    """Routing that shares no choice with the forward unit's, and other pairs dropped."""
    ids = attention_forward()[0][1].dispatch.ids
    others = [np.setdiff1d(np.arange(GEOMETRY.E), row)[:TOP_K] for row in ids]
    rng = np.random.default_rng(3)
    altered = np.array([rng.permutation(row) for row in others], np.int32)
    kept = rng.integers(0, 2, altered.shape, np.int32)
    plan = jax.jit(functools.partial(plan_dispatch, GEOMETRY))
    return jax.tree.map(np.asarray, plan(altered, kept, RANK)[0])


def random_cotangent(seed=4):
    g = GEOMETRY
    return Cotangent(normal(g.R, g.C, g.D, seed=seed), normal(g.R, g.C, g.K, seed=seed + 1))


def test_attention_forward_routes_by_score_plus_bias():
    _, params, bias, h = attention_unit()
    (message, stash, stats), origin = attention_forward()
    out, gates, balance, z, scores = jax.jit(plain_attention)(params, h, stash.dispatch.ids)
    expected = np.argsort(-(scores + bias), axis=1, kind="stable")[:, :TOP_K]
    np.testing.assert_array_equal(stash.dispatch.ids, expected)

    taken = np.zeros((2, NUM_EXPERTS), int)
    for token, row in enumerate(expected):
        sequence = token // GEOMETRY.S
        np.testing.assert_array_equal(stash.dispatch.kept[token], taken[sequence][row] < CAPACITY)
        taken[sequence][row] += 1
    assert 0 < stats.dropped == np.sum(stash.dispatch.kept == 0)
    np.testing.assert_array_equal(stats.counts, taken.sum(axis=0))
    assert_trees_close((stats.balance_loss, stats.z_loss), (balance, z))
    assert stats.rows_needed == (message.origin > 0).sum(axis=1).max()

    np.testing.assert_array_equal(stash.h, h)
    np.testing.assert_array_equal(stash.origin, origin)
    rows = np.argwhere(message.origin > 0)
    for slot, row in rows:
        token = (message.origin[slot, row] - 1) // GEOMETRY.F
        assert_close(message.x[slot, row], out[token])
        here = message.expert_id[slot, row] >= 0
        assert_close(message.gate[slot, row], np.where(here, gates[token], 0))


@pytest.mark.parametrize("altered", [False, True])
def test_attention_backward_follows_the_saved_choices(altered):
    _, params, _, h = attention_unit()
    stash = attention_forward()[0][1]
    if altered:
        stash = stash._replace(dispatch=altered_dispatch())
    cotangent = random_cotangent()
    grads = attention_backward()(params, stash, cotangent, RANK, AUX_SCALES)
    expected = plain_attention_gradients(
        params, h, stash.dispatch.ids, *per_token(stash.dispatch, cotangent)
    )
    assert_trees_close(grads, expected)


def test_the_altered_choices_have_other_gradients():
    params, stash = attention_unit()[1], attention_forward()[0][1]
    cotangent = random_cotangent()
    fresh, altered = (
        attention_backward()(params, s, cotangent, RANK, AUX_SCALES)
        for s in (stash, stash._replace(dispatch=altered_dispatch()))
    )
    assert differ(fresh, altered)
    assert not (stash.dispatch.ids[:, :, None] == altered_dispatch().ids[:, None]).any()


# Experts


@functools.cache
def expert_unit():
    """(unit, parameters)"""
    unit = ExpertUnit(GEOMETRY)
    params = random_like(unit.module.params)
    return unit, {**params, POST_NORM: {"scale": 1 + 0.2 * normal(GEOMETRY.D)}}


@functools.cache
def compiled_experts():
    unit, _ = expert_unit()

    def backward(params, stash, dy):
        """With the products of the weight gradients' factors."""
        dparams, cotangent = unit.backward(params, stash, dy)
        dense = {name: factors.dense(dy.dtype) for name, factors in dparams["experts"].items()}
        return {**dparams, "experts": dense}, cotangent

    return jax.jit(unit.forward), jax.jit(backward)


def random_message(seed):
    """A message [M, C] as attention workers would send: empty rows, absent experts, residuals."""
    g, rng = GEOMETRY, np.random.default_rng(seed)
    origin = rng.integers(0, g.T * g.F + 1, (g.M, g.C), dtype=np.int32)
    origin[rng.random((g.M, g.C)) < 0.3] = 0
    expert_id = rng.integers(-1, g.places.per_worker, (g.M, g.C, g.K), dtype=np.int32)
    expert_id[origin == 0] = -1
    x = np.where(origin[..., None] > 0, rng.normal(size=(g.M, g.C, g.D)), 0)
    gate = np.where(expert_id >= 0, rng.normal(size=expert_id.shape), 0)
    return Message(x, gate, expert_id, origin)


def plain_experts(params, x_nD, gate_nK, expert_id_nK, residual_n):
    """Every expert for every row, weighted by the gates that chose it; shared ones with gate 1."""
    normed = reference.rms_norm(x_nD, params[POST_NORM]["scale"], MODEL.norm_eps)
    weights, residual_n1 = params["experts"], residual_n[:, None]
    held = GEOMETRY.places.per_worker
    y_nD = residual_n1 * x_nD
    for expert in range(held + NUM_SHARED):
        out = reference.swiglu(*(weights[name][expert] for name in ("gate", "up", "down")), normed)
        gate_n1 = jnp.sum(jnp.where(expert_id_nK == expert, gate_nK, 0), axis=1, keepdims=True)
        y_nD += out * (gate_n1 if expert < held else residual_n1)
    return y_nD


@jax.jit
def plain_experts_and_vjp(params, stash, expert_id_nK, dy_nD):
    y, vjp = jax.vjp(
        lambda params, x, gate: plain_experts(params, x, gate, expert_id_nK, stash.residual),
        params, stash.x, stash.gate,
    )  # fmt: skip
    return y, *vjp(dy_nD)


@pytest.mark.parametrize("seed", [0, 1])
def test_experts_are_every_expert_on_every_row(seed):
    g, (forward, _) = GEOMETRY, compiled_experts()
    message = random_message(seed)
    sent, stash, needed = forward(expert_unit()[1], message)
    for name in ("gate", "expert_id", "origin"):
        np.testing.assert_array_equal(getattr(sent, name), getattr(message, name))
    ids, dy = message.expert_id.reshape(-1, g.K), np.zeros((g.M * g.C, g.D))
    y, *_ = plain_experts_and_vjp(expert_unit()[1], stash, ids, dy)
    assert_close(sent.x, y.reshape(sent.x.shape))
    first_copies = (message.origin > 0) & ((message.origin - 1) % g.F == 0)
    np.testing.assert_array_equal(stash.residual, first_copies.reshape(-1))
    sizes = np.bincount(ids[ids >= 0], minlength=g.places.per_worker)
    sizes = [*sizes, *[first_copies.sum()] * NUM_SHARED]
    assert needed == sum(-(-size // g.tile) * g.tile for size in sizes)


@pytest.mark.parametrize("altered", [False, True])
def test_expert_backward_follows_the_saved_order(altered):
    g, (forward, backward) = GEOMETRY, compiled_experts()
    params, message = expert_unit()[1], random_message(seed=0)
    stash = forward(params, message)[1]
    ids = message.expert_id.reshape(-1, g.K)
    dy = normal(g.M, g.C, g.D, seed=6)
    if altered:
        fresh = backward(params, stash, dy)
        ids = np.where(ids >= 0, (ids + 1) % g.places.per_worker, -1)
        stash = stash._replace(order=altered_order(ids, stash.residual))
        assert differ(fresh, backward(params, stash, dy))
    dparams, cotangent = backward(params, stash, dy)
    _, *expected = plain_experts_and_vjp(params, stash, ids, dy.reshape(-1, g.D))
    actual = dparams, cotangent.x.reshape(-1, g.D), cotangent.gate.reshape(-1, g.K)
    # A gate whose expert is elsewhere has no gradient; the formula agrees.
    assert_trees_close(actual, tuple(expected))


def altered_order(ids_nK, residual_n):
    g = GEOMETRY
    shared = np.where(residual_n[:, None], g.places.per_worker + np.arange(NUM_SHARED), -1)
    num_experts = g.places.per_worker + NUM_SHARED
    plan = jax.jit(lambda ids: order_by_expert(ids, num_experts, g.P, g.tile)[0])
    return plan(np.concatenate([ids_nK, shared], axis=1).astype(np.int32))


def test_an_empty_message_gives_zeros_and_no_gradients():
    forward, backward = compiled_experts()
    params, message = expert_unit()[1], random_message(seed=0)
    empty = Message(
        np.zeros_like(message.x), np.zeros_like(message.gate),
        np.full_like(message.expert_id, -1), np.zeros_like(message.origin),
    )  # fmt: skip
    sent, stash, needed = forward(params, empty)
    assert needed == 0 and not sent.x.any()
    grads = backward(params, stash, np.zeros_like(message.x))
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


# Both


def primitives(jaxpr) -> set[str]:
    """Names of a jaxpr's primitives, those of inner jaxprs included."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for inner in jaxprs_in_params(equation.params):
            names |= primitives(inner)
    return names


def attention_arguments():
    unit, params, bias, h = attention_unit()
    _, stash, _ = attention_forward()[0]
    forward = (params, bias, h, stash.origin, RANK)
    return unit, forward, (params, stash, random_cotangent(), RANK, AUX_SCALES)


def expert_arguments():
    unit, params = expert_unit()
    message = random_message(seed=0)
    stash = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), unit.stash_template())
    return unit, (params, message), (params, stash, message.x)


def backward_flops(recompute) -> list[float]:
    """Of the compiled backward units, by the compiler's count."""
    config = dataclasses.replace(
        GEOMETRY.config, run=dataclasses.replace(GEOMETRY.config.run, recompute=recompute)
    )
    geometry, counts = make_geometry(config), []
    for unit in (AttentionUnit(geometry), ExpertUnit(geometry)):
        params, stash = unit.module.params, unit.stash_template()
        if isinstance(unit, AttentionUnit):
            cotangent = Cotangent(
                geometry.floats(geometry.R, geometry.C, geometry.D),
                geometry.wides(geometry.R, geometry.C, geometry.K),
            )
            arguments = (params, stash, cotangent, geometry.ints(), geometry.wides(2))
        else:
            scale = {"scale": geometry.floats(geometry.D)}
            arguments = ({**params, POST_NORM: scale}, stash, stash.x)
        compiled = jax.jit(unit.backward).lower(*arguments).compile()
        counts.append(compiled.cost_analysis()["flops"])
    return counts


def test_less_is_computed_again_where_more_is_kept():
    full, selective, none = (backward_flops(recompute) for recompute in Recompute)
    assert full[0] > selective[0] > none[0]
    assert full[1] == selective[1] > none[1]


@pytest.mark.parametrize("arguments", [attention_arguments, expert_arguments])
def test_backward_units_choose_and_sort_nothing(arguments):
    unit, forward, backward = arguments()
    assert primitives(jax.make_jaxpr(unit.forward)(*forward).jaxpr) & NO_CHOICE
    assert not primitives(jax.make_jaxpr(unit.backward)(*backward).jaxpr) & NO_CHOICE


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("colocated", [False, True])
def test_stashes_have_their_template_and_survive_the_pool(role, colocated):
    templates = {
        Role.ATTENTION: AttentionUnit(GEOMETRY).stash_template(),
        Role.EXPERT: ExpertUnit(GEOMETRY).stash_template(),
    }
    pool = StashPool(templates, (2, 3), GEOMETRY.compute_dtype, colocated, MODEL.expert_width)
    if role is Role.ATTENTION:
        stash = attention_forward()[0][1]
    else:
        stash = compiled_experts()[0](expert_unit()[1], random_message(seed=0))[1]
    jax.tree.map(lambda leaf, spec: _assert_is(leaf, spec), stash, templates[role])
    other = jax.tree.map(np.zeros_like, stash)

    @jax.jit
    def write_and_read(stash, other):
        # Entries of the other role lie elsewhere where a worker plays both.
        others = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), templates[1 - role])
        words = pool.zeros()
        for slot, entry in ((0, other), (1, stash), (0, other)):
            words = pool.write(words, role, jnp.int32(slot), entry)
            if colocated:
                words = pool.write(words, Role(1 - role), jnp.int32(slot), others)
        return pool.read(words, role, jnp.int32(1)), pool.read(words, role, jnp.int32(0))

    jax.tree.map(np.testing.assert_array_equal, write_and_read(stash, other), (stash, other))
    assert pool.zeros().nbytes == pool.num_bytes


class _Deferred:
    """A product not yet made whose kernel writes it, by bits, into rows of a buffer."""

    def __init__(self, value):
        self.value = value

    def writes_in_place(self, word_dtype):
        return word_dtype == np.uint64

    def write_to(self, rows, first):
        assert rows.shape[1] == MODEL.expert_width
        self.first = first
        words = jax.lax.bitcast_convert_type(self.value, rows.dtype)
        return jax.lax.dynamic_update_slice(
            rows, words.reshape(-1, rows.shape[1]), (first, jnp.zeros_like(first))
        )


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("slot", [0, 2])
def test_a_kernel_finds_the_rows_of_what_it_keeps(slot, colocated):
    unit = ExpertUnit(keeping_geometry())
    templates = {
        Role.ATTENTION: AttentionUnit(GEOMETRY).stash_template(),
        Role.EXPERT: unit.stash_template(),
    }
    pool = StashPool(templates, (2, 3), GEOMETRY.compute_dtype, colocated, MODEL.expert_width)
    stash = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), templates[Role.EXPERT])
    products = normal(*templates[Role.EXPERT].products["gate_up"].shape)

    @jax.jit
    def write_and_read(products, slot):
        made = stash._replace(products={"gate_up": products})
        deferred = stash._replace(products={"gate_up": _Deferred(products)})
        pools = [pool.write(pool.zeros(), Role.EXPERT, slot, s) for s in (made, deferred)]
        first_row = deferred.products["gate_up"].first
        return pools, pool.read(pools[1], Role.EXPERT, slot), first_row

    (made, deferred), kept, first_row = write_and_read(products, jnp.int32(slot))
    np.testing.assert_array_equal(made, deferred)
    np.testing.assert_array_equal(kept.products["gate_up"], products)
    assert first_row % 8 == 0, "a kernel's copies begin at whole tiles"


def keeping_geometry():
    run = dataclasses.replace(GEOMETRY.config.run, recompute=Recompute.NONE)
    return make_geometry(dataclasses.replace(GEOMETRY.config, run=run))


def test_kept_products_are_those_that_are_sent_on():
    """With them a unit sends what it sends without."""
    unit, params, message = ExpertUnit(keeping_geometry()), expert_unit()[1], random_message(seed=0)
    sent, stash, needed = jax.jit(unit.forward)(params, message)
    expected, without, needed_without = jax.jit(ExpertUnit(GEOMETRY).forward)(params, message)
    assert_trees_close((sent, needed), (expected, needed_without))
    assert_trees_close(stash._replace(products={}), without)

    def twice(products):
        return {"gate_up": products["gate_up"] * jnp.array([1, 2])[:, None, None]}

    doubled = unit.finish(params, message, stash._replace(products=twice(stash.products)))
    residual = jnp.where(stash.residual[:, None] > 0, stash.x, 0).reshape(sent.x.shape)
    # Linear in the products with the up weights: they are read, not computed again.
    assert_close(doubled.x - residual, 2 * (sent.x - residual))


def _assert_is(leaf, spec):
    assert leaf.shape == spec.shape and leaf.dtype == spec.dtype
