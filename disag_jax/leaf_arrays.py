"""The arrays of a checkpoint: what each process writes and reads of them."""

import asyncio
import collections
import dataclasses

import jax
import numpy as np
import tensorstore as ts

from disag_jax.logical import LeafMap
from disag_jax.saved_checkpoint import open_array, storage


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the training state.

    Attributes:
      name: its path in the state, and its directory in a checkpoint.
      physical: its shape, type and sharding under the split at hand.
      leaf_map: its logical form.
    """

    name: str
    physical: jax.ShapeDtypeStruct
    leaf_map: LeafMap

    @property
    def logical_type(self) -> str:
        """Type and logical shape, as in "float32[4, 64]"."""
        return f"{self.physical.dtype}{list(self.leaf_map.logical_shape)}"


def shards_to_write(array: jax.Array) -> list:
    """This process's shards, without those that another device writes."""
    return [shard for shard in array.addressable_shards if shard.replica_id == 0]


def blocks_to_write(leaf: Leaf, array: jax.Array) -> list[tuple]:
    """What this process writes of a leaf: (logical indices by dim, host copy of the values)."""
    blocks = []
    for shard in shards_to_write(array):
        located = leaf.leaf_map.locate(shard.index)
        if not located.is_empty:
            blocks.append((located.targets, located.pick(np.asarray(shard.data))))
    return blocks


async def write_leaf(root, leaf: Leaf, blocks: list[tuple]):
    """Writes `blocks_to_write` to the leaf's directory below `root`, each chunk with a checksum."""
    if not blocks:
        return
    metadata = {
        "shape": leaf.leaf_map.logical_shape,
        "data_type": leaf.physical.dtype.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": leaf.leaf_map.chunk_shape},
        },
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ],
    }
    # A chunk of zeros is stored like any other, so that a missing one is an error when read.
    options = {"metadata": metadata, "store_data_equal_to_fill_value": True}
    store = await ts.open(storage(root, leaf.name) | options, open=True, create=True)
    await _all(store.oindex[targets].write(values) for targets, values in blocks)


async def read_leaf(root, leaf: Leaf) -> jax.Array:
    """The array under the split at hand, zeros in the padding; each part is read only once."""
    shape, sharding = leaf.physical.shape, leaf.physical.sharding
    devices_of = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices_of[str(index)].append((device, index))
    buffers = []
    if devices_of:
        logical = jax.ShapeDtypeStruct(leaf.leaf_map.logical_shape, leaf.physical.dtype)
        store = await open_array(root, leaf.name, logical)
    for alike in devices_of.values():
        located = leaf.leaf_map.locate(alike[0][1])
        values = await store.oindex[located.targets].read()
        shard = located.fill(values, sharding.shard_shape(shape))
        buffers += [jax.device_put(shard, device) for device, _ in alike]
        # The host's copy is free for the next shard.
        jax.block_until_ready(buffers)
    return jax.make_array_from_single_device_arrays(
        shape, sharding, buffers, dtype=leaf.physical.dtype
    )


async def _all(tasks) -> list:
    """Results of the tasks; the first error only when all are done, as none may be left running."""
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
