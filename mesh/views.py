"""Re-wraps the buffers of one sharded array as another, without copying.

The pipeline program sees the row buffers of all workers as one array on the union mesh; the update
programs see the attention workers' rows and the expert workers' rows as arrays on the submeshes.
These are the same device buffers. After a view has been donated the union array is dead although
it may not say so: let go of its name when taking views.
"""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from mesh.placement import ALL_DEVICES, EXPERT, STAGE, Meshes


def rewrap(arrays, shape, sharding, dtype):
    """An array of `shape` and `sharding` made of the device buffers of `arrays`.

    A process without devices in `sharding` gets an array without shards.
    """
    buffers = {shard.device: shard.data for array in arrays for shard in array.addressable_shards}
    local = [buffers[device] for device in sharding.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, sharding, local, dtype=dtype)


def role_views(meshes: Meshes, rows):
    """Union rows [W, v, P] as (attention rows [p, v, P], expert rows [p * N, v, P]).

    The rows of a stage's attention workers, and of all replicas, must be equal.
    """
    placement, tail = meshes.placement, rows.shape[1:]
    attention = NamedSharding(meshes.attention, PartitionSpec(STAGE))
    expert = NamedSharding(meshes.expert, PartitionSpec((STAGE, EXPERT)))
    return (
        rewrap([rows], (placement.stages, *tail), attention, rows.dtype),
        rewrap([rows], (placement.stages * placement.expert_workers, *tail), expert, rows.dtype),
    )


def union_view(meshes: Meshes, attention_rows, expert_rows):
    """The inverse of `role_views`."""
    shape = (meshes.placement.num_devices, *attention_rows.shape[1:])
    sharding = NamedSharding(meshes.union, PartitionSpec(ALL_DEVICES))
    return rewrap([attention_rows, expert_rows], shape, sharding, attention_rows.dtype)
