"""Which device plays which part: worker order, collective groups, the union mesh and the submeshes.

Disaggregated, a pipeline has p stages of M attention workers followed by N expert workers. In its
co-located twin a stage has M workers that play both roles, in groups of N: every group holds all of
the stage's experts, so M / N copies of them. D replicas of a pipeline stand side by side. The
pipeline program runs on the union mesh of all workers; training state lives on the attention and
the expert submesh, which in the twin are the same devices.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh

from mesh.roles import Role

REPLICA, WORKER = "replica", "worker"
STAGE, DATA, EXPERT = "stage", "data", "expert"
EXPERT_COPY = "expert_copy"
ALL_DEVICES = (REPLICA, WORKER)


@dataclasses.dataclass(frozen=True)
class Placement:
    """D replicas of a pipeline of p stages with M attention and N expert workers each.

    colocated: the M workers of a stage are its expert workers too, and N divides M.
    """

    replicas: int
    stages: int
    attention_workers: int
    expert_workers: int
    colocated: bool = False

    @property
    def stage_workers(self) -> int:
        both = self.attention_workers + self.expert_workers
        return self.attention_workers if self.colocated else both

    @property
    def workers(self) -> int:
        """Workers of one replica."""
        return self.stages * self.stage_workers

    @property
    def num_devices(self) -> int:
        return self.replicas * self.workers

    @property
    def rounds(self) -> int:
        """R, slots of a message, which are the rounds of a transfer between submeshes."""
        return self.expert_workers if self.colocated else max(self._sizes.values())

    @property
    def senders(self) -> int:
        """Attention workers that an expert worker hears from."""
        return self.expert_workers if self.colocated else self.attention_workers

    @property
    def expert_copies(self) -> int:
        """Groups of workers within a stage that hold the same experts."""
        return self.attention_workers // self.expert_workers if self.colocated else 1

    @property
    def _sizes(self) -> dict[Role, int]:
        return {Role.ATTENTION: self.attention_workers, Role.EXPERT: self.expert_workers}

    def worker(self, stage: int, role: Role, rank: int) -> int:
        """Index of a worker on the `worker` axis; of experts that have copies, the first."""
        before = self.attention_workers if role is Role.EXPERT and not self.colocated else 0
        return stage * self.stage_workers + before + rank

    def stage_of(self, worker: int) -> int:
        return worker // self.stage_workers

    def rank_of(self, worker: int, role: Role) -> int | None:
        """The worker's rank in a role, or None if it does not play it."""
        within = worker % self.stage_workers
        if self.colocated:
            return within if role is Role.ATTENTION else within % self.expert_workers
        rank = within - (self.attention_workers if role is Role.EXPERT else 0)
        return rank if 0 <= rank < self._sizes[role] else None

    def name_of(self, worker: int) -> str:
        """What reports call a worker of a replica."""
        role, rank = self._part_of(worker)
        return f"stage{self.stage_of(worker)}_{role}{rank}"

    def kind_of(self, worker: int) -> str:
        """What reports call all workers that do the same."""
        role, _ = self._part_of(worker)
        return role if self.colocated else f"{role} worker"

    def _part_of(self, worker: int) -> tuple[str, int]:
        """The worker's role in words, and its rank in it; co-located, "worker" is both roles."""
        if self.colocated:
            return "worker", self.rank_of(worker, Role.ATTENTION)
        ranks = {role.label: self.rank_of(worker, role) for role in Role}
        return next((label, rank) for label, rank in ranks.items() if rank is not None)

    def role_groups(self) -> list[list[int]]:
        """Workers of each (stage, role), which must be apart: the partition for sums in a role."""
        assert not self.colocated
        return [
            [self.worker(stage, role, rank) for rank in range(self._sizes[role])]
            for stage in range(self.stages)
            for role in Role
        ]

    def stage_groups(self) -> list[list[int]]:
        """Workers of each stage, both roles."""
        size = self.stage_workers
        return [list(range(stage * size, (stage + 1) * size)) for stage in range(self.stages)]

    def expert_groups(self) -> list[list[int]]:
        """Co-located workers that hold a stage's experts among them."""
        size = self.expert_workers
        return [list(range(first, first + size)) for first in range(0, self.workers, size)]

    def expert_copy_groups(self) -> list[list[int]]:
        """Co-located workers of a stage that hold the same experts."""
        return [stage[rank :: self.expert_workers] for stage in self.stage_groups()
                for rank in range(self.expert_workers)]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Whoami:
    """What the executing worker is, as traced values inside `shard_map` on the union mesh.

    Attributes:
      plays: whether it plays a role, by role.
      rank: its rank in a role that it plays, by role.
      expert_copy: which of the stage's copies of its experts it holds.
    """

    replica: object
    worker: object
    stage: object
    plays: dict[Role, object]
    rank: dict[Role, object]
    expert_copy: object

    @classmethod
    def of(cls, placement: Placement) -> "Whoami":
        worker = lax.axis_index(WORKER)
        within = worker % placement.stage_workers
        if placement.colocated:
            plays = {role: jnp.array(True) for role in Role}
            expert_copy, expert_rank = jnp.divmod(within, placement.expert_workers)
        else:
            is_attention = within < placement.attention_workers
            plays = {Role.ATTENTION: is_attention, Role.EXPERT: ~is_attention}
            expert_copy, expert_rank = jnp.array(0), within - placement.attention_workers
        return cls(
            replica=lax.axis_index(REPLICA),
            worker=worker,
            stage=worker // placement.stage_workers,
            plays=plays,
            rank={Role.ATTENTION: within, Role.EXPERT: expert_rank},
            expert_copy=expert_copy,
        )


@dataclasses.dataclass(frozen=True)
class Meshes:
    """The union mesh and the two submeshes over the same devices.

    Axes: union (replica, worker); attention (replica, stage, data); expert (replica, stage,
    expert_copy, expert).
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
                f"devices = {len(devices)} must equal split.replicas * split.stages * workers of a "
                f"stage = {placement.num_devices}"
            )
        shape = (placement.replicas, placement.stages, placement.stage_workers)
        grid = np.array(devices).reshape(shape)
        attention = grid[:, :, : placement.attention_workers]
        experts = grid if placement.colocated else grid[:, :, placement.attention_workers :]
        expert_shape = (*shape[:2], placement.expert_copies, placement.expert_workers)

        def mesh(array, axes):
            return Mesh(array, axes, axis_types=(AxisType.Auto,) * len(axes))

        return cls(
            placement=placement,
            union=mesh(grid.reshape(placement.replicas, -1), ALL_DEVICES),
            attention=mesh(attention, (REPLICA, STAGE, DATA)),
            expert=mesh(experts.reshape(expert_shape), (REPLICA, STAGE, EXPERT_COPY, EXPERT)),
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
