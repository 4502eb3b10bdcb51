"""The bigram baseline, against dictionaries and against what theory says."""

import collections
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from disag_jax import bigram
from disag_jax.batches import Batch
from layers.head import NO_LABEL

VOCAB_SIZE = 7
TEXTS = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=2, max_size=60)


def _batch(text) -> Batch:
    """One sequence of which every token but the first is a label."""
    return Batch.of(np.asarray(text)[None])


def _slow_loss(train, text, vocab_size):
    """The same model with a dictionary for every count."""
    followers = collections.defaultdict(collections.Counter)
    for a, b in itertools.pairwise(train):
        followers[a][b] += 1
    singles = collections.Counter(train[1:])
    losses = []
    for a, b in itertools.pairwise(text):
        p_b = (singles[b] + 1) / (len(train) - 1 + vocab_size)
        if followers[a]:
            kinds, total = len(followers[a]), sum(followers[a].values())
            p_b = (followers[a][b] + kinds * p_b) / (total + kinds)
        losses.append(-math.log(p_b))
    return sum(losses) / len(losses)


@hypothesis.given(TEXTS, TEXTS)
@hypothesis.settings(max_examples=100, deadline=None)
def test_agrees_with_dictionaries(train, text):
    loss = bigram.BigramModel.fit(_batch(train), VOCAB_SIZE).loss(_batch(text))
    assert loss == pytest.approx(_slow_loss(train, text, VOCAB_SIZE), rel=1e-12)


@hypothesis.given(TEXTS)
@hypothesis.settings(max_examples=100, deadline=None)
def test_probabilities_are_positive_and_sum_to_one(train):
    model = bigram.BigramModel.fit(_batch(train), VOCAB_SIZE)
    pairs = np.array(list(itertools.product(range(VOCAB_SIZE), repeat=2)))
    losses = [model.loss(_batch(pair)) for pair in pairs]
    sums = np.exp(-np.array(losses)).reshape(VOCAB_SIZE, VOCAB_SIZE).sum(axis=1)
    np.testing.assert_allclose(sums, 1, rtol=1e-12)


def test_tokens_without_a_label_neither_count_nor_are_scored():
    tokens, labels = np.array([[0, 3, 1, 3]]), np.array([[1, NO_LABEL, 0, 2]])
    with_holes = bigram.BigramModel.fit(Batch(tokens, labels), VOCAB_SIZE)
    without = bigram.BigramModel.fit(Batch(tokens[:, [0, 2, 3]], labels[:, [0, 2, 3]]), VOCAB_SIZE)
    batch = Batch(np.array([[3, 0, 3]]), np.array([[2, NO_LABEL, 1]]))
    scored = Batch(batch.tokens[:, [0, 2]], batch.labels[:, [0, 2]])
    assert with_holes.loss(batch) == without.loss(scored)


def test_loss_of_uniform_text_is_the_log_of_the_vocabulary():
    tokens = np.random.default_rng(0).integers(0, 16, 200_000)
    model = bigram.BigramModel.fit(_batch(tokens[:100_000]), 16)
    assert model.loss(_batch(tokens[100_000:])) == pytest.approx(math.log(16), rel=2e-3)


def test_loss_of_a_cycle_is_almost_zero():
    tokens = np.tile(np.arange(10, dtype=np.int32), 1000)
    assert 0 < bigram.BigramModel.fit(_batch(tokens), 256).loss(_batch(tokens)) < 0.01


def test_without_pairs_the_model_is_uniform():
    model = bigram.BigramModel.fit(_batch([3]), 4)
    assert model.loss(_batch([0, 1, 2, 3])) == pytest.approx(math.log(4))


def test_a_large_vocabulary_takes_no_more_memory_than_its_pairs():
    model = bigram.BigramModel.fit(_batch([0, 199_999, 0, 199_999]), 200_000)
    assert len(model.pairs) == 2
    # Three labels: 199,999 twice, both times after 0.
    assert model.loss(_batch([0, 199_999])) == pytest.approx(-math.log((2 + 3 / 200_003) / 3))
