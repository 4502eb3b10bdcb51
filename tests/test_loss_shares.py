"""Which tokens of a loss an attention worker keeps: each is somebody's, and the best number."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import balanced
from disag_jax.bench_step import work_bound
from disag_jax.config import PlacementKind, SplitConfig
from disag_jax.geometry import buckets, make_geometry
from disag_jax.planner import hardware
from disag_jax.planner.costs import Costs
from disag_jax.planner.loss_shares import with_best_share, with_share
from disag_jax.planner.prediction import predict, step_seconds
from disag_jax.planner.sizes import Sizes
from disag_jax.shared_loss import SharedLoss, tokens_of_workers
from disag_jax.timing import Figure
from mesh.placement import Placement
from mesh.roles import Role
from tests import support

H100 = hardware.load("h100x2_nvlink")
shares = st.none() | st.floats(0.001, 1.0)


@given(
    st.integers(1, 5000), shares, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4),
    st.booleans(),
)  # fmt: skip
def test_every_token_is_somebodys(tokens, share, stages, attention, expert, colocated):
    expert = 1 if colocated else expert
    placement = Placement(1, stages, attention, expert, colocated)
    own, helpers, each = tokens_of_workers(tokens, share, placement)
    assert 0 < own <= tokens and own + helpers * each >= tokens
    # No helper's part is empty but for what rounding up took from the last ones.
    assert helpers == 0 or (tokens - own) / helpers <= each < (tokens - own) / helpers + 1
    assert helpers <= placement.workers // attention - 1
    if share is not None and helpers:
        assert share * tokens <= own < share * tokens + 1
    if share is None and helpers:
        assert own == -(-tokens // (helpers + 1)) >= each


@pytest.mark.parametrize("stages, attention, expert", [(1, 2, 4), (1, 2, 5), (2, 1, 3), (3, 1, 1)])
@pytest.mark.parametrize("share", [None, 0.4])
def test_a_worker_helps_one_owner_at_most(stages, attention, expert, share):
    split = SplitConfig(
        stages=stages, attention_workers=attention, expert_workers=expert, loss_share=share
    )
    config = support.small_config(split, num_layers=stages + 1)
    shared = SharedLoss(make_geometry(config, buckets(config)[0]))
    placement = shared.geometry.placement
    owners = {placement.worker(shared.owner_stage, Role.ATTENTION, m) for m in range(attention)}
    pairs = [pair for helper in shared.pairs for pair in helper]
    helped = collections.Counter(helper for _, helper in pairs)
    assert set(helped.values()) == {1} and not owners & helped.keys()
    assert collections.Counter(owner for owner, _ in pairs) == dict.fromkeys(owners, shared.helpers)


def test_evaluation_adds_up_the_same_losses():
    """Of a share that leaves nothing to others, one that leaves most, and equal ones."""
    losses = []
    for share in (None, 0.1, 1.0):
        split = SplitConfig(attention_workers=2, expert_workers=4, loss_share=share)
        config = support.small_config(split)
        stepper = support.make_stepper(config)
        sequences = support.random_sequences(config)
        losses.append(float(stepper.evaluate(stepper.init(0), sequences)["loss"]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)


@settings(max_examples=20)
@given(
    st.sampled_from((1024, 1408, 2816)), st.sampled_from((2, 4, 8)), st.sampled_from((1, 2)),
    st.sampled_from(((1, 1), (2, 1), (1, 2), (1, 3))),
)  # fmt: skip
def test_the_share_that_is_chosen_is_nearly_the_best(width, top_k, hop, workers):
    config = balanced.get_config()
    config.model.expert_width, config.model.top_k, config.split.hop = width, top_k, hop
    config.split.attention_workers, config.split.expert_workers = workers
    device = H100.on_one_node(config.validate().split.num_devices)
    chosen, seconds = with_best_share(Costs(Sizes.of(config), device))
    assert seconds == pytest.approx(
        predict(chosen.config, device, load_factor=1.0).step_seconds, rel=1e-9
    )
    tokens, chunk = config.batch.tokens_per_worker, config.run.loss_chunk
    tried = [None, *(chunks * chunk / tokens for chunks in range(1, tokens // chunk + 1))]
    times = [predict(with_share(config, s), device, load_factor=1.0).step_seconds for s in tried]
    assert min(times) * (1 - 1e-9) <= seconds <= min(1.01 * min(times), times[0] * (1 + 1e-9))


def test_experts_that_have_more_to_do_leave_the_loss_to_attention():
    config = balanced.get_config()
    config.model.expert_width, config.model.top_k = 2816, 8
    chosen, seconds = with_best_share(Costs(Sizes.of(config), H100))
    assert chosen.config.split.loss_share == 1.0
    assert seconds < 0.97 * step_seconds(config, H100)
    twin = with_share(config, None)
    twin.split.placement = PlacementKind.COLOCATED
    assert with_best_share(Costs(Sizes.of(twin), H100))[0].config == twin


def test_the_work_bound_counts_each_roles_part_of_the_loss():
    config = balanced.get_config()
    milliseconds = {
        "attention forward": 2, "attention backward": 5, "expert forward": 3, "expert backward": 6,
    }  # fmt: skip
    units = [Figure(name, ms, 0.0) for name, ms in milliseconds.items()]

    def bound(share, loss):
        config.split.loss_share = share
        figures = [*units, Figure("loss, share of a worker", loss, 0.0)]
        return work_bound(config, 0.0, figures) / config.batch.micro_batches

    layers = config.model.num_layers
    assert bound(None, 8.0) == pytest.approx(9 * layers + 8)
    # Of 16 ms the attention worker has 12; the experts still have most to do.
    assert bound(0.75, 12.0) == pytest.approx(9 * layers + 4)
    assert bound(1.0, 32.0) == pytest.approx(max(7 * layers + 32, 9 * layers))
