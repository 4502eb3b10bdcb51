"""Batches: each epoch is a permutation of the records, and only the step decides what is read."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from disag_jax import batches
from disag_jax.batches import Batches, Source
from disag_jax.config import ConfigError, SplitConfig
from layers.head import NO_LABEL
from mesh.roles import Role
from tests import support

SIZES = dict(
    num_records=st.integers(1, 20),
    remainder=st.integers(0, 10),
    sequence_length=st.integers(1, 8),
    sequences_per_step=st.integers(1, 9),
    seed=st.integers(0, 2**70),
)
# Few examples: grain shuffles a handful of records at about a millisecond for each one read.
SETTINGS = hypothesis.settings(max_examples=25, deadline=None)


def _source(num_records, remainder, sequence_length, begin=0):
    """Token t is begin + t: a record shows where it starts."""
    size = num_records * sequence_length + 1 + remainder % sequence_length
    return Source("the text", begin + np.arange(size))


def _batches(tokens, sequence_length, sequences_per_step, seed=0, **kwargs):
    sources = [tokens] if isinstance(tokens, Source) else [Source("the text", tokens)]
    options = {"vocab_size": 10**6} | kwargs
    return Batches(sources, sequence_length, sequences_per_step, seed=seed, **options)


def _starts(data, num_examples):
    """Returns the record number of each of the first examples of the stream."""
    return data.examples(range(num_examples)).tokens[:, 0] // data.sequence_length


@hypothesis.given(shuffle=st.booleans(), **SIZES)
@SETTINGS
def test_each_epoch_has_every_record_once(
    num_records, remainder, sequence_length, sequences_per_step, seed, shuffle
):
    sequences_per_step = min(sequences_per_step, num_records)
    source = _source(num_records, remainder, sequence_length)
    data = _batches(source, sequence_length, sequences_per_step, seed, shuffle=shuffle)
    assert data.num_records == num_records
    epochs = _starts(data, 3 * num_records).reshape(3, num_records)
    in_order = np.tile(np.arange(num_records), (3, 1))
    np.testing.assert_array_equal(np.sort(epochs) if shuffle else epochs, in_order)


@hypothesis.given(step=st.integers(0, 10**6), **SIZES)
@SETTINGS
def test_rows_are_whole_records_and_labels_are_shifted_by_one(
    num_records, remainder, sequence_length, sequences_per_step, seed, step
):
    source = _source(num_records, remainder, sequence_length)
    sequences_per_step = min(sequences_per_step, num_records)
    batch = _batches(source, sequence_length, sequences_per_step, seed).step(step)
    assert batch.tokens.shape == batch.labels.shape == (sequences_per_step, sequence_length)
    assert batch.tokens.dtype == batch.labels.dtype == np.int32
    assert batch.segments is None
    np.testing.assert_array_equal(batch.tokens[:, 0] % sequence_length, 0)
    np.testing.assert_array_equal(batch.tokens, batch.tokens[:, :1] + np.arange(sequence_length))
    np.testing.assert_array_equal(batch.labels, batch.tokens + 1)


@hypothesis.given(rng=st.randoms(), num_sources=st.integers(1, 3), **SIZES)
@SETTINGS
def test_the_order_is_a_function_of_seed_and_step_alone(
    num_records, remainder, sequence_length, sequences_per_step, seed, rng, num_sources
):
    """Whatever was read before, and however the rows of a step are shared out to processes."""
    sources = [
        _source(num_records + i, remainder, sequence_length, begin=1000 * i)
        for i in range(num_sources)
    ]
    sequences_per_step = min(sequences_per_step, num_records)

    def make():
        return Batches(sources, sequence_length, sequences_per_step, seed=seed, vocab_size=10**4)

    data, resumed = make(), make()
    expected = [data.step(i) for i in range(3)]
    for i in rng.sample(range(3), 3):
        num_processes = rng.randint(1, sequences_per_step)
        rows = list(range(sequences_per_step))
        rng.shuffle(rows)
        for process in range(num_processes):
            read = rows[process::num_processes]
            part = resumed.rows(i, read)
            np.testing.assert_array_equal(part.tokens, expected[i].tokens[read])
            np.testing.assert_array_equal(part.labels, expected[i].labels[read])
        np.testing.assert_array_equal(resumed.step(np.int64(i)).tokens, expected[i].tokens)


@hypothesis.given(**SIZES)
@SETTINGS
def test_the_stream_does_not_depend_on_the_batch_size(
    num_records, remainder, sequence_length, sequences_per_step, seed
):
    source = _source(num_records, remainder, sequence_length)
    one = _batches(source, sequence_length, 1, seed)
    sequences_per_step = min(sequences_per_step, num_records)
    many = _batches(source, sequence_length, sequences_per_step, seed)
    np.testing.assert_array_equal(_starts(one, 12), _starts(many, 12))


def test_epochs_and_seeds_have_different_orders():
    source = _source(100, 0, 4)
    orders = [
        tuple(epoch)
        for seed in range(5)
        for epoch in _starts(_batches(source, 4, 10, seed), 300).reshape(3, 100)
    ]
    assert len(set(orders)) == len(orders)


def test_a_step_goes_on_into_the_next_epoch():
    data = _batches(np.arange(13), 4, 2, shuffle=False)
    np.testing.assert_array_equal([data.step(i).tokens[:, 0] for i in (0, 1)], [[0, 4], [8, 0]])


def test_an_epoch_of_a_mixture_by_size_has_every_record_once():
    sources = [_source(n, 0, 4, begin=1000 * i) for i, n in enumerate((7, 30, 1))]
    data = Batches(sources, 4, 5, seed=3, vocab_size=10**4)
    assert data.num_records == 38
    epochs = data.examples(range(76)).tokens[:, 0].reshape(2, 38)
    expected = sorted(start for source in sources for start in source.tokens[:-1:4])
    np.testing.assert_array_equal(np.sort(epochs), [expected, expected])


def test_a_source_of_weight_zero_is_not_read():
    sources = [_source(9, 0, 4, begin=1000 * i) for i in range(3)]
    data = Batches(sources, 4, 5, seed=3, vocab_size=10**4, weights=(0.5, 0, 0.5))
    sources_read = data.examples(range(50)).tokens[:, 0] // 1000
    np.testing.assert_array_equal(np.bincount(sources_read), [25, 0, 25])


def test_bytes_are_widened():
    data = _batches(np.frombuffer(b"\xff\x00\x80", np.uint8), 2, 1, vocab_size=256)
    np.testing.assert_array_equal(data.step(0).tokens, [[255, 0]])
    np.testing.assert_array_equal(data.step(0).labels, [[0, 128]])


END = 9


@pytest.mark.parametrize("across_documents", [True, False])
def test_nothing_is_predicted_after_the_end_of_a_document(across_documents):
    tokens = np.array([1, 2, END, 3, END, END, 4, 5, 6])
    data = _batches(tokens, 4, 2, shuffle=False, end_of_document=END,
                    across_documents=across_documents)  # fmt: skip
    batch = data.step(0)
    np.testing.assert_array_equal(batch.tokens, [[1, 2, END, 3], [END, END, 4, 5]])
    np.testing.assert_array_equal(
        batch.labels, [[2, END, NO_LABEL, END], [NO_LABEL, NO_LABEL, 5, 6]]
    )
    if across_documents:
        assert batch.segments is None
    else:
        np.testing.assert_array_equal(batch.segments, [[0, 0, 0, 1], [0, 1, 2, 2]])
        assert batch.segments.dtype == np.int32


@pytest.mark.parametrize("across_documents", [True, False])
@pytest.mark.parametrize("sizes", [(1, 2, 3, 1), (2, 1, 1, 2), (1, 1, 1, 4)])
def test_every_worker_gets_its_rows_and_a_process_reads_no_others(sizes, across_documents):
    """(stages, M, N, replicas) of eight rows: whatever the split, row r of the step is row r."""
    stages, attention, expert, replicas = sizes
    split = SplitConfig(replicas, stages, attention, expert)
    micro_batches = 8 // (2 * attention * replicas)
    config = support.small_config(split, micro_batches)
    config.data.attend_across_documents = across_documents
    stepper = support.make_stepper(config)
    data = _batches(np.arange(800) % 43, 8, config.sequences_per_step, end_of_document=5,
                    across_documents=across_documents)  # fmt: skip
    read = []

    class Recorder:
        def rows(self, i, indices):
            read.extend(indices)
            return data.rows(i, indices)

    placed, expected = stepper.read_batch(Recorder(), 3), data.step(3)
    assert sorted(read) == list(range(8)), "each row once, however many stages hold it"
    placement = stepper.meshes.placement
    for worker in range(placement.num_devices):
        replica, number = divmod(worker, placement.workers)
        rank = placement.rank_of(number, Role.ATTENTION)
        for leaf, rows in zip(jax.tree.leaves(placed), jax.tree.leaves(expected), strict=True):
            grid = rows.reshape(micro_batches, replicas, attention, 2, 8)
            held = grid[:, replica, rank] if rank is not None else 0 * grid[:, 0, 0]
            np.testing.assert_array_equal(leaf[worker], held)


def test_text_of_exactly_one_record():
    assert _batches(np.arange(129), 128, 1).num_records == 1


def check_refused(sentence, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        _batches(*args, **kwargs).step(0)
    assert str(caught.value) == sentence


def test_text_shorter_than_a_sequence():
    check_refused(
        "data.paths: the held-out text has 100 tokens, fewer than one sequence of "
        "batch.sequence_length + 1 = 129",
        Source("data.paths: the held-out text", np.zeros(100, np.uint8)), 128, 1,
    )  # fmt: skip


def test_text_shorter_than_a_batch():
    check_refused(
        "data.sources = 'a.bin' has 512 tokens, fewer than one batch of 4 sequences of "
        "batch.sequence_length = 128 and the token after each",
        Source("data.sources = 'a.bin'", np.zeros(512, np.uint8)), 128, 4,
    )  # fmt: skip


@pytest.mark.parametrize("dtype, bad", [(np.uint16, 200), (np.uint32, 2**32 - 1), (np.int16, -1)])
def test_id_outside_the_vocabulary(dtype, bad):
    tokens = np.zeros(50, dtype)
    tokens[17] = tokens[40] = bad
    check_refused(
        "model.vocab_size = 200 must be above every token id, but data.sources = 'a.bin' has "
        f"{bad} at token 1017",
        Source("data.sources = 'a.bin'", tokens, first=1000), 4, 5,
        shuffle=False, vocab_size=200,
    )  # fmt: skip


def test_the_digest_tells_data_apart(monkeypatch):
    def digest(*tokens, seed=0, **kwargs):
        sources = [Source("a text", array) for array in tokens]
        return Batches(sources, 4, 3, seed=seed, vocab_size=10**6, **kwargs).digest()

    first, second = np.arange(10**5), np.arange(50)
    changed = np.concatenate([first[:-1], [7]])
    found = {
        "the data": digest(first, second, weights=(1, 3)),
        "a token": digest(changed, second, weights=(1, 3)),
        "length": digest(first[:-1], second, weights=(1, 3)),
        "order": digest(second, first, weights=(1, 3)),
        "weights": digest(first, second, weights=(1, 3.001)),
        "seed": digest(first, second, weights=(1, 3), seed=1),
        "documents": digest(first, second, weights=(1, 3), across_documents=False),
    }
    assert len(set(found.values())) == len(found), found
    assert found["the data"] == digest(first.copy(), second, weights=(2, 6))
    # As large files are read: the ends, and as much between them as there is time for.
    monkeypatch.setattr(batches, "DIGEST_TOKENS", 4 * batches.DIGEST_PIECE)
    assert digest(first, second) != digest(changed, second)
