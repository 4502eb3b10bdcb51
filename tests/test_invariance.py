"""The same global batch gives the same losses whatever the split and its grouping are."""

import dataclasses

import pytest

from disag_jax.config import PlacementKind, SplitConfig
from tests import reference, support

TOLERANCE = 1e-11
STEPS = 3

# Split, T, K: sixteen sequences a step in every row.
SPLITS = {
    "1-1-1": (SplitConfig(), 16, 8),
    "2-1-3": (SplitConfig(stages=2, expert_workers=3), 32, 4),
    "hop 2, 1-1-3": (SplitConfig(expert_workers=3, hop=2), 16, 8),
    "two replicas": (SplitConfig(replicas=2, attention_workers=2, expert_workers=2), 16, 2),
    "1-4-1": (SplitConfig(attention_workers=4), 8, 4),
    "co-located": (
        SplitConfig(
            stages=2, attention_workers=4, expert_workers=2, placement=PlacementKind.COLOCATED
        ),
        8, 4,
    ),
}  # fmt: skip


def losses(name):
    split, tokens_per_worker, micro_batches = SPLITS[name]
    config = support.small_config(
        split, micro_batches, num_layers=3, bias_update_rate=0.01, capacity_factor=1.25,
        num_shared_experts=1,
    )  # fmt: skip
    config.batch = dataclasses.replace(config.batch, tokens_per_worker=tokens_per_worker)
    stepper = support.make_stepper(config.validate())
    state = support.place_state(
        stepper, support.oracle_params(config), reference.init_router_bias(config)
    )
    found = []
    for step in range(STEPS):
        state, metrics = stepper.train_step(state, support.random_sequences(config, step))
        assert metrics["dropped_pairs"].sum() > 0, "the test must drop"
        found.append(metrics["total_loss"])
    return found


@pytest.fixture(scope="module")
def expected():
    return losses("1-1-1")


@pytest.mark.parametrize("name", [name for name in SPLITS if name != "1-1-1"])
def test_losses_do_not_depend_on_the_split(name, expected):
    for ours, theirs in zip(losses(name), expected, strict=True):
        assert support.relative_error(ours, theirs) < TOLERANCE
