"""Dispatch of every attention worker, with the expert side played by NumPy and no devices.

A message's slots go from sender to receiver by one rule: slot r of attention rank i is for expert
worker (i + r) mod R, which returns its answer in the same slot.
"""

import dataclasses
import functools
import types

import hypothesis.extra.numpy as hnp
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disag_jax.config import SplitConfig
from disag_jax.dispatch import (
    combine,
    combine_cotangent,
    cotangent_template,
    dispatch_template,
    make_message,
    message_template,
    plan_dispatch,
)
from disag_jax.geometry import Bucket, make_geometry
from tests import support

SHAPES = {  # M, N, E, K
    "1-1": (1, 1, 6, 2), "3-2 uneven": (3, 2, 7, 3), "2-4 uneven": (2, 4, 6, 3),
    "1-3 top-1": (1, 3, 7, 1),
}  # fmt: skip
SHORT_ROWS = 3

EVERY_SHAPE = pytest.mark.parametrize("name", SHAPES)
FEW_EXAMPLES = settings(max_examples=20, deadline=None)


@functools.cache
def geometry_of(name, rows=None):
    """The worst-case geometry, or one with as many rows in a slot."""
    attention, expert, num_experts, top_k = SHAPES[name]
    split = SplitConfig(attention_workers=attention, expert_workers=expert, bucket_factors=())
    geometry = make_geometry(support.small_config(split, num_experts=num_experts, top_k=top_k))
    if rows is None:
        return geometry
    return dataclasses.replace(geometry, bucket=Bucket(rows, geometry.P))


@functools.cache
def compiled(function, name, rows=None):
    """`function` of this geometry, jitted, with NumPy results."""
    jitted = jax.jit(functools.partial(function, geometry_of(name, rows)))
    return lambda *args: jax.tree.map(np.asarray, jitted(*args))


@st.composite
def routings(draw, g):
    """One micro-batch at one attention worker: h, gate, ids (distinct within a token), kept."""
    # Shrinks to equal scores: every token chooses experts 0 .. K-1.
    scores = draw(hnp.arrays(np.int8, (g.T, g.E)))
    return types.SimpleNamespace(
        ids=np.argsort(scores, axis=1, kind="stable")[:, : g.K].astype(np.int32),
        kept=draw(hnp.arrays(np.int32, (g.T, g.K), elements=st.integers(0, 1))),
        h=np.random.default_rng(0).normal(size=(g.T, g.D)),
        gate=np.random.default_rng(1).normal(size=(g.T, g.K)),
    )


def plan_and_message(name, routing, rank, rows=None):
    """(Dispatch, rows needed, Message) of an attention rank."""
    dispatch, needed = compiled(plan_dispatch, name, rows)(routing.ids, routing.kept, rank)
    message = compiled(make_message, name, rows)(routing.h, routing.gate, dispatch, rank)
    return dispatch, needed, message


def holder(g, expert):
    """(worker, place on it) of an expert, by search."""
    for worker in range(g.places.num_workers):
        share = g.places.share(worker)
        if expert in share:
            return worker, share.index(expert)


def workers_needed(g, routing, token):
    """Workers that a token travels to: its first choice's, then those of other kept choices."""
    workers = [holder(g, routing.ids[token, 0])[0]]
    for expert, kept in zip(routing.ids[token], routing.kept[token], strict=True):
        if kept and holder(g, expert)[0] not in workers:
            workers.append(holder(g, expert)[0])
    return workers


def full_rows(g, message, rank):
    """(slot, row, receiving worker, token, copy) of each row that is not empty."""
    for slot, row in np.argwhere(message.origin > 0):
        token, copy = divmod(message.origin[slot, row] - 1, g.F)
        yield slot, row, (rank + slot) % g.R, token, copy


@EVERY_SHAPE
@FEW_EXAMPLES
@given(st.data())
def test_each_kept_pair_and_each_residual_arrives_once_where_its_expert_is(name, data):
    g = geometry_of(name)
    routing = data.draw(routings(g))
    for rank in range(g.M):
        _, _, message = plan_and_message(name, routing, rank)
        pairs, copies = np.zeros((g.T, g.K), int), np.zeros((g.T, g.F), int)
        for slot, row, worker, token, copy in full_rows(g, message, rank):
            copies[token, copy] += 1
            assert worker == workers_needed(g, routing, token)[copy]
            np.testing.assert_array_equal(message.x[slot, row], routing.h[token])
            for k, place in enumerate(message.expert_id[slot, row]):
                if place >= 0:
                    pairs[token, k] += 1
                    assert holder(g, routing.ids[token, k]) == (worker, place)
                    assert message.gate[slot, row, k] == routing.gate[token, k]
        np.testing.assert_array_equal(pairs, routing.kept)
        travelled = [len(workers_needed(g, routing, token)) for token in range(g.T)]
        np.testing.assert_array_equal(copies, np.arange(g.F) < np.array(travelled)[:, None])


@EVERY_SHAPE
@FEW_EXAMPLES
@given(st.data())
def test_other_rows_and_choices_are_empty(name, data):
    g = geometry_of(name)
    routing = data.draw(routings(g))
    _, _, message = plan_and_message(name, routing, rank=0)
    empty = message.origin == 0
    assert not message.x[empty].any()
    assert (message.expert_id[empty] == -1).all()
    assert not message.gate[message.expert_id < 0].any()
    assert empty[g.places.num_workers :].all()  # Rank 0's slot r is for worker r.


@EVERY_SHAPE
@FEW_EXAMPLES
@given(st.data())
def test_tables_invert_each_other_and_the_fullest_slot_is_reported(name, data):
    g = geometry_of(name)
    routing = data.draw(routings(g))
    for rank in range(g.M):
        dispatch, needed, message = plan_and_message(name, routing, rank)
        np.testing.assert_array_equal(dispatch.ids, routing.ids)
        np.testing.assert_array_equal(dispatch.kept, routing.kept)
        rows = np.flatnonzero(dispatch.origin)
        np.testing.assert_array_equal(dispatch.position.flat[dispatch.origin[rows] - 1], rows)
        assert np.sum(dispatch.position >= 0) == len(rows)
        assert needed == (message.origin > 0).sum(axis=1).max()
        assert needed <= g.C


@EVERY_SHAPE
@FEW_EXAMPLES
@given(st.data())
def test_overflow_is_reported_and_leaves_out_the_copies_past_the_last_row(name, data):
    whole = geometry_of(name)
    routing = data.draw(routings(whole))
    for rank in range(whole.M):
        expected_dispatch, expected_needed, expected = plan_and_message(name, routing, rank)
        dispatch, needed, message = plan_and_message(name, routing, rank, SHORT_ROWS)
        assert needed == expected_needed
        jax.tree.map(
            lambda actual, full: np.testing.assert_array_equal(actual, full[:, :SHORT_ROWS]),
            message, expected,
        )  # fmt: skip
        fits = (expected_dispatch.position >= 0) & (
            expected_dispatch.position % whole.C < SHORT_ROWS
        )
        np.testing.assert_array_equal(dispatch.position >= 0, fits)


def finished(g, message, rank):
    """What the expert workers return, if expert e multiplies a row by e + 1."""
    x = np.zeros_like(message.x)
    for slot, row, worker, _, copy in full_rows(g, message, rank):
        local = message.expert_id[slot, row]
        factor = sum(
            gate * (g.places.share(worker)[place] + 1)
            for gate, place in zip(message.gate[slot, row], local, strict=True)
            if place >= 0
        )
        x[slot, row] = (factor + (copy == 0)) * message.x[slot, row]
    return message._replace(x=x)


@EVERY_SHAPE
@FEW_EXAMPLES
@given(st.data())
def test_combine_of_what_the_experts_return_is_the_layer(name, data):
    g = geometry_of(name)
    routing = data.draw(routings(g))
    factor = 1 + np.sum(routing.kept * routing.gate * (routing.ids + 1), axis=1, keepdims=True)
    for rank in range(g.M):
        message = finished(g, plan_and_message(name, routing, rank)[2], rank)
        np.testing.assert_allclose(
            compiled(combine, name)(message), factor * routing.h, rtol=1e-12, atol=1e-12
        )


def message_vjp(g, h_TD, gate_TK, dispatch, rank, dx, dgate):
    def floats(h_TD, gate_TK):
        message = make_message(g, h_TD, gate_TK, dispatch, rank)
        return message.x, message.gate

    return jax.vjp(floats, h_TD, gate_TK)[1]((dx, dgate))


@EVERY_SHAPE
@FEW_EXAMPLES
@given(st.data())
def test_gradient_of_a_message_is_the_sum_over_copies(name, data):
    g, rng = geometry_of(name), np.random.default_rng(2)
    routing = data.draw(routings(g))
    dx, dgate = rng.normal(size=(g.R, g.C, g.D)), rng.normal(size=(g.R, g.C, g.K))
    for rank in range(g.M):
        dispatch, _, message = plan_and_message(name, routing, rank)
        dh_TD, dgate_TK = np.zeros((g.T, g.D)), np.zeros((g.T, g.K))
        for slot, row, _, token, _ in full_rows(g, message, rank):
            dh_TD[token] += dx[slot, row]
            dgate_TK[token] += np.where(message.expert_id[slot, row] >= 0, dgate[slot, row], 0)
        vjp = compiled(message_vjp, name)(routing.h, routing.gate, dispatch, rank, dx, dgate)
        np.testing.assert_allclose(vjp[0], dh_TD, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(vjp[1], dgate_TK, rtol=1e-12, atol=1e-12)


@EVERY_SHAPE
@FEW_EXAMPLES
@given(st.data())
def test_combine_cotangent_is_the_transpose_of_combine(name, data):
    g, rng = geometry_of(name), np.random.default_rng(3)
    message = plan_and_message(name, data.draw(routings(g)), rank=0)[2]
    message = message._replace(x=rng.normal(size=message.x.shape))
    dh_TD = rng.normal(size=(g.T, g.D))
    cotangent = compiled(combine_cotangent, name)(dh_TD, message.origin)
    # <combine(x), dh> = <x, transpose(dh)>, and empty rows get nothing.
    inner = np.sum(compiled(combine, name)(message) * dh_TD)
    np.testing.assert_allclose(np.sum(message.x * cotangent.x), inner, rtol=1e-12)
    assert not cotangent.x[message.origin == 0].any()
    assert not cotangent.gate.any()


@EVERY_SHAPE
def test_an_empty_message_combines_to_zeros(name):
    g = geometry_of(name)
    zeros = jax.tree.map(lambda leaf: np.zeros((g.R, *leaf.shape), leaf.dtype), message_template(g))
    assert not compiled(combine, name)(zeros).any()


def test_templates_are_the_shapes_and_types_of_the_real_thing():
    name = "2-4 uneven"
    g = geometry_of(name)
    ids, h = np.zeros((g.T, g.K), np.int32), np.zeros((g.T, g.D))
    dispatch, _, message = plan_and_message(
        name, types.SimpleNamespace(ids=ids, kept=ids + 1, h=h, gate=1.0 * ids), rank=0
    )
    cotangent = compiled(combine_cotangent, name)(h, message.origin)
    for actual, template, lead in (
        (dispatch, dispatch_template(g), ()),
        (message, message_template(g), (g.R,)),
        (cotangent, cotangent_template(g), (g.R,)),
    ):
        for leaf, spec in zip(actual, template, strict=True):
            assert leaf.shape == (*lead, *spec.shape) and leaf.dtype == spec.dtype


def test_rows_that_are_tokens_are_those_that_the_general_rule_gives(monkeypatch):
    """Where one expert worker has all experts, nothing is searched for or moved."""
    g = geometry_of("1-1")
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.normal(size=(g.T, g.E)), axis=1)[:, : g.K].astype(np.int32)
    kept, h = rng.integers(0, 2, (g.T, g.K)), rng.normal(size=(g.T, g.D))
    gate = rng.normal(size=(g.T, g.K))

    def there_and_back(ids, kept, h, gate):
        dispatch, needed = plan_dispatch(g, ids, kept, 0)
        message = make_message(g, h, gate, dispatch, 0)
        cotangent = combine_cotangent(g, h, message.origin)
        return dispatch, needed, message, combine(g, message), cotangent

    assert g.rows_are_tokens and not geometry_of("1-3 top-1").rows_are_tokens
    found = jax.jit(lambda *routed: there_and_back(*routed))(ids, kept, h, gate)
    monkeypatch.setattr(type(g), "rows_are_tokens", False)
    expected = jax.jit(lambda *routed: there_and_back(*routed))(ids, kept, h, gate)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
