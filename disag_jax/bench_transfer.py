"""Time of the transfers between workers over sizes of a message's slot."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from disag_jax.config import Config
from disag_jax.geometry import placement_of
from disag_jax.pipeline import PER_WORKER
from disag_jax.timing import Figure, time_calls
from disag_jax.training import make_meshes
from mesh.m2n import RingTransport, exchange_in_group

SLOT_MIB = (0.25, 1, 4, 16, 64)
MIB = 2**20


def measure(config: Config) -> list[Figure]:
    """Transfers of each size: many-to-many, or all-to-all if the config is co-located."""
    placement, meshes = placement_of(config), make_meshes(config)
    transport = RingTransport(placement)

    def send(words):
        if placement.colocated:
            return exchange_in_group(words[0], placement)[None]
        return transport.send_forward(words[0])[None]

    program = jax.jit(
        jax.shard_map(
            send, mesh=meshes.union, in_specs=PER_WORKER, out_specs=PER_WORKER, check_vma=False
        )
    )
    figures = []
    for size in SLOT_MIB:
        shape = (placement.num_devices, placement.rounds, int(size * MIB) // 2)
        words = jax.device_put(
            jnp.zeros(shape, jnp.uint16), NamedSharding(meshes.union, PER_WORKER)
        )
        kind = "all-to-all" if placement.colocated else "many-to-many"
        name = f"{kind}, {placement.rounds} slots of {size:g} MiB"
        figure = time_calls(name, lambda words=words: program(words))
        moved = placement.rounds * size * MIB / figure.milliseconds / 1e6
        figure.extra["a worker, each way"] = f"{moved:.3g} GB/s"
        figures.append(figure)
    return figures
