"""Which device plays which part: worker order, collective groups, the union mesh and the submeshes.

A pipeline has p stages of M attention workers followed by N expert workers; D replicas of it stand
side by side. The pipeline program runs on the union mesh of all workers; training state lives on
the attention and the expert submesh.
"""

import dataclasses

import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh

from mesh.roles import Role

REPLICA, WORKER = "replica", "worker"
STAGE, DATA, EXPERT = "stage", "data", "expert"
ALL_DEVICES = (REPLICA, WORKER)


@dataclasses.dataclass(frozen=True)
class Placement:
    """D replicas of a pipeline of p stages with M attention and N expert workers each."""

    replicas: int
    stages: int
    attention_workers: int
    expert_workers: int

    @property
    def stage_workers(self) -> int:
        return self.attention_workers + self.expert_workers

    @property
    def workers(self) -> int:
        """Workers of one replica."""
        return self.stages * self.stage_workers

    @property
    def num_devices(self) -> int:
        return self.replicas * self.workers

    @property
    def rounds(self) -> int:
        """R, rounds of a transfer and slots of a message."""
        return max(self.attention_workers, self.expert_workers)

    def worker(self, stage: int, role: Role, rank: int) -> int:
        """Index of a worker on the `worker` axis."""
        before = self.attention_workers if role is Role.EXPERT else 0
        return stage * self.stage_workers + before + rank

    def describe(self, worker: int) -> tuple[int, Role, int]:
        """(stage, role, rank) of a worker."""
        stage, within = divmod(worker, self.stage_workers)
        if within < self.attention_workers:
            return stage, Role.ATTENTION, within
        return stage, Role.EXPERT, within - self.attention_workers

    def role_groups(self) -> list[list[int]]:
        """Workers of each (stage, role): the partition for sums within a role."""
        sizes = {Role.ATTENTION: self.attention_workers, Role.EXPERT: self.expert_workers}
        return [
            [self.worker(stage, role, rank) for rank in range(sizes[role])]
            for stage in range(self.stages)
            for role in Role
        ]

    def stage_groups(self) -> list[list[int]]:
        """Workers of each stage, both roles."""
        size = self.stage_workers
        return [list(range(stage * size, (stage + 1) * size)) for stage in range(self.stages)]


@dataclasses.dataclass(frozen=True)
class Whoami:
    """What the executing worker is, as traced integers inside `shard_map` on the union mesh."""

    replica: object
    worker: object
    stage: object
    is_attention: object
    rank: object

    @classmethod
    def of(cls, placement: Placement) -> "Whoami":
        worker = lax.axis_index(WORKER)
        within = worker % placement.stage_workers
        is_attention = within < placement.attention_workers
        return cls(
            replica=lax.axis_index(REPLICA),
            worker=worker,
            stage=worker // placement.stage_workers,
            is_attention=is_attention,
            rank=within - (1 - is_attention) * placement.attention_workers,
        )


@dataclasses.dataclass(frozen=True)
class Meshes:
    """The union mesh and the two submeshes over the same devices.

    Axes: union (replica, worker); attention (replica, stage, data); expert (replica, stage,
    expert).
    """

    placement: Placement
    union: Mesh
    attention: Mesh
    expert: Mesh

    @classmethod
    def make(cls, placement: Placement, devices) -> "Meshes":
        """Builds the meshes over exactly `placement.num_devices` devices; else ValueError."""
        if len(devices) != placement.num_devices:
            raise ValueError(
                f"devices = {len(devices)} must equal split.replicas * split.stages * "
                f"(split.attention_workers + split.expert_workers) = {placement.num_devices}"
            )
        shape = (placement.replicas, placement.stages, placement.stage_workers)
        grid = np.array(devices).reshape(shape)
        num_attention = placement.attention_workers

        def mesh(array, axes):
            return Mesh(array, axes, axis_types=(AxisType.Auto,) * len(axes))

        return cls(
            placement=placement,
            union=mesh(grid.reshape(placement.replicas, -1), ALL_DEVICES),
            attention=mesh(grid[:, :, :num_attention], (REPLICA, STAGE, DATA)),
            expert=mesh(grid[:, :, num_attention:], (REPLICA, STAGE, EXPERT)),
        )


@dataclasses.dataclass(frozen=True)
class ExpertPlaces:
    """Which expert worker of a stage holds which expert.

    Workers hold contiguous, nearly equal shares; each has `per_worker` places, and a place past a
    worker's share is padding that nothing is ever routed to.
    """

    num_experts: int
    num_workers: int

    @property
    def per_worker(self) -> int:
        return -(-self.num_experts // self.num_workers)

    def share(self, worker: int) -> range:
        """The expert ids that a worker holds."""
        small, extra = divmod(self.num_experts, self.num_workers)
        start = worker * small + min(worker, extra)
        return range(start, start + small + (worker < extra))

    def place_experts(self) -> np.ndarray:
        """Expert id in each place, int32 [num_workers * per_worker], -1 = padding."""
        places = np.full((self.num_workers, self.per_worker), -1, np.int32)
        for worker in range(self.num_workers):
            share = self.share(worker)
            places[worker, : len(share)] = share
        return places.reshape(-1)

    def expert_places(self) -> np.ndarray:
        """Place of each expert, int32 [num_experts]; worker = place // per_worker."""
        places = self.place_experts()
        found = np.empty(self.num_experts, np.int32)
        found[places[places >= 0]] = np.flatnonzero(places >= 0)
        return found
