"""Costs against the model's FLOPs, links against the placement's own pairs and groups."""

import copy
import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs import balanced, qwen3_235b
from disag_jax.config import PlacementKind, Recompute, SplitConfig
from disag_jax.flops import model_flops
from disag_jax.planner import hardware
from disag_jax.planner.costs import Costs, unit_work
from disag_jax.planner.sizes import TILE, Sizes
from disag_jax.planner.topology import StageLinks
from layers import head
from mesh.m2n import forward_pairs
from mesh.placement import Placement

H800 = hardware.load("h800")
SPLITS = (
    SplitConfig(stages=2, attention_workers=2, expert_workers=4),
    SplitConfig(stages=3, attention_workers=4, expert_workers=2, placement=PlacementKind.COLOCATED),
)


@pytest.mark.parametrize("split", SPLITS)
def test_units_do_the_models_arithmetic(split):
    config = qwen3_235b.get_config()
    config.split = split
    config.validate()
    sizes, flops = Sizes.of(config), model_flops(config)
    work, model = unit_work(sizes), config.model
    workers = split.attention_workers
    tokens = workers * config.batch.tokens_per_worker
    per_layer = tokens / 3 / model.num_layers
    attention = work["attention_forward"]
    done = workers * (attention.products + attention.scores)
    assert done == pytest.approx(per_layer * flops.attention)
    # Tiles are filled up: half a tile for each expert.
    padding = sizes.experts_held * TILE / 2 * 6 * model.d_model * model.expert_width
    experts = workers if split.colocated else split.expert_workers
    done = experts * (work["expert_forward"].products - padding)
    assert done == pytest.approx(per_layer * flops.expert)
    # Every share of the loss is filled up to whole chunks.
    shares = sizes.placement.workers // workers
    share = -(-config.batch.tokens_per_worker // shares)
    chunk = min(share, config.run.loss_chunk)
    rows = workers * shares * -(-share // chunk) * chunk
    done = workers * shares * work["loss"].products
    assert done == pytest.approx(rows * flops.head) and rows < tokens + workers * shares * chunk


@pytest.mark.parametrize(
    "recompute, products, scores, experts",
    # With as many key/value as query heads three of four projections are kept.
    [
        (Recompute.FULL, 3, 3.5, 8 / 3),
        (Recompute.SELECTIVE, 3, 2.5, 8 / 3),
        (Recompute.NONE, 2.25, 2.5, 2),
    ],
)
def test_backward_units_do_again_what_was_not_kept(recompute, products, scores, experts):
    config = balanced.get_config()
    config.run.recompute = recompute
    work = unit_work(Sizes.of(config))
    forward, backward = work["attention_forward"], work["attention_backward"]
    router = config.batch.tokens_per_worker * 2 * config.model.d_model * config.model.num_experts
    again = backward.products - 3 * router
    assert again == pytest.approx(products * (forward.products - router))
    assert backward.scores == pytest.approx(scores * forward.scores)
    ratio = work["expert_backward"].products / work["expert_forward"].products
    assert ratio == pytest.approx(experts)


@settings(max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(2, 8)
)
def test_links_are_those_that_the_pairs_cross(replicas, stages, attention, expert, per_node):
    placement = Placement(replicas, stages, attention, expert)
    cluster = dataclasses.replace(H800, devices_per_node=per_node, nics_per_node=per_node)
    links = StageLinks.of(placement, cluster)

    def crosses(pairs):
        return any(
            (replica * placement.workers + a) // per_node
            != (replica * placement.workers + b) // per_node
            for replica in range(replicas)
            for a, b in pairs
        )

    pairs = [pair for round_pairs in forward_pairs(placement) for pair in round_pairs]
    far = links.pipeline.many_to_many.gigabytes_per_second < 100
    # A ring on one node crosses none; a ring on several must.
    assert far == crosses(pairs)


@pytest.mark.parametrize(("group", "near", "far"), [(4, 3, 0), (8, 7, 0), (16, 7, 8), (32, 7, 24)])
def test_an_exchange_reaches_the_workers_of_its_group(group, near, far):
    placement = Placement(1, 2, 32, group, colocated=True)
    links = StageLinks.of(placement, H800)
    assert links.all_to_all[2:] == (near, far)
    slot = 1e8
    seconds = {0: 7 * slot / (200e9 * 0.82), 8: far * slot / 45e9, 24: far * slot / 45e9}[far]
    if group >= 8:
        assert links.all_to_all_seconds(slot) == pytest.approx(seconds, rel=0.01)


@settings(max_examples=40)
@given(st.integers(2, 36), st.sampled_from((1, 2, 3, 8)), st.integers(1, 2))
@example(12, 8, 1)
@example(18, 8, 1)
@example(18, 8, 2)
def test_the_worker_with_most_on_other_nodes_sets_the_exchange(group, per_node, copies):
    placement = Placement(1, 2, copies * group, group, colocated=True)
    cluster = dataclasses.replace(H800, devices_per_node=per_node, nics_per_node=per_node)
    far = max(
        sum(other // per_node != worker // per_node for other in members)
        for members in placement.expert_groups()
        for worker in members
    )
    *_, near_slots, far_slots = StageLinks.of(placement, cluster).all_to_all
    assert (near_slots, far_slots) == (group - 1 - far, far)


@pytest.mark.parametrize("tokens", [512, 1024, 16_384])
def test_a_loss_share_is_filled_up_to_whole_chunks(tokens):
    config = qwen3_235b.get_config()
    config.split = SplitConfig(attention_workers=5, expert_workers=11)
    config.batch.sequence_length = config.batch.tokens_per_worker = tokens
    share = -(-tokens // 3)  # 16 workers, 3 for each of 5
    hidden = jax.ShapeDtypeStruct((share, 4), np.float32)
    labels = jax.ShapeDtypeStruct((share,), np.int32)
    chunks = jax.eval_shape(
        lambda h, label: head._chunks(h, label, config.run.loss_chunk), hidden, labels
    )
    rows = chunks[1].size
    products = unit_work(Sizes.of(config))["loss"].products
    assert products == 3 * 2 * rows * config.model.vocab_size * config.model.d_model
    assert (rows > share) == (share > config.run.loss_chunk)


def test_what_is_reduced_where():
    config = balanced.get_config()
    one = Costs(Sizes.of(config), H800)
    # Two devices share the vocabulary alone: half of an all-reduce of its float32 gradients.
    vocabulary = 4 * (2 * 32_000 * 2048 + 2048) / 2
    assert one.reduce_gradients == pytest.approx(vocabulary / (200e9 * 0.82), rel=0.05)
    config = copy.deepcopy(config)
    config.split.replicas = 2
    two = Costs(Sizes.of(config), H800)
    rows = 4 * 6 * sum(two.sizes.row_columns.values())
    more = two.reduce_gradients - one.reduce_gradients
    assert more == pytest.approx(rows / (200e9 * 0.82), rel=0.05)


def test_one_device_moves_nothing():
    config = balanced.get_config()
    config.split = SplitConfig(placement=PlacementKind.COLOCATED)
    costs = Costs(Sizes.of(config), H800)
    moves = (
        costs.forward_transfer, costs.backward_transfer, costs.exchange(1e9).of_chunk(1),
        costs.loss_transfer, costs.gather_weights, costs.reduce_gradients,
    )  # fmt: skip
    assert np.count_nonzero(moves) == 0


def test_only_disaggregated_units_run_beside_transfers():
    slower = dataclasses.replace(H800, lost_beside_transfers={"expert_forward": 0.1})
    for split, factor in zip(SPLITS, (0.1, 0.0), strict=True):
        config = qwen3_235b.get_config()
        config.split = split
        costs = Costs(Sizes.of(config), slower)
        units, base = costs.unit_seconds, Costs(Sizes.of(config), H800).unit_seconds
        lost = units["expert_forward"] - base["expert_forward"]
        # At most as long as the unit itself does the transfer run beside it.
        beside = min(costs.backward_transfer, base["expert_forward"])
        assert lost == pytest.approx(factor * beside, abs=1e-12) and beside > 0
        assert units["attention_forward"] == base["attention_forward"]
