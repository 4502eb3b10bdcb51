"""Where each element of a physical leaf belongs in the logical model.

Physical leaves follow the split: [v, p, ...] per layer, experts in their workers' places, the
vocabulary in equal shards, each possibly with padding. The logical tree is the model's own: layers
[L, ...], experts [L, E, ...], vocabulary [V, D]. A checkpoint holds the logical tree, so that it
can be restored onto any other split.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax

from disag_jax.config import Config
from disag_jax.geometry import Geometry
from disag_jax.state import GROUPS, ROUTED, StateManager

PADDING = -1


@dataclasses.dataclass(frozen=True)
class LeafMap:
    """How the leading dims of one physical leaf map to those of the logical leaf.

    Attributes:
      tables: for each leading logical dim, the logical index (or PADDING) at each position of the
        physical dims that stand for it, which follow one another.
      sizes: the leading logical dims.
      tail: the dims both have in common.
      chunk: leading dims of a block that one worker holds whole.
    """

    tables: tuple[np.ndarray, ...]
    sizes: tuple[int, ...]
    tail: tuple[int, ...]
    chunk: tuple[int, ...]

    @property
    def logical_shape(self) -> tuple[int, ...]:
        return self.sizes + self.tail

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return self.chunk + self.tail

    def locate(self, index: tuple[slice, ...]) -> "Located":
        """The elements of a shard that holds `index` of the physical leaf."""
        positions, targets, sizes, dim = [], [], [], 0
        for table in self.tables:
            cut = table[index[dim : dim + table.ndim]].reshape(-1)
            positions.append(np.flatnonzero(cut != PADDING))
            targets.append(cut[cut != PADDING])
            sizes.append(cut.size)
            dim += table.ndim
        return Located(tuple(positions), tuple(targets), (*sizes, *self.tail))

    def to_logical(self, physical: np.ndarray) -> np.ndarray:
        """The logical leaf of a whole physical leaf on the host."""
        located = self.locate((slice(None),) * physical.ndim)
        logical = np.empty(self.logical_shape, physical.dtype)
        logical[located.target_index] = located.pick(physical)
        return logical

    def to_physical(self, logical: np.ndarray) -> np.ndarray:
        """The physical leaf of a whole logical leaf on the host, zeros in the padding."""
        dims = sum((table.shape for table in self.tables), ())
        located = self.locate((slice(None),) * (len(dims) + len(self.tail)))
        return located.fill(logical[located.target_index], (*dims, *self.tail))


@dataclasses.dataclass(frozen=True)
class Located:
    """A shard's real elements: their positions in the shard and in the logical leaf.

    The shard is seen as [size_1, ..., *tail], one dim per leading logical dim.
    """

    positions: tuple[np.ndarray, ...]
    targets: tuple[np.ndarray, ...]
    shape: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        return any(p.size == 0 for p in self.positions)

    @property
    def target_index(self):
        return np.ix_(*self.targets) if self.targets else ()

    def pick(self, shard: np.ndarray) -> np.ndarray:
        """A copy of the real elements of a shard."""
        grid = shard.reshape(self.shape)
        return grid[np.ix_(*self.positions)] if self.positions else grid.copy()

    def fill(self, values: np.ndarray, shard_shape) -> np.ndarray:
        """A shard with these real elements and zeros elsewhere."""
        grid = np.zeros(self.shape, values.dtype)
        if self.positions:
            grid[np.ix_(*self.positions)] = values
        else:
            grid[...] = values
        return grid.reshape(shard_shape)


def state_maps(manager: StateManager) -> dict:
    """LeafMaps of `TrainState.masters`: {"params": {group: tree}, "opt_state": .., "router_bias"}.

    What is not per layer, expert or vocabulary row maps to itself.
    """
    maps = {"params": {}, "opt_state": {}}
    for name in GROUPS:
        group = manager.groups[name]
        params = jax.tree_util.tree_map_with_path(
            functools.partial(param_map, name, manager.config, manager.geometry), group.params
        )
        maps["params"][name] = params
        maps["opt_state"][name] = optax.tree_map_params(
            group.optimizer,
            lambda _, leaf_map: leaf_map,
            group.opt_state,
            params,
            transform_non_params=plain_map,
        )
    maps["router_bias"] = plain_map(manager.abstract_state().router_bias)
    return maps


def param_map(group: str, config: Config, geometry: Geometry, path, leaf) -> LeafMap:
    """The map of a parameter, given its path in its group's tree and its physical shape."""
    return _MAPS[group](config, geometry, path, leaf)


def plain_map(leaf) -> LeafMap:
    """The map of a leaf that is its own logical form."""
    return LeafMap((), (), tuple(leaf.shape), ())


def _layer_table(config: Config) -> np.ndarray:
    """Layer of each (row, stage)."""
    num_layers, stages = config.model.num_layers, config.split.stages
    layers = np.arange(config.layers_per_stage * stages).reshape(-1, stages)
    return np.where(layers < num_layers, layers, PADDING)


def _attention_map(config: Config, geometry: Geometry, path, leaf) -> LeafMap:
    return LeafMap((_layer_table(config),), (config.model.num_layers,), leaf.shape[2:], (1,))


def _expert_map(config: Config, geometry: Geometry, path, leaf) -> LeafMap:
    if path[0].key != ROUTED:
        return _attention_map(config, geometry, path, leaf)
    num_experts, blocks = config.model.num_experts, config.split.expert_workers
    if config.optimizer.sharded:
        blocks *= config.split.expert_holders
    return LeafMap(
        tables=(_layer_table(config), geometry.places.place_experts()),
        sizes=(config.model.num_layers, num_experts),
        tail=leaf.shape[3:],
        chunk=(1, 1 if num_experts % blocks else num_experts // blocks),
    )


def _vocabulary_map(config: Config, geometry: Geometry, path, leaf) -> LeafMap:
    if leaf.ndim == 1:
        return plain_map(leaf)
    num_rows, vocab_size = leaf.shape[0], config.model.vocab_size
    rows = np.arange(num_rows)
    per_device = num_rows // geometry.placement.num_devices
    return LeafMap(
        tables=(np.where(rows < vocab_size, rows, PADDING),),
        sizes=(vocab_size,),
        tail=leaf.shape[1:],
        chunk=(per_device,),
    )


_MAPS = {"attention": _attention_map, "expert": _expert_map, "vocabulary": _vocabulary_map}
