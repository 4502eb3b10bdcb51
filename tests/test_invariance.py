"""The same global batch gives the same losses whatever the split and its grouping are."""

import dataclasses

import pytest

from disag_jax.config import SplitConfig
from tests import reference, support

TOLERANCE = 1e-11
STEPS = 3

# (p, M, N, D), T, K: sixteen sequences a step in every row.
SPLITS = [
    ((1, 1, 1, 1), 16, 8),
    ((2, 1, 3, 1), 32, 4),
    ((1, 2, 2, 2), 16, 2),
    ((1, 4, 1, 1), 8, 4),
]


def losses(shape, tokens_per_worker, micro_batches):
    stages, attention, expert, replicas = shape
    split = SplitConfig(replicas, stages, attention, expert)
    config = support.small_config(split, micro_batches, num_layers=3, bias_update_rate=0.01)
    config.batch = dataclasses.replace(config.batch, tokens_per_worker=tokens_per_worker)
    stepper = support.make_stepper(config.validate())
    state = support.place_state(
        stepper, support.oracle_params(config), reference.init_router_bias(config)
    )
    found = []
    for step in range(STEPS):
        state, metrics = stepper.train_step(state, support.random_sequences(config, step))
        found.append(metrics["total_loss"])
    return found


@pytest.fixture(scope="module")
def expected():
    return losses(*SPLITS[0])


@pytest.mark.parametrize("shape, tokens_per_worker, micro_batches", SPLITS[1:])
def test_losses_do_not_depend_on_the_split(shape, tokens_per_worker, micro_batches, expected):
    found = losses(shape, tokens_per_worker, micro_batches)
    for ours, theirs in zip(found, expected, strict=True):
        assert support.relative_error(ours, theirs) < TOLERANCE
