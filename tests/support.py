"""Small configs, and the bridge between the oracle's logical tree and the system's state."""

import dataclasses

import jax
import numpy as np
from jax.extend import core
from jax.sharding import NamedSharding

from disag_jax.batches import Batch
from disag_jax.config import (
    BatchConfig,
    Config,
    Dtype,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SplitConfig,
)
from disag_jax.geometry import placement_of
from disag_jax.logical import state_maps
from disag_jax.state import GROUPS, TrainState
from disag_jax.step import Stepper
from mesh.placement import Meshes
from mesh.views import role_views
from tests import reference

MODEL = ModelConfig(
    vocab_size=43,
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    num_experts=6,
    top_k=2,
    expert_width=12,
    balance_loss_weight=0.3,
    z_loss_weight=0.02,
)
BATCH = BatchConfig(sequence_length=8, tokens_per_worker=16, micro_batches=3)


def small_config(split: SplitConfig, micro_batches: int = 3, **model) -> Config:
    """A float64 config with everything small and every loss on."""
    return Config(
        # A single normalized gate is constant, which the config refuses.
        model=dataclasses.replace(MODEL, **{"normalize_gates": model.get("top_k") != 1} | model),
        split=split,
        batch=dataclasses.replace(BATCH, micro_batches=micro_batches),
        optimizer=OptimizerConfig(warmup_steps=3, peak_learning_rate=3e-3, max_grad_norm=0.5),
        run=RunConfig(num_steps=20, compute_dtype=Dtype.FLOAT64, loss_chunk=8),
    ).validate()


def make_plain(config: Config):
    """Leaves of a config for eight devices what compiles soonest: a layer and a micro-batch."""
    config.model.num_layers, config.batch.micro_batches = 1, 1
    config.split = SplitConfig(replicas=4, bucket_factors=())


def make_stepper(config: Config) -> Stepper:
    placement = placement_of(config)
    return Stepper(config, Meshes.make(placement, jax.devices()[: placement.num_devices]))


def random_sequences(config: Config, seed: int = 1, end_of_document: int | None = None) -> Batch:
    """A global batch; with an end-of-document token, every sixth token or so is one."""
    shape = (config.sequences_per_step, config.batch.sequence_length + 1)
    rng = np.random.default_rng(seed)
    sequences = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    if end_of_document is not None:
        sequences[rng.random(shape) < 1 / 6] = end_of_document
    return Batch.of(
        sequences, end_of_document, across_documents=config.data.attend_across_documents
    )


def oracle_params(config: Config) -> dict:
    return reference.init(config, jax.random.key(7))


def place_state(stepper: Stepper, params: dict, router_bias) -> TrainState:
    """Training state with the oracle's parameters and fresh optimizer state."""
    manager = stepper.manager
    maps = state_maps(manager)["params"]
    placed, opt_state = {}, {}
    for name in GROUPS:
        group = manager.groups[name]
        physical = jax.tree.map(lambda m, x: m.to_physical(np.asarray(x)), maps[name], params[name])
        placed[name] = jax.device_put(physical, group.shardings(group.specs))
        init = jax.jit(group.optimizer.init, out_shardings=group.shardings(group.opt_specs))
        opt_state[name] = init(placed[name])
    bias = jax.device_put(
        np.asarray(router_bias), NamedSharding(stepper.meshes.union, jax.sharding.PartitionSpec())
    )
    return manager.with_compute_copies(0, placed, opt_state, bias)


def logical_params(stepper: Stepper, params: dict) -> dict:
    """Physical parameter (or gradient) trees by group, as the oracle's logical tree."""
    maps = state_maps(stepper.manager)["params"]
    return {
        name: jax.tree.map(lambda m, x: m.to_logical(np.asarray(x)), maps[name], params[name])
        for name in GROUPS
    }


def logical_gradients(stepper: Stepper, row_grads, vocabulary_grads) -> dict:
    """The pipeline's gradients as the oracle's logical tree."""
    manager = stepper.manager
    views = dict(zip(("attention", "expert"), role_views(stepper.meshes, row_grads), strict=True))
    trees = {"vocabulary": vocabulary_grads}
    for name, rows in views.items():
        group = manager.groups[name]
        unpack = manager._shard_map(
            group, manager._unpack[name], (manager._rows_spec[name],), group.specs
        )
        trees[name] = unpack(rows)
    return logical_params(stepper, trees)


def run_pipeline(stepper: Stepper, state: TrainState, sequences):
    """(loss metrics, logical gradients, next router bias) of one step, without an update."""
    program = stepper.gradient_program(stepper.chooser.current)
    batch = stepper.place_batch(sequences)
    rows, vocabulary, bias, metrics = program(
        state.rows, state.vocabulary, state.router_bias, batch, stepper.manager.zero_gradients()
    )
    return jax.device_get(metrics), logical_gradients(stepper, rows, vocabulary), bias


def relative_error(actual, expected) -> float:
    """Norm of the difference over the norm of the expected array."""
    difference = np.linalg.norm(np.asarray(actual) - np.asarray(expected))
    return float(difference / max(np.linalg.norm(expected), 1e-30))


def subprograms(jaxpr):
    """A jaxpr and all those in its equations."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for inner in core.jaxprs_in_params(equation.params):
            yield from subprograms(inner)
