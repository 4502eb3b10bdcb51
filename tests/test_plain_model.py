"""The model on one device equals the oracle, for every kind of model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disag_jax import plain_model
from disag_jax.config import RouterScore, SplitConfig
from disag_jax.state import RUN_ONCE
from tests import reference, support

TOLERANCE = 1e-10

MODELS = {
    "softmax, normalized": {},
    "sigmoid, raw gates, top-1": {
        "router_score": RouterScore.SIGMOID, "normalize_gates": False, "gate_scale": 2.5,
        "top_k": 1,
    },
    "shared experts": {"num_shared_experts": 2},
    "dropping": {"capacity_factor": 0.75},
    "everything": {
        "num_layers": 3, "num_experts": 7, "top_k": 3, "num_shared_experts": 1,
        "router_score": RouterScore.SIGMOID, "gate_scale": 1.5, "capacity_factor": 1.0,
    },
}  # fmt: skip


def make_model(**model):
    """(config, oracle parameters, a selection bias that moves some choices, tokens [B, S])."""
    config = support.small_config(SplitConfig(), **model)
    rng = np.random.default_rng(5)
    bias = rng.normal(scale=0.1, size=(config.model.num_layers, config.model.num_experts))
    tokens = rng.integers(0, config.model.vocab_size, (2, config.batch.sequence_length))
    return config, support.oracle_params(config), bias, tokens.astype(np.int32)


def oracle_logits(config, params, bias, *tokens_and_segments):
    forward = functools.partial(reference.forward, config, params, bias)
    over_sequences = jax.vmap(lambda *sequence: forward(*sequence)[0])
    return jax.jit(over_sequences, compiler_options=RUN_ONCE)(*tokens_and_segments)


def plain_logits(config, params, bias, *tokens_and_segments):
    function = functools.partial(plain_model.logits, config)
    return jax.jit(function, compiler_options=RUN_ONCE)(params, bias, *tokens_and_segments)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_oracle(name):
    config, params, bias, tokens_BS = make_model(**MODELS[name])
    expected = oracle_logits(config, params, bias, tokens_BS)
    actual = plain_logits(config, params, bias, tokens_BS)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert support.relative_error(actual, expected) < TOLERANCE


def test_capacity_is_that_of_training_whatever_the_length():
    """Half a sequence, and one with padding after it, lose what the whole one loses there."""
    config, params, bias, tokens_BS = make_model(capacity_factor=0.5)
    half = config.batch.sequence_length // 2
    expected = oracle_logits(config, params, bias, tokens_BS)[:, :half]
    short = plain_logits(config, params, bias, tokens_BS[:, :half])
    padded = plain_logits(config, params, bias, np.where(np.arange(2 * half) < half, tokens_BS, 0))
    assert support.relative_error(short, expected) < TOLERANCE
    assert support.relative_error(padded[:, :half], expected) < TOLERANCE
    dropless = dataclasses.replace(config.model, capacity_factor=None)
    other = plain_logits(dataclasses.replace(config, model=dropless), params, bias, tokens_BS)
    assert support.relative_error(other[:, :half], expected) > 0.01


def test_attention_within_documents():
    config, params, bias, tokens_BS = make_model()
    segments_BS = np.cumsum(np.random.default_rng(6).random(tokens_BS.shape) < 0.3, axis=1)
    assert segments_BS.max() > 1
    expected = oracle_logits(config, params, bias, tokens_BS, segments_BS)
    actual = plain_logits(config, params, bias, tokens_BS, segments_BS)
    assert support.relative_error(actual, expected) < TOLERANCE


def test_bfloat16_weights_give_wide_logits():
    config, params, bias, tokens_BS = make_model()
    expected = oracle_logits(config, params, bias, tokens_BS)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    actual = plain_logits(config, narrow, bias.astype(np.float32), tokens_BS)
    assert actual.dtype == np.float32
    assert support.relative_error(actual, expected) < 0.1
