"""Re-wraps the buffers of one sharded array as another, without copying.

The pipeline program sees the row buffers of all workers as one array on the union mesh; the update
programs see the attention workers' rows and the expert workers' rows as arrays on the submeshes.
These are the same device buffers. After a view has been donated the union array is dead although
it may not say so: let go of its name when taking views.
"""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from mesh.placement import ALL_DEVICES, EXPERT, STAGE, Meshes

ATTENTION_ROWS = PartitionSpec(STAGE)
EXPERT_ROWS = PartitionSpec((STAGE, EXPERT))


def rewrap(arrays, shape, sharding, dtype):
    """An array of `shape` and `sharding` made of the device buffers of `arrays`.

    A process without devices in `sharding` gets an array without shards.
    """
    buffers = {shard.device: shard.data for array in arrays for shard in array.addressable_shards}
    local = [buffers[device] for device in sharding.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, sharding, local, dtype=dtype)


def role_views(meshes: Meshes, rows):
    """Union rows as (attention rows [p, v, P], expert rows [p * N, v, P]).

    rows: [W, v, P], each worker's of its role; or, co-located, {"attention": .., "expert": ..}. The
    rows of a stage's attention workers, of copies of experts and of all replicas must be equal.
    """
    placement = meshes.placement
    attention, expert = (rows["attention"], rows["expert"]) if placement.colocated else (rows, rows)
    num_experts = placement.stages * placement.expert_workers
    return (
        _view(attention, placement.stages, NamedSharding(meshes.attention, ATTENTION_ROWS)),
        _view(expert, num_experts, NamedSharding(meshes.expert, EXPERT_ROWS)),
    )


def union_view(meshes: Meshes, attention_rows, expert_rows):
    """The inverse of `role_views`."""
    lead = meshes.placement.num_devices
    sharding = NamedSharding(meshes.union, PartitionSpec(ALL_DEVICES))
    if meshes.placement.colocated:
        parts = {"attention": attention_rows, "expert": expert_rows}
        return {name: _view(rows, lead, sharding) for name, rows in parts.items()}
    shape = (lead, *attention_rows.shape[1:])
    return rewrap([attention_rows, expert_rows], shape, sharding, attention_rows.dtype)


def _view(rows, lead: int, sharding):
    return rewrap([rows], (lead, *rows.shape[1:]), sharding, rows.dtype)
