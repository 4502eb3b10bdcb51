"""Which token goes to which expert worker, and back: routing tables of integers, made once.

A token travels once to each expert worker that holds at least one of its experts. Its copies are
numbered from 0, copy 0 going to the worker of its first choice, which also adds the residual; a
token all of whose pairs were dropped still sends copy 0. A row of a message says which copy of
which token it is by `origin` = token * F + copy + 1, 0 being an empty row, so the receiver of the
finished hidden states can sum the copies without a search.

Legend: T tokens, K choices, F copies at most, R slots, C rows per slot, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from disag_jax.geometry import Geometry
from layers.permute import gather_sum, spread, take_rows
from mesh.m2n import receiver_of_slot, slot_of_receiver


class Message(NamedTuple):
    """Rows that cross from role to role, one token's copy each.

    Attributes:
      x: [R, C, D], hidden state before the post-attention norm; from an expert worker, its share of
        the finished hidden state.
      gate: [R, C, K], gate of each choice, 0 where `expert_id` is -1.
      expert_id: int32 [R, C, K], place of the expert on the receiver, -1 = not there or dropped.
      origin: int32 [R, C], which copy of which token, 0 = empty row.
    """

    x: jax.Array
    gate: jax.Array
    expert_id: jax.Array
    origin: jax.Array


class Cotangent(NamedTuple):
    """Gradients of a message's `x` and `gate`; they travel the same pairs backwards."""

    x: jax.Array
    gate: jax.Array


class Dispatch(NamedTuple):
    """One micro-batch's routing at one attention worker.

    Attributes:
      ids: int32 [T, K], chosen experts, best first.
      kept: int32 [T, K], 0 where capacity dropped the pair.
      origin: int32 [R * C], copy held by each outgoing row, 0 = empty.
      position: int32 [T, F], row of each copy, -1 = none.
    """

    ids: jax.Array
    kept: jax.Array
    origin: jax.Array
    position: jax.Array


def message_template(geometry: Geometry) -> Message:
    """One slot of a message, as ShapeDtypeStructs."""
    g = geometry
    return Message(g.floats(g.C, g.D), g.wides(g.C, g.K), g.ints(g.C, g.K), g.ints(g.C))


def cotangent_template(geometry: Geometry) -> Cotangent:
    """One slot of a cotangent, as ShapeDtypeStructs."""
    g = geometry
    return Cotangent(g.floats(g.C, g.D), g.wides(g.C, g.K))


def dispatch_template(geometry: Geometry) -> Dispatch:
    """A `Dispatch` as ShapeDtypeStructs."""
    g = geometry
    return Dispatch(g.ints(g.T, g.K), g.ints(g.T, g.K), g.ints(g.R * g.C), g.ints(g.T, g.F))


def source_tokens(origin, fanout: int):
    """Token in each row, -1 for an empty row."""
    return (origin - 1) // fanout


def carries_residual(origin, fanout: int):
    """True for rows that are a token's copy 0."""
    return (origin > 0) & ((origin - 1) % fanout == 0)


def plan_dispatch(geometry: Geometry, ids_TK, kept_TK, rank):
    """Assigns each token's copies to rows of the attention worker `rank` (traced).

    Returns (Dispatch, rows needed in the fullest slot). Copies past C are left out: if more rows
    are needed than C the result must not be used.
    """
    g = geometry
    if g.rows_are_tokens:
        token_T = jnp.arange(g.T, dtype=jnp.int32)
        kept_TK = kept_TK.astype(jnp.int32)
        return Dispatch(ids_TK, kept_TK, token_T + 1, token_T[:, None]), jnp.int32(g.T)
    worker_TK = _expert_workers(g, ids_TK)
    travels_TK = _first_to_worker(worker_TK, kept_TK > 0)
    copy_TK = jnp.cumsum(travels_TK, axis=1) - 1
    to_worker_TN = jnp.sum(
        travels_TK[..., None] & (worker_TK[..., None] == jnp.arange(g.places.num_workers)),
        axis=1,
        dtype=jnp.int32,
    )
    filled_TN = jnp.cumsum(to_worker_TN, axis=0)
    place_TK = jnp.take_along_axis(filled_TN - to_worker_TN, worker_TK, axis=1)
    slot_TK = slot_of_receiver(rank, worker_TK, g.R)
    row_TK = jnp.where(travels_TK & (place_TK < g.C), slot_TK * g.C + place_TK, -1)
    is_copy_TKF = travels_TK[..., None] & (copy_TK[..., None] == jnp.arange(g.F))
    position_TF = jnp.max(jnp.where(is_copy_TKF, row_TK[..., None], -1), axis=1)
    dispatch = Dispatch(
        ids=ids_TK,
        kept=kept_TK.astype(jnp.int32),
        origin=_invert(position_TF.reshape(-1), g.R * g.C) + 1,
        position=position_TF.astype(jnp.int32),
    )
    return dispatch, jnp.max(filled_TN[-1])


def make_message(geometry: Geometry, h_TD, gate_TK, dispatch: Dispatch, rank) -> Message:
    """The rows of `dispatch`, differentiable in h and gate."""
    g = geometry
    token = source_tokens(dispatch.origin, g.F)
    x, gate = h_TD, gate_TK
    if not g.rows_are_tokens:
        x, gate = (spread(rows, token, dispatch.position) for rows in (x, gate))
    expert_id = _local_expert_ids(g, dispatch, token, rank)
    return Message(
        x=x.reshape(g.R, g.C, g.D),
        gate=jnp.where(expert_id >= 0, gate, 0).reshape(g.R, g.C, g.K),
        expert_id=expert_id.reshape(g.R, g.C, g.K),
        origin=dispatch.origin.reshape(g.R, g.C),
    )


@jax.named_scope("combine")
def combine(geometry: Geometry, message: Message):
    """Finished hidden states [T, D]: the sum of each token's copies."""
    g = geometry
    if g.rows_are_tokens:
        return message.x.reshape(-1, g.D)
    origin = message.origin.reshape(-1)
    position_TF = _invert(origin - 1, g.T * g.F).reshape(g.T, g.F)
    return gather_sum(message.x.reshape(-1, g.D), position_TF, source_tokens(origin, g.F))


def combine_cotangent(geometry: Geometry, dh_TD, origin) -> Cotangent:
    """The transpose of `combine`, from the saved origins [R, C] alone."""
    g = geometry
    if g.rows_are_tokens:
        x = dh_TD.reshape(g.R, g.C, g.D)
    else:
        x = take_rows(dh_TD, source_tokens(origin, g.F))
    return Cotangent(x, jnp.zeros((g.R, g.C, g.K), g.wide_dtype))


def _expert_workers(geometry: Geometry, ids):
    """Expert worker of each expert id."""
    return jnp.asarray(geometry.places.expert_places() // geometry.places.per_worker)[ids]


def _first_to_worker(worker_TK, kept_TK):
    """True where a choice is the first of its token that travels to its worker."""
    travels = [jnp.ones_like(kept_TK[:, 0])]
    for choice in range(1, worker_TK.shape[1]):
        seen = jnp.zeros_like(travels[0])
        for earlier in range(choice):
            same = worker_TK[:, earlier] == worker_TK[:, choice]
            seen |= travels[earlier] & same
        travels.append(kept_TK[:, choice] & ~seen)
    return jnp.stack(travels, axis=1)


def _local_expert_ids(geometry: Geometry, dispatch: Dispatch, token, rank):
    """Place of each chosen expert on the receiving worker, -1 = elsewhere or dropped: [R*C, K]."""
    g = geometry
    place = jnp.asarray(g.places.expert_places())[dispatch.ids]
    place = jnp.where(dispatch.kept > 0, place, -1)
    if g.rows_are_tokens:
        return place.astype(jnp.int32)
    place_rows = jnp.where(token[:, None] >= 0, place[jnp.maximum(token, 0)], -1)
    receiver = receiver_of_slot(rank, jnp.arange(g.R * g.C) // g.C, g.R)
    local = place_rows - receiver[:, None] * g.places.per_worker
    here = (place_rows >= 0) & (local >= 0) & (local < g.places.per_worker)
    return jnp.where(here, local, -1).astype(jnp.int32)


def _invert(position, size: int):
    """inverse[position[n]] = n for position >= 0, -1 elsewhere; positions are distinct."""
    target = jnp.where(position >= 0, position, size)
    index = jnp.arange(position.size, dtype=jnp.int32)
    return jnp.full((size,), -1, jnp.int32).at[target].set(index, mode="drop")
