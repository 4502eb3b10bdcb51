"""Batches: each epoch is a permutation of the records, and only the step decides what is read."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from disag_jax import batches
from disag_jax.config import ConfigError

SIZES = dict(
    num_records=st.integers(1, 20),
    remainder=st.integers(0, 10),
    sequence_length=st.integers(1, 8),
    sequences_per_step=st.integers(1, 9),
    seed=st.integers(0, 2**70),
)
# Few examples: grain shuffles a handful of records at about a millisecond for each one read.
SETTINGS = hypothesis.settings(max_examples=25, deadline=None)


def _tokens(num_records, remainder, sequence_length):
    """Token t is t itself: a record shows where it starts."""
    return np.arange(num_records * sequence_length + 1 + remainder % sequence_length)


def _batches(tokens, sequence_length, sequences_per_step, seed=0, **kwargs):
    kwargs = {"split": "train", "vocab_size": 10**6} | kwargs
    return batches.Batches(tokens, sequence_length, sequences_per_step, seed=seed, **kwargs)


def _starts(data, num_examples):
    """Returns the record number of each of the first examples of the stream."""
    num_steps = -(-num_examples // data.sequences_per_step)
    stream = np.concatenate([data.step(i) for i in range(num_steps)])[:num_examples]
    return stream[:, 0] // data.sequence_length


@hypothesis.given(shuffle=st.booleans(), **SIZES)
@SETTINGS
def test_each_epoch_has_every_record_once(
    num_records, remainder, sequence_length, sequences_per_step, seed, shuffle
):
    tokens = _tokens(num_records, remainder, sequence_length)
    data = _batches(tokens, sequence_length, sequences_per_step, seed, shuffle=shuffle)
    assert data.num_records == num_records
    epochs = _starts(data, 3 * num_records).reshape(3, num_records)
    in_order = np.tile(np.arange(num_records), (3, 1))
    np.testing.assert_array_equal(np.sort(epochs) if shuffle else epochs, in_order)


@hypothesis.given(step=st.integers(0, 10**6), **SIZES)
@SETTINGS
def test_rows_are_whole_records_and_labels_are_shifted_by_one(
    num_records, remainder, sequence_length, sequences_per_step, seed, step
):
    tokens = _tokens(num_records, remainder, sequence_length)
    batch = _batches(tokens, sequence_length, sequences_per_step, seed).step(step)
    assert batch.shape == (sequences_per_step, sequence_length + 1)
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch[:, 0] % sequence_length, 0)
    np.testing.assert_array_equal(batch[:, 1:], batch[:, :-1] + 1)


@hypothesis.given(rng=st.randoms(), **SIZES)
@SETTINGS
def test_rows_do_not_depend_on_how_they_are_asked_for(
    num_records, remainder, sequence_length, sequences_per_step, seed, rng
):
    tokens = _tokens(num_records, remainder, sequence_length)
    data = _batches(tokens, sequence_length, sequences_per_step, seed)
    expected = [data.step(i) for i in range(3)]
    resumed = _batches(tokens, sequence_length, sequences_per_step, seed)
    for i in rng.sample(range(3), 3):
        rows = [rng.randrange(sequences_per_step) for _ in range(rng.randrange(4))]
        np.testing.assert_array_equal(resumed.rows(i, rows), expected[i][rows])
        np.testing.assert_array_equal(resumed.step(np.int64(i)), expected[i])


@hypothesis.given(**SIZES)
@SETTINGS
def test_the_stream_does_not_depend_on_the_batch_size(
    num_records, remainder, sequence_length, sequences_per_step, seed
):
    tokens = _tokens(num_records, remainder, sequence_length)
    one = _batches(tokens, sequence_length, 1, seed)
    many = _batches(tokens, sequence_length, sequences_per_step, seed)
    np.testing.assert_array_equal(_starts(one, 12), _starts(many, 12))


def test_epochs_and_seeds_have_different_orders():
    tokens = _tokens(100, 0, 4)
    orders = [
        tuple(epoch)
        for seed in range(5)
        for epoch in _starts(_batches(tokens, 4, 10, seed), 300).reshape(3, 100)
    ]
    assert len(set(orders)) == len(orders)


def test_a_step_wraps_into_the_next_epochs_when_records_are_few():
    batch = _batches(np.arange(9), 4, 5, shuffle=False).step(0)
    np.testing.assert_array_equal(batch[:, 0], [0, 4, 0, 4, 0])


def test_bytes_are_widened():
    data = _batches(np.frombuffer(b"\xff\x00\x80", np.uint8), 2, 1, vocab_size=256)
    np.testing.assert_array_equal(data.step(0), [[255, 0, 128]])


def test_text_of_exactly_one_record():
    assert _batches(np.arange(129), 128, 1).num_records == 1


def test_text_too_short():
    with pytest.raises(ConfigError) as caught:
        _batches(np.zeros(100, np.uint8), 128, 1, split="held-out")
    assert str(caught.value) == (
        "data.paths: the held-out text has 100 tokens, fewer than one sequence of "
        "batch.sequence_length + 1 = 129"
    )


@pytest.mark.parametrize("bad", [200, 233, -1])
def test_id_outside_the_vocabulary(bad):
    tokens = np.zeros(50, np.int16)
    tokens[17] = tokens[40] = bad
    with pytest.raises(ConfigError) as caught:
        _batches(tokens, 4, 1, vocab_size=200)
    assert str(caught.value) == (
        "model.vocab_size = 200 must be above every token id and no id negative, but the train "
        f"text has {bad} at token 17"
    )
