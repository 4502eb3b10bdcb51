"""Which links the transfers of a placement use.

Workers are numbered replica by replica and stage by stage, each stage's attention workers first
(mesh/placement.py), and nodes are filled in that order.
"""

import dataclasses
import functools

import numpy as np

from disag_jax.chunk_model import Operation
from disag_jax.errors import ConfigError
from disag_jax.planner.hardware import Hardware, Link
from disag_jax.planner.rings import Rings, shapes_of
from mesh.placement import Placement


@dataclasses.dataclass(frozen=True)
class StageLinks:
    """Links by what they are used for.

    Attributes:
      pipeline: between the submeshes, and between stages. A transfer's rounds go around the ring of
        all stages, so its slowest edge sets the pace of all.
      stage: sums among a role's workers of one stage.
      expert_copies, expert_groups: co-located, sums among the workers of a stage that hold the same
        experts, and among those that hold all of them together.
      replicas: sums among the workers that play the same part in every replica.
      world: sums among all devices.
      all_to_all: (intra-node link, inter-node link or None, other workers of an exchange's group on
        the same node, those on other nodes); of the worker with most on other nodes.
    """

    pipeline: Link
    stage: Rings
    expert_copies: Rings
    expert_groups: Rings
    replicas: Rings
    world: Rings
    all_to_all: tuple[Link, Link | None, int, int]

    @classmethod
    def of(cls, placement: Placement, hardware: Hardware) -> "StageLinks":
        """ConfigError if the placement needs several nodes and the hardware names one."""
        near = hardware.intra_node
        size = placement.stage_workers
        nodes = np.arange(placement.num_devices) // hardware.devices_per_node
        stages = nodes.reshape(-1, size)
        far = per_device(hardware) if nodes[-1] else None
        shapes = _group_shapes(placement, hardware.devices_per_node)
        rings = [Rings(near, far, one) for one in shapes]
        if far is None:
            return cls(near, *rings, (near, None, placement.expert_workers - 1, 0))
        # The last stage of a replica sends to its first, so one replica on one node is needed.
        replicas = nodes.reshape(placement.replicas, -1)
        near_ring = (replicas[:, 0] == replicas[:, -1]).all()
        group = min(placement.expert_workers, size)
        groups = stages[:, : size // group * group].reshape(-1, group)
        # Of each worker, those of its group that are on its node, itself included.
        same = int((groups[:, :, None] == groups[:, None, :]).sum(axis=2).min())
        return cls(near if near_ring else far, *rings, (near, far, same - 1, group - same))

    def all_to_all_parts(self, slot_bytes: float, chunks: int = 1) -> Operation:
        """An exchange of one slot with each other worker of the group, in `chunks` chunks.

        Slots within the node and slots to other nodes travel at the same time: the slower count.
        """
        near, far, near_slots, far_slots = self.all_to_all
        parts = []
        for link, slots in ((near, near_slots), (far, far_slots)):
            if slots:
                latency = link.all_to_all.seconds(0)
                parts.append(
                    Operation(latency, link.all_to_all.seconds(slots * slot_bytes) - latency)
                )
        return max(parts, key=lambda part: part.of_chunk(chunks), default=Operation())

    def all_to_all_seconds(self, slot_bytes: float) -> float:
        """Such an exchange as a whole."""
        return self.all_to_all_parts(slot_bytes).of_chunk(1)


@functools.lru_cache(maxsize=1024)
def _group_shapes(placement: Placement, devices_per_node: int) -> tuple[frozenset, ...]:
    """`Rings.shapes` of a stage, of expert copies and groups, of replicas and of all devices."""
    nodes = np.arange(placement.num_devices) // devices_per_node
    stages = nodes.reshape(-1, placement.stage_workers)
    copies = groups = stages[:1, :1]
    by_role = [stages]
    if placement.colocated:
        groups = nodes.reshape(-1, placement.expert_workers)
        within = stages.reshape(len(stages), placement.expert_copies, placement.expert_workers)
        copies = within.swapaxes(1, 2).reshape(-1, placement.expert_copies)
    else:
        by_role = np.split(stages, [placement.attention_workers], axis=1)
    replicas = nodes.reshape(placement.replicas, -1).T
    return tuple(
        shapes_of(*one) for one in (by_role, [copies], [groups], [replicas], [nodes[None]])
    )


def per_device(hardware: Hardware) -> Link:
    """The inter-node link of one device: its part of the node's network cards."""
    if hardware.inter_node is None:
        raise ConfigError(
            f"hardware {hardware.name}: inter_node = None must be a link for more than "
            f"devices_per_node = {hardware.devices_per_node} devices"
        )
    return hardware.inter_node.scaled(hardware.nics_per_node / hardware.devices_per_node)
