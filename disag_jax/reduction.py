"""Collectives at the two ends of the pipeline program: sharing weights, summing gradients.

Groups are of few kinds, and no two partitions of the mesh share a group of several devices (on
GPUs that is an error): the workers of a role in a stage, the workers of a stage, the replicas of a
worker, all devices; co-located also the workers of a stage that hold the same experts.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from disag_jax.config import Config, Overlap
from disag_jax.geometry import Geometry
from disag_jax.model import POST_NORM
from disag_jax.phases import Grads, Layouts, Stats, Weights
from layers.head import HeadParams
from mesh.placement import ALL_DEVICES, REPLICA, WORKER, Whoami
from mesh.roles import Role


@jax.named_scope("gather_weights")
def gather_weights(geometry: Geometry, rows, vocabulary, router_bias) -> Weights:
    """This worker's weights, from its shard of the program's arguments.

    The vocabulary's rows come from all devices; the post-attention norm, stored with the attention
    layers, goes to the expert workers of the stage.
    """
    rows = jax.tree.map(lambda shard: shard[0], rows)

    def gather(shard):
        return lax.all_gather(shard, ALL_DEVICES, tiled=True)

    return Weights(
        rows=rows,
        post_norm=_post_norm(geometry, rows),
        embedding=gather(vocabulary["embedding"]),
        head=HeadParams(
            final_norm=vocabulary["final_norm"],
            head=gather(vocabulary["head"])[: geometry.config.model.vocab_size],
        ),
        router_bias=router_bias,
    )


@jax.named_scope("reduce_gradients")
def reduce_grads(geometry: Geometry, layouts: Layouts, grads: Grads):
    """Sums gradients over the workers that share a parameter.

    Returns (row gradients [1, v, P] as the rows are, vocabulary gradients sharded like the
    vocabulary, norms): `gradient_norm` over all parameters, each counted once, and
    `gradient_norm_<role>`.
    """
    sum_rows = _sum_rows_together if geometry.placement.colocated else _sum_rows_apart
    rows = sum_rows(geometry, layouts, grads)
    if geometry.placement.replicas > 1:
        rows = lax.psum(rows, REPLICA)
    embedding, head = (
        _scatter_vocabulary(geometry, table) for table in (grads.embedding, grads.head.head)
    )
    final_norm = lax.psum(grads.head.final_norm, ALL_DEVICES)
    vocabulary = {"embedding": embedding, "final_norm": final_norm, "head": head}
    norms = _norms(geometry, rows, vocabulary)
    return jax.tree.map(lambda x: x[None], rows), vocabulary, norms


@jax.named_scope("reduce_metrics")
def reduce_stats(geometry: Geometry, stats: Stats, num_labels, aux_scales) -> dict:
    """The step's metrics, equal on every device.

    loss (mean nll in nats), balance_loss and z_loss (unweighted, summed over layers), total_loss,
    expert_counts [L, E], dropped_pairs [L], rows_needed and sorted_rows_needed.
    """
    per_layer = {
        name: _per_layer(geometry, getattr(stats.routing, name))
        for name in ("counts", "dropped", "balance_loss", "z_loss")
    }
    summed = lax.psum({**per_layer, "nll": stats.nll}, ALL_DEVICES)
    config = geometry.config
    loss = summed["nll"] / num_labels.astype(stats.nll.dtype)
    balance, z = jnp.sum(summed["balance_loss"]), jnp.sum(summed["z_loss"])
    return {
        "loss": loss,
        "balance_loss": balance / config.sequences_per_step,
        "z_loss": z / config.tokens_per_step,
        "total_loss": loss + aux_scales[0] * balance + aux_scales[1] * z,
        "expert_counts": summed["counts"],
        "dropped_pairs": summed["dropped"],
        "rows_needed": lax.pmax(stats.routing.rows_needed, ALL_DEVICES),
        "sorted_rows_needed": lax.pmax(stats.sorted_needed, ALL_DEVICES),
    }


def _post_norm(geometry: Geometry, rows):
    """The post-attention norms [v, D] of the stage's layers, on both roles."""
    me, placement, layouts = Whoami.of(geometry.placement), geometry.placement, Layouts.of(geometry)
    columns = layouts[Role.ATTENTION].columns(POST_NORM)
    if placement.colocated:
        return rows[Role.ATTENTION.label][:, columns]
    is_source = me.plays[Role.ATTENTION] & (me.rank[Role.ATTENTION] == 0)
    norms = jnp.where(is_source, rows[:, columns], 0)
    return lax.psum(norms, WORKER, axis_index_groups=placement.stage_groups())


def sums_rows_early(config: Config) -> bool:
    """Whether the loop sums a layer's attention gradients while the layer below runs backward.

    It does where a twin overlaps and has one stage: the last micro-batch runs backward in the
    cool-down alone, and after its backward unit a layer's gradients are complete.
    """
    return config.split.overlap is not Overlap.NONE and config.split.stages == 1


def attention_row(layouts: Layouts, grads: Grads, layer_row):
    """A layer's attention gradients [P], with the experts' part of its post-attention norm's."""
    norm = layouts[Role.ATTENTION].columns(POST_NORM)
    row_P = grads.rows[Role.ATTENTION.label][layer_row]
    return row_P.at[norm].add(grads.post_norm[layer_row])


def sum_over_stage(geometry: Geometry, x):
    """The sum over the workers of a stage."""
    return lax.psum(x, WORKER, axis_index_groups=geometry.placement.stage_groups())


def _sum_rows_together(geometry: Geometry, layouts: Layouts, grads: Grads):
    """Row gradients of co-located workers, summed over the workers that hold equal rows.

    Attention rows are alike on all workers of a stage, and so are shared experts; routed experts
    on those that hold copies of the same ones.
    """
    placement = geometry.placement
    attention, expert = (grads.rows[role.label] for role in Role)
    early = sums_rows_early(geometry.config)
    if not early:
        norm = layouts[Role.ATTENTION].columns(POST_NORM)
        attention = attention.at[:, norm].add(grads.post_norm)
    if placement.attention_workers == 1:
        return {Role.ATTENTION.label: attention, Role.EXPERT.label: expert}
    if placement.expert_copies > 1:
        expert = lax.psum(expert, WORKER, axis_index_groups=placement.expert_copy_groups())
    if early:
        # The loop has summed the other layers'.
        last = sum_over_stage(geometry, attention_row(layouts, grads, 0))
        attention = attention.at[0].set(last)
    else:
        attention = sum_over_stage(geometry, attention)
    if placement.expert_workers > 1:
        # Sums over the copies are done: what is left are the workers of the group.
        for columns in _shared_columns(geometry):
            groups = placement.expert_groups()
            summed = lax.psum(expert[:, columns], WORKER, axis_index_groups=groups)
            expert = expert.at[:, columns].set(summed)
    return {Role.ATTENTION.label: attention, Role.EXPERT.label: expert}


def _sum_rows_apart(geometry: Geometry, layouts: Layouts, grads: Grads):
    """Row gradients [v, P] of disaggregated workers, summed over those that hold equal rows.

    Attention workers of a stage hold all columns alike; expert workers only their shared experts.
    The experts' part of the post-attention norm joins the attention side's.
    """
    me, placement = Whoami.of(geometry.placement), geometry.placement
    is_attention, is_expert = me.plays[Role.ATTENTION], me.plays[Role.EXPERT]
    rows, attention = grads.rows, layouts[Role.ATTENTION]
    alike = {
        Role.ATTENTION: [slice(0, attention.num_columns)],
        Role.EXPERT: _shared_columns(geometry),
    }
    width = max(_total(columns) for columns in alike.values())

    def pick(columns):
        picked = jnp.concatenate([rows[:, c] for c in columns] or [rows[:, :0]], axis=1)
        return jnp.pad(picked, ((0, 0), (0, width - picked.shape[1])))

    sums = lax.psum(
        jnp.where(is_attention, pick(alike[Role.ATTENTION]), pick(alike[Role.EXPERT])),
        WORKER,
        axis_index_groups=placement.role_groups(),
    )

    post_norm = lax.psum(grads.post_norm, WORKER, axis_index_groups=placement.stage_groups())
    sums = sums.at[:, attention.columns(POST_NORM)].add(jnp.where(is_attention, post_norm, 0))
    # Column by column range, each worker keeping what is its own: so the rows change in place.
    for is_mine, role in ((is_attention, Role.ATTENTION), (is_expert, Role.EXPERT)):
        offset = 0
        for c in alike[role]:
            summed = sums[:, offset : offset + c.stop - c.start]
            rows = rows.at[:, c].set(jnp.where(is_mine, summed, rows[:, c]))
            offset += c.stop - c.start
    return rows


def _shared_columns(geometry: Geometry) -> list[slice]:
    """Columns of the shared experts in an expert worker's rows."""
    if not geometry.config.model.num_shared_experts:
        return []
    layout = Layouts.of(geometry)[Role.EXPERT]
    first = geometry.places.per_worker
    return [
        slice(offset + first * math.prod(leaf.shape[1:]), offset + size)
        for leaf, offset, size in zip(layout.leaves, layout.offsets, layout.sizes, strict=True)
    ]


def _total(columns: list[slice]) -> int:
    return sum(c.stop - c.start for c in columns)


def _scatter_vocabulary(geometry: Geometry, table_VD):
    """This device's rows of the sum over all devices, of the table padded to equal shards."""
    missing = -table_VD.shape[0] % geometry.placement.num_devices
    padded = jnp.pad(table_VD, ((0, missing), (0, 0)))
    return lax.psum_scatter(padded, ALL_DEVICES, scatter_dimension=0, tiled=True)


def _norms(geometry: Geometry, rows, vocabulary) -> dict:
    """Global gradient norms; every parameter is counted on one device."""
    me = Whoami.of(geometry.placement)
    attention, expert = (
        (rows[role.label] if geometry.placement.colocated else rows) for role in Role
    )
    shared = _shared_columns(geometry)
    edges = [0, *(edge for c in shared for edge in (c.start, c.stop)), expert.shape[1]]
    assert edges == sorted(edges)
    own = [slice(*ends) for ends in zip(edges[::2], edges[1::2], strict=True)]

    # By ranges: a mask's zeros would be an array as large as all rows, which XLA keeps from the
    # step's beginning, where gradients are zeros too.
    def sum_of_squares(columns):
        return sum((jnp.sum(expert[:, c] ** 2) for c in columns), jnp.zeros((), expert.dtype))

    is_replica_0 = me.replica == 0
    counts_attention = me.plays[Role.ATTENTION] & (me.rank[Role.ATTENTION] == 0)
    counts_expert = me.plays[Role.EXPERT] & (me.expert_copy == 0)
    is_first = is_replica_0 & (me.worker == 0)
    squares = {
        "attention": jnp.where(is_replica_0 & counts_attention, jnp.sum(attention**2), 0),
        "expert": jnp.where(
            is_replica_0 & counts_expert,
            sum_of_squares(own) + jnp.where(me.rank[Role.EXPERT] == 0, sum_of_squares(shared), 0),
            0,
        ),
        "vocabulary": jnp.sum(vocabulary["embedding"] ** 2)
        + jnp.sum(vocabulary["head"] ** 2)
        + jnp.where(is_first, jnp.sum(vocabulary["final_norm"] ** 2), 0),
    }
    squares = lax.psum(squares, ALL_DEVICES)
    norms = {f"gradient_norm_{name}": jnp.sqrt(square) for name, square in squares.items()}
    return {"gradient_norm": jnp.sqrt(sum(squares.values())), **norms}


def _per_layer(geometry: Geometry, values):
    """Values [v, ...] of this stage's layers as [L, ...], zeros elsewhere: ready to be summed."""
    stages, num_layers = geometry.placement.stages, geometry.config.model.num_layers
    me = Whoami.of(geometry.placement)
    grid = jnp.zeros((values.shape[0], stages, *values.shape[1:]), values.dtype)
    grid = grid.at[:, me.stage].set(jnp.where(me.plays[Role.ATTENTION], values, 0))
    return grid.reshape(-1, *values.shape[1:])[:num_layers]
