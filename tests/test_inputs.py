"""What a run reads: token files or text, one baseline for both, and batches ahead of their step."""

import dataclasses
import threading
import time

import numpy as np
import pytest

from disag_jax import prepare, text
from disag_jax.config import BatchConfig, Config, ConfigError, DataConfig, ModelConfig
from disag_jax.inputs import Prefetch, load_inputs
from layers.head import NO_LABEL
from tests.test_token_files import HEADER, write


def make_config(**data) -> Config:
    return Config(
        model=ModelConfig(vocab_size=300),
        batch=BatchConfig(sequence_length=8, tokens_per_worker=32, micro_batches=1),
        data=DataConfig(**data),
    ).validate()


@pytest.fixture
def texts(tmp_path) -> str:
    """A directory of a few text files."""
    (tmp_path / "text").mkdir()
    for number in range(6):
        lines = (f"line {n} of file {number}\n" for n in range(20))
        (tmp_path / "text" / f"{number}.txt").write_text("".join(lines))
    return str(tmp_path / "text")


def token_file(tmp_path, name: str, num_tokens: int, **header) -> str:
    ids = np.arange(num_tokens) % 299 + 1
    header = dataclasses.replace(HEADER, num_tokens=num_tokens, **header)
    return write(tmp_path / name, ids.astype(np.uint16), header)


@pytest.mark.parametrize(
    "headers, expected",
    [
        ([{"tokenizer": "bytes"}, {"tokenizer": "bytes"}], 1.0),
        ([{"text_bytes": 400}, {"text_bytes": 600}], 0.2),
        ([{"text_bytes": 400}, {}], None),
        ([{"text_bytes": 0}, {"text_bytes": 600}], None),
    ],
)
def test_tokens_per_byte_are_the_held_out_files(headers, expected, tmp_path):
    train = token_file(tmp_path, "train.bin", 2000, **headers[0] | {"text_bytes": 1})
    held_out = tuple(
        token_file(tmp_path, f"{n}.bin", 100, **header) for n, header in enumerate(headers)
    )
    inputs = load_inputs(make_config(sources=(train,), held_out_sources=held_out))
    assert inputs.tokens_per_byte == expected


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_file_of_bytes_is_read_as_the_text_is(texts, tmp_path):
    """The same sequences, loss masks and baseline, whichever way the text comes."""
    corpus = text.load((texts,), 0.3)
    paths = {}
    for side in ("train", "held_out"):
        (tmp_path / side).mkdir()
        for number, document in enumerate(getattr(corpus, side).tobytes().split(b"\0")):
            (tmp_path / side / f"{number}.txt").write_bytes(document)
        paths[side] = str(tmp_path / side)
        prepare.prepare((paths[side],), paths[side], "bytes")
    as_text = load_inputs(make_config(paths=(texts,), held_out_fraction=0.3))
    as_tokens = load_inputs(
        make_config(
            sources=(paths["train"] + ".bin",), held_out_sources=(paths["held_out"] + ".bin",)
        )
    )
    for step in range(10):
        assert same(as_text.train.step(step), as_tokens.train.step(step))
        assert same(as_text.held_out.step(step), as_tokens.held_out.step(step))
    assert as_text.bigram_loss == pytest.approx(as_tokens.bigram_loss, rel=1e-3)


def test_text_has_no_loss_across_documents(texts):
    batches = load_inputs(make_config(paths=(texts,))).train
    batch = batches.examples(range(batches.num_records))
    np.testing.assert_array_equal(batch.labels == NO_LABEL, batch.tokens == 0)
    assert 0 < np.sum(batch.tokens == 0) <= 5


def test_the_end_of_a_source_is_held_out(tmp_path):
    sources = tuple(token_file(tmp_path, f"{name}.bin", 1000) for name in "ab")
    inputs = load_inputs(make_config(sources=sources, held_out_fraction=0.25))
    assert inputs.description == (
        f"tokens of {sources[0]} and 1 more (some.json): train 1,500, held out 500"
    )
    first_tokens = {
        name: set(getattr(inputs, name).examples(range(500)).tokens[:, 0].tolist())
        for name in ("train", "held_out")
    }
    expected = {name: set() for name in first_tokens}
    for record in range(93):
        expected["train"].add(8 * record % 299 + 1)
    for record in range(31):
        expected["held_out"].add((750 + 8 * record) % 299 + 1)
    assert first_tokens == expected


def test_weights_are_shares_of_training_and_of_the_held_out_ends(tmp_path):
    sources = (token_file(tmp_path, "a.bin", 3000), token_file(tmp_path, "b.npy", 1000))
    even = load_inputs(make_config(sources=sources, weights=(0.0, 1.0), held_out_fraction=0.5))
    by_size = load_inputs(make_config(sources=sources, held_out_fraction=0.5))
    assert not same(even.train.step(0), by_size.train.step(0))
    starts = even.train.examples(range(100)).tokens[:, 0]
    assert set(starts.tolist()) <= {(8 * n) % 299 + 1 for n in range(63)}


BAD = {
    "vocabulary too small": (
        {"vocab_size": 301}, {}, "model.vocab_size = 300 must be at least 301, the vocabulary of"
    ),
    "other tokenizer": ({"tokenizer_digest": "x"}, {}, "must have tokenizer_digest 'digest', as"),
    "no end of document": (
        {"end_of_document": None}, {"sources": ("b.bin",), "attend_across_documents": False},
        "data.attend_across_documents = False must be True for data.sources",
    ),
    "too short": ({}, {"sources": ("short.bin",)}, "fewer than one sequence"),
    "too few": (
        {}, {"sources": ("few.bin",), "held_out_sources": ("a.bin",)},
        "few.bin' has 32 tokens, fewer than one batch of 4 sequences",
    ),
    "missing": ({}, {"held_out_sources": ("c.bin",)}, "data.held_out_sources = "),
    "outside": ({}, {"sources": ("outside.bin",)}, "outside.bin' has 399 at token 398"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_named(name, tmp_path):
    header, data, sentence = BAD[name]
    token_file(tmp_path, "a.bin", 1000)
    token_file(tmp_path, "b.bin", 1000, **header)
    token_file(tmp_path, "short.bin", 9)
    token_file(tmp_path, "few.bin", 32)
    ids = np.arange(1000) % 399 + 1
    ids[ids >= 300] = 1
    ids[398] = 399
    write(tmp_path / "outside.bin", ids, dataclasses.replace(HEADER, num_tokens=1000))
    data = {"sources": ("a.bin", "b.bin")} | data
    data = {
        field: tuple(str(tmp_path / path) for path in value) if isinstance(value, tuple) else value
        for field, value in data.items()
    }
    with pytest.raises(ConfigError) as refused:
        load_inputs(make_config(**data))
    assert sentence in str(refused.value) and "\n" not in str(refused.value), refused.value


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_batches_come_in_order_and_no_more_than_the_depth_ahead(depth):
    made = []

    def make(step):
        made.append(step)
        return step

    with Prefetch(make, range(5, 20), depth) as batches:
        for step in range(5, 20):
            assert batches.take() == step
            assert made[-1] <= step + depth
    assert made == list(range(5, 20))


def test_the_next_batch_is_made_while_the_step_runs():
    may_end, began = threading.Event(), threading.Event()

    def make(step):
        if step == 1:
            began.set()
            may_end.wait(10)
        return step

    with Prefetch(make, range(3), 1) as batches:
        assert batches.take() == 0
        assert began.wait(10), "the second is made before it is asked for"
        may_end.set()
        assert batches.take() == 1


def test_an_error_comes_at_its_step():
    def make(step):
        if step == 2:
            raise ConfigError("bad data")
        return step

    with Prefetch(make, range(10), 5) as batches:
        assert [batches.take(), batches.take()] == [0, 1]
        with pytest.raises(ConfigError, match="bad data"):
            batches.take()


def test_a_run_that_ends_early_does_not_wait_for_its_batches():
    def make(step):
        time.sleep(0.1)
        return step

    began = time.perf_counter()
    with Prefetch(make, range(1000), 500) as batches:
        batches.take()
    assert time.perf_counter() - began < 5
