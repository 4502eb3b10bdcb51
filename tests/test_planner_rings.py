"""Sums over several nodes: closed forms, and rings built edge by edge."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import qwen3_235b
from disag_jax.config import SplitConfig
from disag_jax.planner import hardware
from disag_jax.planner.costs import Costs
from disag_jax.planner.rings import Rings, shapes_of
from disag_jax.planner.sizes import Sizes
from disag_jax.planner.topology import StageLinks, per_device
from mesh.placement import Placement

H800 = hardware.load("h800")
NEAR, FAR = H800.intra_node, per_device(H800)
NVLINK, CARD = 200e9 * 0.82, 50e9 * 0.9
NEAR_LATENCY, FAR_LATENCY = 10e-6, 20e-6
SIZE = 1e9


def rings(*nodes) -> Rings:
    return Rings(NEAR, FAR, shapes_of(np.array(nodes)))


def test_closed_forms():
    eight = rings([0] * 8)
    assert eight.all_reduce(SIZE) == pytest.approx(NEAR_LATENCY + 2 * 7 / 8 * SIZE / NVLINK)
    assert eight.all_gather(SIZE) == pytest.approx(NEAR_LATENCY + 7 / 8 * SIZE / NVLINK)
    # A worker on each of two nodes has its own card alone.
    assert rings([0, 1]).all_reduce(SIZE) == pytest.approx(FAR_LATENCY + SIZE / CARD)
    # Two on each have two cards, and half of the bytes on each of them.
    two = rings([0, 0, 1, 1]).all_reduce(SIZE)
    assert two == pytest.approx(FAR_LATENCY + 2 * 3 / 4 * SIZE / (2 * CARD))
    # Eight cards are faster than an H800's NVLink, which then sets the time.
    sixteen = rings([0] * 8 + [1] * 8).all_reduce(SIZE)
    assert sixteen == pytest.approx(NEAR_LATENCY + 7 / 8 * 2 * 15 / 16 * SIZE / NVLINK)
    assert rings([3]).all_reduce(SIZE) == 0


def test_the_node_with_the_fewest_workers_and_the_slowest_group_set_the_time():
    lopsided = rings([0] * 7 + [1])
    assert lopsided.all_reduce(SIZE) == pytest.approx(FAR_LATENCY + 2 * 7 / 8 * SIZE / CARD)
    groups = [0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]
    slowest = max(rings(group).all_reduce(SIZE) for group in groups)
    assert rings(*groups).all_reduce(SIZE) == slowest > rings(groups[0]).all_reduce(SIZE)
    several = Rings(NEAR, FAR, shapes_of(np.array([[0, 0]]), np.array([[0, 0, 1]])))
    assert several.all_reduce(SIZE) == rings([0, 0, 1]).all_reduce(SIZE)


@given(st.integers(1, 5), st.integers(1, 8))
def test_rings_built_edge_by_edge_take_as_long(num_nodes, per_node):
    """k rings, the i-th leaving each node at its i-th worker; each edge carries its bytes."""
    size = num_nodes * per_node
    network, nvlink = collections.Counter(), collections.Counter()
    for i in range(per_node):
        ring = [
            node * per_node + (i + 1 + step) % per_node
            for node in range(num_nodes)
            for step in range(per_node)
        ]
        for worker, after in zip(ring, [*ring[1:], ring[0]], strict=True):
            if worker == after:
                continue
            link = nvlink if worker // per_node == after // per_node else network
            link[worker] += 2 * (size - 1) / size * SIZE / per_node
    # Every worker has a card of its own, and no card carries more than its own ring.
    assert set(network) == (set(range(size)) if num_nodes > 1 else set())
    seconds = [NEAR_LATENCY + num_bytes / NVLINK for num_bytes in nvlink.values()]
    seconds += [FAR_LATENCY + num_bytes / CARD for num_bytes in network.values()]
    found = rings([node for node in range(num_nodes) for _ in range(per_node)])
    assert found.all_reduce(SIZE) == pytest.approx(max(seconds, default=0))


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6),
    st.integers(2, 8), st.booleans(),
)  # fmt: skip
def test_rings_are_those_of_the_placements_groups(
    replicas, stages, attention, expert, per_node, colocated
):
    if colocated:
        attention *= expert
    placement = Placement(replicas, stages, attention, expert, colocated)
    cluster = dataclasses.replace(H800, devices_per_node=per_node, nics_per_node=per_node)
    links = StageLinks.of(placement, cluster)
    workers = range(placement.workers)
    by_name = {
        "replicas": [[r * placement.workers + w for r in range(replicas)] for w in workers],
        "world": [list(range(placement.num_devices))],
    }
    within = {"stage": placement.stage_groups() if colocated else placement.role_groups()}
    if colocated:
        within["expert_copies"] = placement.expert_copy_groups()
        within["expert_groups"] = placement.expert_groups()
    for name, groups in within.items():
        by_name[name] = [
            [replica * placement.workers + worker for worker in group]
            for group in groups
            for replica in range(replicas)
        ]
    for name, groups in by_name.items():
        shapes = set()
        for group in groups:
            on = collections.Counter(device // per_node for device in group).values()
            shapes.add((len(group), min(on), max(on)))
        assert getattr(links, name).shapes == shapes, name


def test_whole_nodes_sum_with_all_their_cards():
    config = qwen3_235b.get_config()
    config.split = SplitConfig(replicas=2, stages=1, attention_workers=16, expert_workers=16)
    costs = Costs(Sizes.of(config.validate()), H800)
    seconds = costs.links.stage.all_reduce(SIZE)
    one_card = FAR_LATENCY + 2 * 15 / 16 * SIZE / CARD
    assert seconds < one_card / 3
    # Of replicas on nodes of their own, each worker meets one other, over its own card.
    assert costs.links.replicas.all_reduce(SIZE) == pytest.approx(FAR_LATENCY + SIZE / CARD)
