"""The logical form of a leaf does not depend on how the devices are split."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import DictKey

from disag_jax.config import Config, ModelConfig, SplitConfig
from disag_jax.geometry import make_geometry
from disag_jax.logical import LeafMap, param_map, plain_map, state_maps
from disag_jax.state import ROUTED, SHARED
from tests import support


@st.composite
def configs(draw) -> Config:
    """Any numbers of layers, experts, vocabulary rows and workers, also such that do not divide."""
    num_layers = draw(st.integers(1, 9))
    num_workers = draw(st.integers(1, 5))
    return Config(
        model=ModelConfig(
            num_layers=num_layers,
            num_experts=draw(st.integers(num_workers, 11)),
            top_k=1,
            normalize_gates=False,
            vocab_size=draw(st.integers(1, 60)),
        ),
        split=SplitConfig(
            replicas=draw(st.integers(1, 2)),
            stages=draw(st.integers(1, num_layers)),
            attention_workers=draw(st.integers(1, 3)),
            expert_workers=num_workers,
        ),
    ).validate()


class Leaves:
    """A leaf of each kind: its map and its physical shape."""

    def __init__(self, config: Config):
        geometry = make_geometry(config)
        self.places, self.split = geometry.places, config.split
        self.grid = (config.layers_per_stage, config.split.stages)
        self.num_places = self.places.per_worker * self.places.num_workers
        devices = config.split.num_devices
        num_rows = -(-config.model.vocab_size // devices) * devices
        self.shapes = {
            "attention": (*self.grid, 3),
            "routed": (*self.grid, self.num_places, 2),
            "shared": (*self.grid, 2, 2),
            "vocabulary": (num_rows, 2),
        }
        self.maps = {
            kind: param_map(
                group, config, geometry, (DictKey(key),), jax.ShapeDtypeStruct(shape, np.int32)
            )
            for (kind, shape), group, key in zip(
                self.shapes.items(),
                ("attention", "expert", "expert", "vocabulary"),
                ("router", ROUTED, SHARED, "head"),
                strict=True,
            )
        }


def numbered(leaf_map: LeafMap) -> np.ndarray:
    """A logical leaf whose elements all differ, none of them zero."""
    size = np.prod(leaf_map.logical_shape)
    return np.arange(1, size + 1).reshape(leaf_map.logical_shape)


@given(configs())
def test_round_trip(config):
    leaves = Leaves(config)
    for kind, leaf_map in leaves.maps.items():
        logical = numbered(leaf_map)
        physical = leaf_map.to_physical(logical)
        assert physical.shape == leaves.shapes[kind]
        np.testing.assert_array_equal(leaf_map.to_logical(physical), logical)
        np.testing.assert_array_equal(np.sort(physical[physical != 0]), logical.reshape(-1))


@given(configs())
def test_where_each_element_is(config):
    leaves = Leaves(config)
    physical = {kind: m.to_physical(numbered(m)) for kind, m in leaves.maps.items()}
    num_layers, vocab_size = config.model.num_layers, config.model.vocab_size
    num_rows = np.prod(leaves.grid)
    for kind in ("attention", "shared"):
        by_layer = physical[kind].reshape(num_rows, *leaves.shapes[kind][2:])
        np.testing.assert_array_equal(by_layer[:num_layers], numbered(leaves.maps[kind]))
    np.testing.assert_array_equal(
        physical["vocabulary"][:vocab_size], numbered(leaves.maps["vocabulary"])
    )
    routed = physical["routed"].reshape(num_rows, leaves.places.num_workers, -1, 2)
    for worker in range(leaves.places.num_workers):
        share = leaves.places.share(worker)
        np.testing.assert_array_equal(
            routed[:num_layers, worker, : len(share)], numbered(leaves.maps["routed"])[:, share]
        )


@given(configs(), st.data())
def test_shards_of_any_partition_cover_each_element_once(config, data):
    leaves = Leaves(config)
    for kind, leaf_map in leaves.maps.items():
        logical, shape = numbered(leaf_map), leaves.shapes[kind]
        physical, seen = leaf_map.to_physical(logical), np.zeros(logical.shape, int)
        parts = [
            _cut(size, data.draw(st.sets(st.integers(1, size - 1), max_size=3)) if size > 1 else ())
            for size in shape[: len(shape) - len(leaf_map.tail)]
        ]
        for index in itertools.product(*parts, *([slice(None)] for _ in leaf_map.tail)):
            located, shard = leaf_map.locate(index), physical[index]
            values = logical[located.target_index]
            np.testing.assert_array_equal(located.pick(shard), values)
            np.testing.assert_array_equal(located.fill(values, shard.shape), shard)
            seen[located.target_index] += 1
        assert (seen == 1).all()


def _cut(size: int, cuts) -> list[slice]:
    ends = [0, *sorted(cuts), size]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def test_a_plain_leaf_is_its_own_logical_form():
    leaf_map = plain_map(jax.ShapeDtypeStruct((2, 3), np.int32))
    value = numbered(leaf_map)
    np.testing.assert_array_equal(leaf_map.to_physical(value), value)
    np.testing.assert_array_equal(leaf_map.to_logical(value), value)


@pytest.mark.parametrize("kind", ["attention", "plain"])
def test_picked_values_are_a_copy(kind):
    """What is saved must not change when the next step reuses the shard's buffer."""
    plain = plain_map(jax.ShapeDtypeStruct((2, 3), np.int32))
    leaf_map = Leaves(Config()).maps["attention"] if kind == "attention" else plain
    shard = leaf_map.to_physical(numbered(leaf_map))
    picked = leaf_map.locate((slice(None),) * shard.ndim).pick(shard)
    assert not np.shares_memory(picked, shard)


SPLITS = {
    "p M N = 2 1 3": (SplitConfig(1, 2, 1, 3), {"num_layers": 3, "num_experts": 7}),
    "1 2 2, two replicas": (SplitConfig(2, 1, 2, 2), {"num_experts": 8}),
    "1 2 5": (SplitConfig(1, 1, 2, 5), {"num_experts": 6, "num_shared_experts": 2}),
    "4 1 1": (SplitConfig(1, 4, 1, 1), {"num_layers": 5, "vocab_size": 9}),
}


@pytest.mark.parametrize("name", SPLITS)
def test_devices_hold_each_element_and_share_no_chunk(name):
    """Two devices that wrote to one chunk could undo each other's work."""
    split, model = SPLITS[name]
    manager = support.make_stepper(support.small_config(split, **model)).manager
    jax.tree.map(_check_devices, manager.abstract_state().masters, state_maps(manager))


def _check_devices(leaf: jax.ShapeDtypeStruct, leaf_map: LeafMap):
    seen, chunks = np.zeros(leaf_map.logical_shape, int), set()
    indices = leaf.sharding.devices_indices_map(leaf.shape).values()
    for index in {str(index): index for index in indices}.values():
        located = leaf_map.locate(index)
        if located.is_empty:
            continue
        seen[located.target_index] += 1
        by_dim = [
            np.unique(target // size).tolist()
            for target, size in zip(located.targets, leaf_map.chunk, strict=True)
        ]
        touched = set(itertools.product(*by_dim))
        assert not touched & chunks
        chunks |= touched
    assert (seen == 1).all()
