"""Sums among groups of workers on several nodes, as NCCL's rings make them.

A ring goes through all workers of a group, node after node, and every edge of it carries
2 (n - 1) / n of an all-reduce's bytes (half of that for an all-gather or a reduce-scatter). Where k
workers of the group are on a node, NCCL makes k rings that share the bytes and leave the node at
another worker each, so that the network cards of all k are used; within the node they share the
workers' NVLink. The node with the fewest workers has the fewest ways out. All groups sum at once,
each over its own workers' cards. Source of the ring's bytes: NVIDIA's nccl-tests, PERFORMANCE.md.
"""

import dataclasses

import numpy as np

from disag_jax.planner.hardware import Link


@dataclasses.dataclass(frozen=True)
class Rings:
    """How groups of workers lie on the nodes, and the links among them.

    Attributes:
      near: within a node.
      far: a worker's share of the network between nodes; None where no group needs it.
      shapes: of every group (workers, fewest of them on one of its nodes, most on one).
    """

    near: Link
    far: Link | None
    shapes: frozenset[tuple[int, int, int]]

    def all_reduce(self, num_bytes: float) -> float:
        """Seconds until every group has summed this many bytes, of each of its workers."""
        return self._slowest(2 * num_bytes)

    def all_gather(self, num_bytes: float) -> float:
        """Seconds until each worker has all of so many bytes; a reduce-scatter takes as long."""
        return self._slowest(num_bytes)

    def _slowest(self, num_bytes: float) -> float:
        return max(self._seconds(num_bytes * (n - 1) / n, n, *on) for n, *on in self.shapes)

    def _seconds(self, edge_bytes: float, size: int, fewest: int, most: int) -> float:
        """Seconds of rings that carry so many bytes over each edge, all rings of a group together.

        Of the k rings through a worker one leaves the node there, if all nodes have k workers.
        """
        if size == 1:
            return 0.0
        if fewest == size:
            return self.near.all_reduce.seconds(edge_bytes)
        staying = edge_bytes * (1 - 1 / fewest) if fewest == most else edge_bytes
        within = self.near.all_reduce.seconds(staying) if staying else 0.0
        return max(within, self.far.all_reduce.seconds(edge_bytes / fewest))


def shapes_of(*nodes: np.ndarray) -> frozenset[tuple[int, int, int]]:
    """`Rings.shapes` of groups whose workers are on these nodes, ascending: [groups, workers]."""
    return frozenset().union(*map(_shapes, nodes))


def _shapes(nodes: np.ndarray) -> set[tuple[int, int, int]]:
    """Of each group its size, and the fewest and most workers on one of its nodes."""
    groups, size = nodes.shape
    begins = np.ones(nodes.shape, bool)
    begins[:, 1:] = nodes[:, 1:] != nodes[:, :-1]
    at = np.flatnonzero(begins)
    counts = np.diff(at, append=groups * size)
    firsts = np.searchsorted(at, size * np.arange(groups))
    fewest, most = (part.reduceat(counts, firsts) for part in (np.minimum, np.maximum))
    return {(size, *on) for on in zip(fewest.tolist(), most.tolist(), strict=True)}
