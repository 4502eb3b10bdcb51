"""The bigram baseline, against dictionaries and against what theory says."""

import collections
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from disag_jax import bigram

VOCAB_SIZE = 7
TOKENS = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=2, max_size=60).map(np.array)


def _slow_loss(train, text, vocab_size):
    """The same model with a dictionary for every count."""
    followers = collections.defaultdict(collections.Counter)
    for a, b in itertools.pairwise(train):
        followers[a][b] += 1
    singles = collections.Counter(train)
    losses = []
    for a, b in itertools.pairwise(text):
        p_b = (singles[b] + 1) / (len(train) + vocab_size)
        if followers[a]:
            kinds, total = len(followers[a]), sum(followers[a].values())
            p_b = (followers[a][b] + kinds * p_b) / (total + kinds)
        losses.append(-math.log(p_b))
    return sum(losses) / len(losses)


@hypothesis.given(TOKENS, TOKENS)
@hypothesis.settings(max_examples=100, deadline=None)
def test_agrees_with_dictionaries(train, text):
    loss = bigram.BigramModel.fit(train, VOCAB_SIZE).loss(text)
    assert loss == pytest.approx(_slow_loss(train.tolist(), text.tolist(), VOCAB_SIZE), rel=1e-12)


@hypothesis.given(TOKENS)
@hypothesis.settings(max_examples=100, deadline=None)
def test_probabilities_are_positive_and_sum_to_one(train):
    log_probs = bigram.BigramModel.fit(train, VOCAB_SIZE).log_probs
    assert log_probs.shape == (VOCAB_SIZE, VOCAB_SIZE)
    assert np.isfinite(log_probs).all()
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, rtol=1e-12)


def test_batch_scores_every_label_and_nothing_else():
    rng = np.random.default_rng(0)
    train = rng.integers(0, VOCAB_SIZE, 500)
    batch = rng.integers(0, VOCAB_SIZE, (3, 9))
    model = bigram.BigramModel.fit(train, VOCAB_SIZE)
    assert model.loss_on(batch) == pytest.approx(np.mean([model.loss(row) for row in batch]))


def test_loss_of_uniform_text_is_the_log_of_the_vocabulary():
    tokens = np.random.default_rng(0).integers(0, 16, 200_000)
    model = bigram.BigramModel.fit(tokens[:100_000], 16)
    assert model.loss(tokens[100_000:]) == pytest.approx(math.log(16), rel=2e-3)


def test_loss_of_a_cycle_is_almost_zero():
    tokens = np.tile(np.arange(10, dtype=np.uint8), 1000)
    assert 0 < bigram.BigramModel.fit(tokens, 256).loss(tokens) < 0.01


@pytest.mark.parametrize("size", [0, 1])
def test_without_pairs_the_model_is_the_unigram(size):
    model = bigram.BigramModel.fit(np.zeros(size, np.uint8), 4)
    expected = np.array([size + 1, 1, 1, 1]) / (size + 4)
    np.testing.assert_allclose(np.exp(model.log_probs), np.tile(expected, (4, 1)))


def test_vocabulary_too_large_for_dense_counts():
    with pytest.raises(ValueError, match="vocab_size = 4097 must be at most 4096"):
        bigram.BigramModel.fit(np.zeros(10, np.int64), 4097)
