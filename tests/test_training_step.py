"""Optimizer steps: equality with a plain trainer, bucket re-runs, determinism, bad numbers."""

import functools

import jax
import numpy as np
import pytest

from disag_jax import optimizer
from disag_jax.config import MuDtype, PlacementKind, RouterScore, SplitConfig
from disag_jax.geometry import Bucket, buckets
from disag_jax.step import BUCKET_MEMORY, BucketChooser
from tests import reference, support

EVERYTHING_ON = {
    "num_layers": 3,
    "num_shared_experts": 1,
    "bias_update_rate": 0.01,
    "capacity_factor": 1.25,
}


@pytest.fixture(scope="module")
def everything_on():
    """A stepper with every loss, the bias update, dropping, clipping, decay and schedule on."""
    split = SplitConfig(stages=2, attention_workers=1, expert_workers=3)
    config = support.small_config(split, 4, **EVERYTHING_ON)
    return support.make_stepper(config)


def start(stepper):
    params = support.oracle_params(stepper.config)
    bias = reference.init_router_bias(stepper.config)
    return params, bias, support.place_state(stepper, params, bias)


@pytest.fixture(scope="module")
def colocated():
    """The same with a sigmoid router, co-located."""
    split = SplitConfig(attention_workers=4, expert_workers=2, placement=PlacementKind.COLOCATED)
    router = {"router_score": RouterScore.SIGMOID, "gate_scale": 2.5}
    return support.make_stepper(support.small_config(split, 2, **EVERYTHING_ON, **router))


@pytest.fixture(scope="module")
def short_first_moment():
    """A small model whose first moments are bfloat16 between steps, everything else float64."""
    split = SplitConfig(attention_workers=1, expert_workers=1, bucket_factors=())
    config = support.small_config(split, 2, num_layers=1, bias_update_rate=0.01)
    config.optimizer.mu_dtype = MuDtype.BFLOAT16
    return support.make_stepper(config)


def make_sharded(split):
    """A stepper whose routed experts' optimizer state is divided in two on each worker."""
    config = support.small_config(
        split, 2, num_layers=3, num_shared_experts=1, num_experts=8, bias_update_rate=0.01
    )
    config.optimizer.sharded = True
    return support.make_stepper(config.validate())


@pytest.fixture(scope="module")
def sharded_over_replicas():
    return make_sharded(SplitConfig(2, 2, 1, 1, bucket_factors=()))


@pytest.fixture(scope="module")
def sharded_over_groups():
    kind = PlacementKind.COLOCATED
    return make_sharded(SplitConfig(1, 1, 4, 2, bucket_factors=(), placement=kind))


@pytest.mark.parametrize("name", ["sharded_over_replicas", "sharded_over_groups"])
def test_the_holders_of_experts_divide_their_state(name, request):
    stepper = request.getfixturevalue(name)
    state, per_worker = stepper.init(0), 8 // stepper.config.split.expert_workers
    routed = state.params["expert"]["experts"]["gate"]
    moments = state.opt_state["expert"][0].mu["experts"]["gate"]
    for leaf in (routed, moments):
        shapes = {shard.data.shape[2] for shard in leaf.addressable_shards}
        assert shapes == {per_worker // 2}
        # Every part is somewhere, and nowhere twice.
        assert all(shard.replica_id == 0 for shard in leaf.addressable_shards)
    shared = state.params["expert"]["shared_experts"]["gate"]
    assert {shard.data.shape[2] for shard in shared.addressable_shards} == {1}


def test_the_first_moment_is_of_the_type_that_is_asked_for(short_first_moment, everything_on):
    def dtypes(stepper):
        states = [s[0] for s in stepper.init(0).opt_state.values()]
        return [{x.dtype.name for x in jax.tree.leaves([getattr(s, name) for s in states])}
                for name in ("mu", "nu")]  # fmt: skip

    assert dtypes(short_first_moment) == [{"bfloat16"}, {"float64"}]
    assert dtypes(everything_on) == [{"float64"}, {"float64"}]


@pytest.mark.parametrize(
    "name",
    ["everything_on", "colocated", "short_first_moment", "sharded_over_replicas",
     "sharded_over_groups"],
)  # fmt: skip
def test_twenty_steps_equal_a_plain_optax_trainer(name, request):
    stepper = request.getfixturevalue(name)
    config = stepper.config
    params, bias, state = start(stepper)
    opt_state = reference.make_optimizer(config).init(params)
    oracle_step = jax.jit(functools.partial(reference.train_step, config))
    clipped = 0
    for step in range(config.run.num_steps):
        sequences = support.random_sequences(config, seed=step)
        params, opt_state, bias, aux = oracle_step(params, opt_state, bias, sequences)
        state, metrics = stepper.train_step(state, sequences)
        assert support.relative_error(metrics["total_loss"], aux["loss"]) < 1e-9, step
        clipped += metrics["gradient_norm"] > config.optimizer.max_grad_norm
    assert clipped > 0, "the test must clip"
    assert np.abs(np.asarray(bias)).max() > 0, "the test must move the bias"
    np.testing.assert_allclose(np.asarray(state.router_bias), bias, atol=1e-12)
    actual = support.logical_params(stepper, state.params)
    errors = jax.tree.map(support.relative_error, actual, params)
    assert max(jax.tree.leaves(errors)) < 1e-8, errors


def test_two_runs_are_bitwise_equal(everything_on):
    def run():
        _, _, state = start(everything_on)
        for step in range(2):
            sequences = support.random_sequences(everything_on.config, seed=step)
            state, metrics = everything_on.train_step(state, sequences)
        return jax.device_get((state.params, state.opt_state, metrics["total_loss"]))

    for first, second in zip(jax.tree.leaves(run()), jax.tree.leaves(run()), strict=True):
        assert first.tobytes() == second.tobytes()


def test_all_tokens_to_one_expert_runs_again_in_a_larger_bucket():
    """The overflowing run is thrown away: loss and gradients equal the oracle's."""
    split = SplitConfig(stages=1, attention_workers=2, expert_workers=3, bucket_factors=(1.0,))
    config = support.small_config(
        split, 2, top_k=1, normalize_gates=False, num_layers=2, bias_update_rate=0.01
    )
    stepper = support.make_stepper(config)
    params, bias, _ = start(stepper)
    bias = np.asarray(bias).copy()
    bias[:, 4] = 10.0  # every token's only choice
    state = support.place_state(stepper, params, bias)
    sequences = support.random_sequences(config)
    small, large = stepper.chooser.options
    assert stepper.chooser.current == small

    state, metrics = stepper.train_step(state, sequences)

    assert metrics["bucket_reruns"] == 1 and metrics["bucket"] == large
    tokens = config.tokens_per_step
    assert (metrics["expert_counts"][:, 4] == tokens).all(), "and the others have no token"
    oracle = jax.jit(functools.partial(reference.loss_and_grads, config))
    (total, _), expected = oracle(params, bias, sequences)
    assert support.relative_error(metrics["total_loss"], total) < 1e-10
    # The program of the larger bucket, which the step was run again in.
    _, grads, _ = support.run_pipeline(
        stepper, support.place_state(stepper, params, bias), sequences
    )
    errors = jax.tree.map(support.relative_error, grads, expected)
    assert max(jax.tree.leaves(errors)) < 1e-10, errors


def test_evaluation_equals_the_training_loss(everything_on):
    _, _, state = start(everything_on)
    sequences = support.random_sequences(everything_on.config)
    evaluated = everything_on.evaluate(state, sequences)
    trained = everything_on.train_step(state, sequences)[1]
    assert support.relative_error(evaluated["loss"], trained["loss"]) < 1e-12


class TestBucketChooser:
    SMALL, MIDDLE, LARGE = Bucket(8, 16), Bucket(12, 24), Bucket(16, 64)

    def chooser(self):
        return BucketChooser([self.SMALL, self.MIDDLE, self.LARGE])

    def test_takes_the_smallest_that_is_large_enough(self):
        chooser = self.chooser()
        assert chooser.overflowed(Bucket(9, 60)) and chooser.current == self.LARGE

    def test_always_moves_up_on_overflow(self):
        chooser = self.chooser()
        assert chooser.overflowed(Bucket(9, 9)) and chooser.current == self.MIDDLE
        assert not chooser.overflowed(Bucket(12, 24))

    def test_comes_down_when_the_last_steps_would_fit(self):
        chooser = self.chooser()
        chooser.overflowed(Bucket(16, 64))
        for _ in range(BUCKET_MEMORY):
            assert chooser.current == self.LARGE
            assert not chooser.overflowed(Bucket(9, 10))
            chooser.step_done()
        assert chooser.current == self.MIDDLE


def test_buckets_grow_to_the_worst_case():
    config = support.small_config(SplitConfig(attention_workers=2, expert_workers=3))
    options = buckets(config)
    assert options == sorted(options) and len(set(options)) == len(options)
    assert options[-1].rows == config.batch.tokens_per_worker
    one_worker = support.small_config(SplitConfig(attention_workers=2, expert_workers=1))
    assert len(buckets(one_worker)) == 1, "one expert worker always gets everything"


def test_learning_rates_are_the_schedules_at_every_step():
    config = support.small_config(SplitConfig(), 4)
    config.optimizer.warmup_steps = 3
    rates, schedule = optimizer.learning_rates(config), reference.learning_rate(config)
    assert len(rates) == config.run.num_steps + 1
    expected = [float(schedule(step)) for step in range(len(rates))]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert rates[0] == 0 and rates[-1] == pytest.approx(config.optimizer.final_learning_rate)
