"""Time of the transfers between workers over sizes of what they move.

They run one after the other in a loop on the devices, as in the pipeline: the host's calls do not
count.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from disag_jax.config import Config
from disag_jax.config_rules import require
from disag_jax.geometry import placement_of
from disag_jax.pipeline import EVERYWHERE, PER_WORKER, compiler_options
from disag_jax.timing import Figure, time_iterations
from disag_jax.training import make_meshes
from mesh.m2n import RingTransport, exchange_in_group
from mesh.placement import ALL_DEVICES, Meshes

SLOT_MIB = (0.25, 1, 4, 16, 64)
# What a step sums is gradients. Over sockets sums of up to 4 MiB took a tenth of the time that
# larger ones suggest, so not by NCCL (benchmarks/LOG.md): no line goes through both.
SUM_MIB = (16, 64, 256)
MIB = 2**20


def measure(config: Config) -> list[Figure]:
    """Transfers of each size: many-to-many, or all-to-all if the config is co-located.

    ConfigError if no worker has anything to send.
    """
    split = config.split
    require(
        not split.colocated or split.expert_workers > 1,
        "split.expert_workers",
        split.expert_workers,
        "greater than 1 with split.placement = colocated, or nothing is exchanged",
    )
    return [figure for _, figure in measure_slots(config)]


def measure_slots(config: Config) -> list[tuple[int, Figure]]:
    """(bytes of a slot, time) of each size; many-to-many, or all-to-all co-located."""
    placement = placement_of(config)
    transport = RingTransport(placement)

    def send(words):
        if placement.colocated:
            return exchange_in_group(words, placement)
        return transport.send_forward(words)

    kind = "all-to-all" if placement.colocated else "many-to-many"
    # Of an all-to-all a worker's own slot stays where it is.
    num_sent = placement.rounds - placement.colocated
    found = []
    for num_bytes, call in _calls(make_meshes(config), send, placement.rounds, SLOT_MIB):
        name = f"{kind}, {placement.rounds} slots of {num_bytes / MIB:g} MiB"
        figure = time_iterations(name, call)
        moved = num_sent * num_bytes / figure.milliseconds / 1e6
        figure.extra["a worker, each way"] = f"{moved:.3g} GB/s"
        found.append((num_bytes, figure))
    return found


def measure_all_reduce(config: Config) -> list[tuple[int, Figure]]:
    """(bytes on each device, time) of sums over all devices."""
    calls = _calls(make_meshes(config), lambda words: lax.psum(words, ALL_DEVICES), 1, SUM_MIB)
    return [
        (num_bytes, time_iterations(f"all-reduce of {num_bytes / MIB:g} MiB", call))
        for num_bytes, call in calls
    ]


def _calls(meshes: Meshes, send, num_slots: int, sizes):
    """Yields (bytes of a slot, a call that sends [num_slots, words] a number of times).

    sizes: of a slot, in MiB.
    """

    def repeat(words, count):
        return lax.fori_loop(0, count, lambda _, sent: send(sent), words[0])[None]

    program = jax.jit(
        jax.shard_map(
            repeat,
            mesh=meshes.union,
            in_specs=(PER_WORKER, EVERYWHERE),
            out_specs=PER_WORKER,
            check_vma=False,
        ),
        compiler_options=compiler_options(meshes, hop=1),
    )
    for size in sizes:
        num_bytes = int(size * MIB)
        shape = (meshes.union.size, num_slots, num_bytes // 4)
        words = jnp.zeros(shape, jnp.float32, device=NamedSharding(meshes.union, PER_WORKER))
        yield num_bytes, lambda count, words=words: program(words, jnp.int32(count))
