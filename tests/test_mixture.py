"""Mixtures: shares hold for every beginning of the stream, exactly."""

import fractions

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from disag_jax.mixture import Mixture

WEIGHTS = st.lists(
    st.one_of(st.integers(0, 10**12), st.floats(0, 1e6), st.just(0)), min_size=1, max_size=8
).filter(any)


@hypothesis.given(WEIGHTS, st.integers(0, 10**15))
def test_shares_hold_up_to_less_than_the_number_of_sources(weights, n):
    counts = Mixture(weights).counts(n)
    assert sum(counts) == n
    exact = [fractions.Fraction(weight) for weight in weights]
    for count, weight in zip(counts, exact, strict=True):
        assert abs(count - n * weight / sum(exact)) < len(weights)
        assert weight or not count


@hypothesis.given(WEIGHTS, st.integers(0, 10**15))
def test_the_stream_takes_each_sources_examples_in_order(weights, begin):
    mixture = Mixture(weights)
    counts = mixture.counts(begin)
    for n in range(begin, begin + 20):
        source, number = mixture.locate(n)
        assert number == counts[source]
        counts[source] += 1
    assert counts == mixture.counts(begin + 20)


@hypothesis.given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any))
@hypothesis.settings(max_examples=25)
def test_weights_that_are_sizes_make_epochs(sizes):
    assert Mixture(sizes).counts(3 * sum(sizes)) == [3 * size for size in sizes]


@pytest.mark.parametrize("weights", [(0.3, 0.7), (1e-6, 1.0), (1 / 3, 1 / 3, 1 / 3)])
def test_a_source_comes_evenly(weights):
    """Any thousand examples in a row have a source's share, up to its bound at both ends."""
    mixture = Mixture(weights)
    shares = 1000 * np.array(weights) / sum(weights)
    for begin in (0, 123_456, 10**12):
        difference = np.subtract(mixture.counts(begin + 1000), mixture.counts(begin)) - shares
        assert np.abs(difference).max() < 2 * len(weights)
