"""Loss and gradients of the pipeline equal the oracle's, for every kind of split and model."""

import functools

import jax
import numpy as np
import pytest

from disag_jax.config import Overlap, PlacementKind, Recompute, RouterScore, SplitConfig
from tests import reference, support

TOLERANCE = 1e-10


def check_against_oracle(config, end_of_document=None):
    stepper = support.make_stepper(config)
    params, bias = support.oracle_params(config), reference.init_router_bias(config)
    sequences = support.random_sequences(config, end_of_document=end_of_document)
    oracle = jax.jit(functools.partial(reference.loss_and_grads, config))
    (total, aux), expected = oracle(params, bias, sequences)

    state = support.place_state(stepper, params, bias)
    metrics, grads, _ = support.run_pipeline(stepper, state, sequences)

    assert metrics["rows_needed"] <= stepper.chooser.current.rows
    assert metrics["sorted_rows_needed"] <= stepper.chooser.current.sorted_rows
    assert support.relative_error(metrics["loss"], aux["cross_entropy"]) < TOLERANCE
    assert support.relative_error(metrics["total_loss"], total) < TOLERANCE
    assert support.relative_error(metrics["balance_loss"], aux["balance_loss"]) < TOLERANCE
    assert support.relative_error(metrics["z_loss"], aux["z_loss"]) < TOLERANCE
    np.testing.assert_array_equal(metrics["expert_counts"], aux["expert_counts"])
    np.testing.assert_array_equal(metrics["dropped_pairs"], aux["dropped"])
    errors = jax.tree.map(support.relative_error, grads, expected)
    for path, error in jax.tree_util.tree_leaves_with_path(errors):
        assert error < TOLERANCE, (jax.tree_util.keystr(path), error)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(expected)))
    assert support.relative_error(metrics["gradient_norm"], norm) < TOLERANCE
    return metrics


def split(stages, attention, expert, **more):
    """The worst-case bucket only, so that no test depends on the random routing's luck."""
    return SplitConfig(
        stages=stages, attention_workers=attention, expert_workers=expert,
        bucket_factors=(), **more,
    )  # fmt: skip


SPLITS = {
    "1-1-1": (split(1, 1, 1), 3, {}),
    "1-2-1": (split(1, 2, 1), 2, {}),
    "1-1-2": (split(1, 1, 2), 2, {}),
    "1-3-2": (split(1, 3, 2), 2, {}),
    "1-2-4 uneven experts": (split(1, 2, 4), 2, {"num_experts": 7}),
    "2-1-1 many waves": (split(2, 1, 1), 9, {"num_layers": 4}),
    "2-1-3 uneven layers": (split(2, 1, 3), 5, {"num_layers": 3, "num_experts": 7}),
    "4-1-1 few micro-batches": (split(4, 1, 1), 3, {"num_layers": 6}),
    "2-2-2 one wave": (split(2, 2, 2), 4, {}),
    "two replicas": (split(2, 1, 1, replicas=2), 2, {}),
    "two replicas, uneven": (split(1, 1, 3, replicas=2), 2, {"num_shared_experts": 1}),
    "more of the loss at its owner": (split(1, 1, 1, loss_share=0.7), 3, {}),
    "less of the loss at its owner": (split(2, 1, 3, loss_share=0.1), 5, {"num_layers": 3}),
    "all of the loss at its owner": (split(1, 2, 2, loss_share=1.0), 2, {}),
    "hop 2, 1-2-1": (split(1, 2, 1, hop=2), 6, {}),
    "hop 2, 2-1-3": (split(2, 1, 3, hop=2), 9, {"num_layers": 3}),
}


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_equals_the_oracle(name):
    split_config, micro_batches, model = SPLITS[name]
    check_against_oracle(support.small_config(split_config, micro_batches, **model))


MODELS = {
    "sigmoid, raw gates": {
        "router_score": RouterScore.SIGMOID, "normalize_gates": False, "gate_scale": 2.5,
    },
    "sigmoid, normalized": {"router_score": RouterScore.SIGMOID},
    "top-1": {"top_k": 1, "normalize_gates": False},
    "all experts": {"top_k": 6},
    "shared experts": {"num_shared_experts": 2},
    "multi-head attention": {"num_kv_heads": 4},
    "multi-query attention": {"num_kv_heads": 1},
    "dropping": {"capacity_factor": 0.75},
    "heavy dropping, top-3, shared": {
        "capacity_factor": 0.3, "top_k": 3, "num_shared_experts": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_equals_the_oracle(name):
    metrics = check_against_oracle(support.small_config(split(1, 2, 3), 2, **MODELS[name]))
    assert (metrics["dropped_pairs"].sum() > 0) == ("dropping" in name)


@pytest.mark.parametrize("recompute", [Recompute.FULL, Recompute.NONE])
@pytest.mark.parametrize("placement", [PlacementKind.DISAGGREGATED, PlacementKind.COLOCATED])
def test_whatever_is_recomputed_equals_the_oracle(recompute, placement):
    workers = (2, 1) if placement is PlacementKind.COLOCATED else (1, 2)
    config = support.small_config(split(1, *workers, placement=placement), 2)
    config.run.recompute = recompute
    check_against_oracle(config)


def together(stages, workers, sharing, **more):
    """A co-located split: `sharing` of a stage's workers hold all of its experts among them."""
    return split(stages, workers, sharing, placement=PlacementKind.COLOCATED, **more)


TWINS = {
    "one device": (together(1, 1, 1), 3, {}),
    "2": (together(1, 2, 2), 2, {}),
    "2, data parallel": (together(1, 2, 1), 2, {}),
    "4, folded": (together(1, 4, 2), 2, {"num_experts": 7, "num_shared_experts": 1}),
    "8": (together(1, 8, 8), 2, {"num_experts": 9, "top_k": 3}),
    "8, folded": (together(1, 8, 4), 2, {"num_experts": 7}),
    "two stages, uneven layers": (together(2, 2, 2), 5, {"num_layers": 3}),
    "four stages, few micro-batches": (together(4, 2, 1), 3, {"num_layers": 6}),
    "two replicas of two stages": (together(2, 2, 2, replicas=2), 3, {"num_shared_experts": 1}),
}


@pytest.mark.parametrize("name", TWINS)
def test_every_twin_equals_the_oracle(name):
    split_config, micro_batches, model = TWINS[name]
    check_against_oracle(support.small_config(split_config, micro_batches, **model))


def chunked(forward, backward):
    return {"overlap": Overlap.CHUNKED, "forward_chunks": forward, "backward_chunks": backward}


OVERLAPPED = {
    "2 in 2 chunks": (
        together(1, 2, 2, **chunked(2, 2)), Recompute.NONE, {"num_shared_experts": 1},
    ),
    "8, two stages, in 1 and 4": (
        together(2, 4, 4, **chunked(1, 4)), Recompute.FULL,
        {"num_layers": 3, "num_experts": 7, "capacity_factor": 0.75},
    ),
    "4, folded, interleaved": (
        together(1, 4, 2, overlap=Overlap.INTERLEAVED), Recompute.NONE,
        {"num_experts": 7, "num_shared_experts": 1},
    ),
    "8, two stages, interleaved": (
        together(2, 2, 2, replicas=2, overlap=Overlap.INTERLEAVED), Recompute.SELECTIVE,
        {"num_layers": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OVERLAPPED)
def test_every_overlap_equals_the_oracle(name):
    split_config, recompute, model = OVERLAPPED[name]
    config = support.small_config(split_config, 3, **model)
    config.run.recompute = recompute
    check_against_oracle(config.validate())


@pytest.mark.parametrize(
    "splits, attend_across", [("1-2-1", True), ("1-2-1", False), ("two replicas", False)]
)
def test_documents_in_sequences_equal_the_oracle(splits, attend_across):
    split_config, micro_batches, model = SPLITS[splits]
    config = support.small_config(split_config, micro_batches, **model)
    config.data.attend_across_documents = attend_across
    check_against_oracle(config, end_of_document=5)
