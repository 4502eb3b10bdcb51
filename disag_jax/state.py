"""Training state: logical parameter trees on the submeshes, and their packed compute copies.

There are three groups of parameters, each with its own mesh, optimizer state and update program:

  attention   leaves [v, p, ...] on the attention submesh, equal on the M workers of a stage
  expert      leaves [v, p, N * places, ...] on the expert submesh, shared experts [v, p, n, ...];
              equal on copies of the same experts, or with `optimizer.sharded` divided among them
  vocabulary  embedding and head, rows split over all devices of the union mesh

In [v, p, ...] C order is layer order (layer = row * p + stage). Masters and optimizer state are
wide (float32, or float64); the pipeline computes with copies in the compute type, packed in rows.
An update program touches only what its devices hold: it has no collectives, but to gather the
weights of divided experts.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from disag_jax import model as model_lib
from disag_jax import optimizer as optimizer_lib
from disag_jax.config import Config
from disag_jax.geometry import Geometry, make_geometry
from disag_jax.phases import Layouts
from disag_jax.pipeline import EVERYWHERE, PER_WORKER, VOCABULARY_SPECS
from mesh.placement import EXPERT, EXPERT_COPY, REPLICA, STAGE, Meshes
from mesh.roles import Role
from mesh.views import ATTENTION_ROWS, EXPERT_ROWS, role_views, union_view

ROUTED, SHARED = model_lib.EXPERTS, "shared_experts"
# Axes of the expert submesh over which the same experts lie, and the dim of their places.
HOLDERS, PLACES = (REPLICA, EXPERT_COPY), 2
GROUPS = ("attention", "expert", "vocabulary")

# Random numbers take LLVM ten times longer to optimise than to draw once.
RUN_ONCE = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass
class TrainState:
    """Everything that an optimizer step changes.

    Attributes:
      step: optimizer steps done.
      params, opt_state: by group; see the module's docstring.
      router_bias: [L, E], on every device.
      rows: [W, v, P] packed weights of every worker, in the compute type (mesh/views.py).
      vocabulary: the vocabulary's weights in the compute type.
    """

    step: int
    params: dict[str, Any]
    opt_state: dict[str, Any]
    router_bias: jax.Array
    rows: jax.Array
    vocabulary: dict[str, jax.Array]

    def wait(self):
        """Returns when the programs that make this state have ended."""
        jax.block_until_ready((self.rows, self.vocabulary))

    @property
    def masters(self) -> dict:
        """What `StateManager.with_compute_copies` makes the rest from."""
        return {
            "params": self.params,
            "opt_state": self.opt_state,
            "router_bias": self.router_bias,
        }


class Group:
    """One group's place: its mesh and the partition of its parameters and optimizer state."""

    def __init__(self, mesh, params, specs, optimizer):
        self.mesh, self.params, self.specs, self.optimizer = mesh, params, specs, optimizer
        self.opt_state = jax.eval_shape(optimizer.init, params)
        self.opt_specs = optax.tree_map_params(
            optimizer,
            lambda _, spec: spec,
            self.opt_state,
            specs,
            transform_non_params=lambda _: EVERYWHERE,
        )

    def shardings(self, specs):
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def abstract(self, tree, specs):
        """A tree of ShapeDtypeStructs with the shardings of `specs` on this group's mesh."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            self.shardings(specs),
        )

    @property
    def is_here(self) -> bool:
        """Whether this process holds a device of the group, and so takes part in its programs."""
        return any(d.process_index == jax.process_index() for d in self.mesh.devices.flat)

    def run(self, program, outputs, specs, *args):
        """Calls a program of this group, or makes arrays without shards where it has no device."""
        if self.is_here:
            return program(*args)
        return jax.tree.map(
            lambda leaf, sharding: jax.make_array_from_single_device_arrays(
                leaf.shape, sharding, [], dtype=leaf.dtype
            ),
            outputs,
            self.shardings(specs),
        )


class StateManager:
    """Creates training state and updates it from the pipeline's gradients."""

    def __init__(self, config: Config, meshes: Meshes):
        self.config, self.meshes = config, meshes
        self.geometry = make_geometry(config)
        self.layouts = Layouts.of(self.geometry)
        self.groups = _make_groups(config, meshes, self.geometry)
        self._rows_spec = {"attention": ATTENTION_ROWS, "expert": EXPERT_ROWS}
        self._pack = {
            "attention": functools.partial(_pack_attention, self.layouts),
            "expert": functools.partial(_pack_expert, self.layouts),
        }
        self._unpack = {
            "attention": functools.partial(_unpack_attention, self.layouts),
            "expert": functools.partial(_unpack_expert, self.layouts, self.geometry),
        }
        self._updates = {name: self._update_program(name) for name in GROUPS}

    def init(self, seed: int) -> TrainState:
        """Fresh state; parameters depend on the seed and the model alone, not on the split."""
        params, opt_state = {}, {}
        for name, group in self.groups.items():
            make = jax.jit(
                self._init_group(name),
                out_shardings=group.shardings(group.specs),
                compiler_options=RUN_ONCE,
            )
            params[name] = group.run(make, group.params, group.specs, jax.random.key(seed))
            start = jax.jit(group.optimizer.init, out_shardings=group.shardings(group.opt_specs))
            opt_state[name] = group.run(start, group.opt_state, group.opt_specs, params[name])
        return self.with_compute_copies(0, params, opt_state, self._zero_bias())

    def with_compute_copies(self, step: int, params, opt_state, router_bias) -> TrainState:
        """The state with these masters: casts and packs what the pipeline computes with."""

        def role_rows(name):
            group = self.groups[name]
            program = self._shard_map(
                group,
                functools.partial(self._compute_copy, name),
                (group.specs,),
                self._rows_spec[name],
            )
            return group.run(program, self._row_shape(name), self._rows_spec[name], params[name])

        cast = jax.jit(functools.partial(self._compute_copy, "vocabulary"))
        return TrainState(
            step=step,
            params=params,
            opt_state=opt_state,
            router_bias=router_bias,
            rows=union_view(self.meshes, role_rows("attention"), role_rows("expert")),
            vocabulary=cast(params["vocabulary"]),
        )

    def abstract_state(self) -> TrainState:
        """The state as ShapeDtypeStructs with shardings: nothing is allocated."""
        params, opt_state = {}, {}
        for name, group in self.groups.items():
            params[name] = group.abstract(group.params, group.specs)
            opt_state[name] = group.abstract(group.opt_state, group.opt_specs)
        vocabulary, model = self.groups["vocabulary"], self.config.model
        copies = _with_dtype(vocabulary.params, self.geometry.compute_dtype)
        return TrainState(
            step=0,
            params=params,
            opt_state=opt_state,
            router_bias=self._on_union(
                self.geometry.wides(model.num_layers, model.num_experts), EVERYWHERE
            ),
            rows=self._abstract_rows(),
            vocabulary=vocabulary.abstract(copies, VOCABULARY_SPECS),
        )

    def _abstract_rows(self):
        def rows(role):
            shape = (self.config.layers_per_stage, self.layouts.num_columns(role))
            leaf = self.geometry.floats(self.meshes.placement.num_devices, *shape)
            return self._on_union(leaf, PER_WORKER)

        if self.layouts.colocated:
            return {role.label: rows(role) for role in Role}
        return rows(Role.ATTENTION)

    def lower_updates(self) -> dict[str, jax.stages.Lowered]:
        """The update program of each group, traced for the state's shapes but not compiled."""
        state, wide = self.abstract_state(), self.geometry.wide_dtype
        scalars = (jax.ShapeDtypeStruct((), wide),) * 2
        lowered = {}
        for name, group in self.groups.items():
            (_, _, copies), (_, _, copy_specs) = self._update_outputs(name)
            grads = group.abstract(_with_dtype(copies, wide), copy_specs)
            lowered[name] = self._updates[name].lower(
                state.params[name], state.opt_state[name], group.abstract(copies, copy_specs),
                grads, *scalars,
            )  # fmt: skip
        return lowered

    def update(
        self, state: TrainState, row_grads, vocabulary_grads, router_bias, factor, rate
    ) -> TrainState:
        """The next state, for gradients scaled by `factor` and learning rate `rate`.

        The old state is donated: use it no more. Everything large is updated where it lies, so that
        steps neither need more memory than they hold nor leave it in pieces.
        """
        wide = self.geometry.wide_dtype.type
        scalars = (wide(factor), wide(rate))
        grads = self._views(row_grads, vocabulary_grads)
        old_copies = self._views(state.rows, state.vocabulary)
        params, opt_state, copies = {}, {}, {}
        for name, group in self.groups.items():
            outputs, specs = self._update_outputs(name)
            args = (state.params[name], state.opt_state[name], old_copies.pop(name), grads[name])
            params[name], opt_state[name], copies[name] = group.run(
                self._updates[name], outputs, specs, *args, *scalars
            )
        return TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            router_bias=router_bias,
            rows=union_view(self.meshes, copies["attention"], copies["expert"]),
            vocabulary=copies["vocabulary"],
        )

    def abstract_gradients(self) -> tuple:
        """(row gradients, vocabulary gradients) of the pipeline, as ShapeDtypeStructs."""
        wide, vocabulary = self.geometry.wide_dtype, self.groups["vocabulary"]
        rows = jax.tree.map(
            lambda leaf: self._on_union(_with_dtype(leaf, wide), PER_WORKER), self._abstract_rows()
        )
        return rows, vocabulary.abstract(_with_dtype(vocabulary.params, wide), VOCABULARY_SPECS)

    def zero_gradients(self) -> tuple:
        """The pipeline's first gradient buffers."""
        leaves = self.abstract_gradients()
        return jax.jit(
            lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), leaves),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, leaves),
        )()

    def _views(self, rows, vocabulary) -> dict:
        """Rows and vocabulary of the union mesh as arrays by group."""
        attention, expert = role_views(self.meshes, rows)
        return {"attention": attention, "expert": expert, "vocabulary": vocabulary}

    def _update_program(self, name: str):
        group = self.groups[name]

        def update(params, opt_state, old_copies, grads, factor, rate):
            del old_copies  # their memory is the new ones'
            if name != "vocabulary":
                grads = self._own_part(name, self._unpack[name](grads))
            params, opt_state = optimizer_lib.apply(
                group.optimizer, params, opt_state, grads, factor, rate
            )
            return params, opt_state, self._compute_copy(name, params)

        # Its name in a profile.
        update.__name__ = f"update_{name}"
        copy_specs = self._rows_spec.get(name, VOCABULARY_SPECS)
        out_specs = (group.specs, group.opt_specs, copy_specs)
        in_specs = (*out_specs, copy_specs, EVERYWHERE, EVERYWHERE)
        return self._shard_map(
            group, update, in_specs, out_specs, donate_argnums=(0, 1, 2), keep_unused=True
        )

    def _compute_copy(self, name: str, params):
        """What the pipeline computes with, of a device's masters."""
        copy = jax.tree.map(lambda x: x.astype(self.geometry.compute_dtype), params)
        if name == "vocabulary":
            return copy
        if self._divides(name):
            whole = functools.partial(lax.all_gather, axis_name=HOLDERS, axis=PLACES, tiled=True)
            copy = {**copy, ROUTED: jax.tree.map(whole, copy[ROUTED])}
        return self._pack[name](copy)

    def _own_part(self, name: str, grads):
        """The gradients of what a device holds the masters of."""
        if not self._divides(name):
            return grads

        def own(x):
            size = x.shape[PLACES] // self.config.split.expert_holders
            return lax.dynamic_slice_in_dim(x, lax.axis_index(HOLDERS) * size, size, PLACES)

        return {**grads, ROUTED: jax.tree.map(own, grads[ROUTED])}

    def _divides(self, name: str) -> bool:
        return name == "expert" and self.config.optimizer.sharded

    def _update_outputs(self, name: str):
        """(shapes, specs) of what `_update_program` returns."""
        group = self.groups[name]
        if name == "vocabulary":
            copy = _with_dtype(group.params, self.geometry.compute_dtype)
        else:
            copy = self._row_shape(name)
        specs = (group.specs, group.opt_specs, self._rows_spec.get(name, VOCABULARY_SPECS))
        return (group.params, group.opt_state, copy), specs

    def _row_shape(self, name: str) -> jax.ShapeDtypeStruct:
        placement, role = self.meshes.placement, Role[name.upper()]
        lead = placement.stages * (placement.expert_workers if role is Role.EXPERT else 1)
        columns = self.layouts.num_columns(role)
        return self.geometry.floats(lead, self.config.layers_per_stage, columns)

    def _shard_map(self, group: Group, function, in_specs, out_specs, **jit_options):
        mapped = jax.shard_map(
            function, mesh=group.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return jax.jit(mapped, **jit_options)

    def _on_union(self, leaf: jax.ShapeDtypeStruct, spec) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(self.meshes.union, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def _zero_bias(self):
        shape = (self.config.model.num_layers, self.config.model.num_experts)
        sharding = NamedSharding(self.meshes.union, EVERYWHERE)
        zeros = np.zeros(shape, self.geometry.wide_dtype)
        return jax.make_array_from_callback(shape, sharding, lambda index: zeros[index])

    def _init_group(self, name: str):
        return functools.partial(_INIT[name], self.config, self.geometry)


def _make_groups(config: Config, meshes: Meshes, geometry: Geometry) -> dict[str, Group]:
    per_stage = PartitionSpec(None, STAGE)
    # A worker's experts stay together: its holders' parts follow each other.
    places = (EXPERT, *HOLDERS) if config.optimizer.sharded else EXPERT
    specs = {
        "attention": lambda path: per_stage,
        "expert": lambda path: (
            per_stage if path[0].key == SHARED else PartitionSpec(None, STAGE, places)
        ),
        "vocabulary": lambda path: VOCABULARY_SPECS[path[0].key],
    }
    mesh = {"attention": meshes.attention, "expert": meshes.expert, "vocabulary": meshes.union}
    groups = {}
    for name in GROUPS:
        init = functools.partial(_INIT[name], config, geometry)
        params = jax.eval_shape(init, jax.random.key(0))
        tree = jax.tree_util.tree_map_with_path(lambda path, _, f=specs[name]: f(path), params)
        leading_dims = 0 if name == "vocabulary" else 2
        optimizer = optimizer_lib.make_optimizer(config, leading_dims)
        groups[name] = Group(mesh[name], params, tree, optimizer)
    return groups


def _layer_grid(config: Config):
    """Layer index of each (row, stage), int32 [v, p]; rows past the last layer are idle."""
    shape = (config.layers_per_stage, config.split.stages)
    return jnp.arange(shape[0] * shape[1], dtype=jnp.int32).reshape(shape)


def _init_attention(config: Config, geometry: Geometry, key):
    init = functools.partial(model_lib.init_attention_layer, config.model, geometry.wide_dtype, key)
    return jax.vmap(jax.vmap(init))(_layer_grid(config))


def _init_expert(config: Config, geometry: Geometry, key):
    init = functools.partial(model_lib.init_experts, config.model, geometry.wide_dtype, key)
    over_layers = lambda ids: jax.vmap(jax.vmap(lambda layer: init(layer, ids)))  # noqa: E731
    num_experts, num_shared = config.model.num_experts, config.model.num_shared_experts
    params = {
        ROUTED: over_layers(jnp.asarray(geometry.places.place_experts()))(_layer_grid(config))
    }
    if num_shared:
        shared_ids = num_experts + jnp.arange(num_shared)
        params[SHARED] = over_layers(shared_ids)(_layer_grid(config))
    return params


def _init_vocabulary(config: Config, geometry: Geometry, key):
    num_devices = geometry.placement.num_devices
    num_rows = -(-config.model.vocab_size // num_devices) * num_devices
    return model_lib.init_vocabulary(config.model, geometry.wide_dtype, key, num_rows)


_INIT = {"attention": _init_attention, "expert": _init_expert, "vocabulary": _init_vocabulary}


def _pack_attention(layouts: Layouts, params):
    """Local leaves [v, 1, ...] to rows [1, v, P]."""
    layer = jax.tree.map(lambda x: x[:, 0], params)
    return _pack(layouts, Role.ATTENTION, layer)


def _unpack_attention(layouts: Layouts, rows):
    return jax.tree.map(lambda x: x[:, None], layouts[Role.ATTENTION].unpack(rows[0]))


def _pack_expert(layouts: Layouts, params):
    """Local leaves [v, 1, places, ...] to rows [1, v, P], shared experts after the worker's own."""
    experts = params[ROUTED]
    if SHARED in params:
        join = lambda routed, shared: jnp.concatenate([routed, shared], axis=2)  # noqa: E731
        experts = jax.tree.map(join, experts, params[SHARED])
    layer = {ROUTED: jax.tree.map(lambda x: x[:, 0], experts)}
    return _pack(layouts, Role.EXPERT, layer)


def _pack(layouts: Layouts, role: Role, layer):
    return layouts[role].pack(layer, layouts.num_columns(role))[None]


def _unpack_expert(layouts: Layouts, geometry: Geometry, rows):
    experts = jax.tree.map(lambda x: x[:, None], layouts[Role.EXPERT].unpack(rows[0])[ROUTED])
    per_worker = geometry.places.per_worker
    params = {ROUTED: jax.tree.map(lambda x: x[:, :, :per_worker], experts)}
    if geometry.config.model.num_shared_experts:
        params[SHARED] = jax.tree.map(lambda x: x[:, :, per_worker:], experts)
    return params


def _with_dtype(tree, dtype):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)
