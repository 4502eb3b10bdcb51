"""Sampled text: greedy, it is the oracle's argmax; drawn, it is the seed's; mistakes are named."""

import dataclasses
import functools
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers

from disag_jax import sample
from disag_jax.config import Config, ConfigError, DataConfig
from disag_jax.prepare import prepare
from disag_jax.sample import Sampler
from disag_jax.saved_checkpoint import SavedCheckpoint
from disag_jax.state import RUN_ONCE
from disag_jax.tokenizer import ByteTokenizer, FileTokenizer
from tests import reference

REPOSITORY = pathlib.Path(__file__).parent.parent
PROMPT, TOKENS = "line", [*b"line"]
BYTE = {"num_ids": 256, "end_of_document": 0}


@pytest.fixture(scope="module")
def model(trained_run):
    """(config, parameters, selection bias) of the trained model."""
    config, workdir = trained_run
    saved = SavedCheckpoint.open(f"{workdir}/checkpoints")
    return config, saved.params(), saved.router_bias()


@pytest.fixture(scope="module")
def sampler(model):
    return Sampler(*model, **BYTE)


@pytest.fixture(scope="module")
def oracle_next(model):
    """The oracle's most likely token after some tokens, no more than a sequence of them."""
    config, params, bias = model
    forward = jax.jit(functools.partial(reference.forward, config), compiler_options=RUN_ONCE)

    def most_likely(tokens) -> int:
        # The capacity is that of a whole sequence; what stands at its end changes nothing before.
        padded = np.full(config.batch.sequence_length, ord("x"), np.int32)
        padded[: len(tokens)] = tokens
        return int(np.argmax(forward(params, bias, padded)[0][len(tokens) - 1]))

    return most_likely


def test_greedy_is_the_oracles_argmax(sampler, oracle_next, model):
    """Also once there are more tokens than in a sequence of training."""
    length, tokens = model[0].batch.sequence_length, [*TOKENS]
    sampled = sampler.sample(tokens, 3 * length)
    assert len(sampled) == 3 * length and len(set(sampled)) > 1
    for token in sampled:
        assert token == oracle_next(tokens[-length:])
        tokens.append(token)


def test_a_seed_gives_one_text(sampler):
    draw = functools.partial(sampler.sample, TOKENS, 12)
    assert draw(temperature=0.8, seed=1) == draw(temperature=0.8, seed=1)
    assert draw(temperature=0.8, seed=1) != draw(temperature=0.8, seed=2)
    assert draw(temperature=1e-4, seed=1) == draw()


def test_draws_follow_the_model(sampler, model):
    """The shares of first tokens come close to the probabilities that the oracle gives them."""
    config, params, bias = model
    prompt = [*b"line 12,"]
    logits_SV, _ = reference.forward(config, params, bias, np.asarray(prompt))
    expected = np.asarray(jax.nn.softmax(logits_SV[-1] / 0.5))
    # No token is the end of the document.
    drawn = [
        (sampler.sample(prompt, 1, temperature=0.5, seed=seed) or [0])[0] for seed in range(400)
    ]
    shares = np.bincount(drawn, minlength=config.model.vocab_size) / len(drawn)
    assert np.abs(shares - expected).max() < 0.1


def test_the_text_ends_with_its_document(sampler, model):
    whole = sampler.sample(TOKENS, 8)
    cut = Sampler(*model, num_ids=256, end_of_document=whole[2]).sample(TOKENS, 8)
    assert cut == whole[: whole.index(whole[2])]


def test_ids_without_a_meaning_are_never_drawn(sampler, model):
    """A vocabulary may be larger than its tokenizer's, to be easy to split."""
    first = sampler.sample(TOKENS, 1)[0]
    fewer = Sampler(*model, num_ids=first, end_of_document=None)
    assert max(fewer.sample(TOKENS, 8)) < first
    assert max(fewer.sample(TOKENS, 50, temperature=100.0)) < first


def test_documents_in_the_prompt_are_apart(model):
    """Where training kept attention within documents."""
    config, params, bias = model
    apart = dataclasses.replace(
        config, data=dataclasses.replace(config.data, attend_across_documents=False)
    )
    sampler = Sampler(apart, params, bias, **BYTE)
    prompt, segments = np.array([*b"ab\0cd"]), np.array([0, 0, 0, 1, 1])
    logits_SV, _ = reference.forward(config, params, bias, prompt, segments)
    assert sampler.sample(prompt.tolist(), 1) == [int(np.argmax(logits_SV[-1]))]


def test_text_of_a_run(trained_run, sampler):
    text = sample.sample_text(trained_run[1], PROMPT, 8, temperature=0.0)
    assert text == ByteTokenizer().decode(TOKENS + sampler.sample(TOKENS, 8))


def write_tokenizer(path: pathlib.Path, words: str) -> str:
    ids = {word: i for i, word in enumerate([*words.split(), "</s>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path.parent.mkdir(exist_ok=True)
    tokenizer.save(str(path))
    return str(path)


def test_the_tokenizer_of_token_files(tmp_path):
    (tmp_path / "text.txt").write_text("one two one")
    made_by = write_tokenizer(tmp_path / "tokenizer.json", "one two")
    another = write_tokenizer(tmp_path / "another" / "tokenizer.json", "two one")
    prepare((str(tmp_path / "text.txt"),), str(tmp_path / "tokens"), made_by)
    config = Config(data=DataConfig(sources=(str(tmp_path / "tokens.bin"),)))
    for name in (None, made_by):
        tokenizer, end_of_document = sample.tokenizer_of(config, name)
        assert (tokenizer.digest, end_of_document) == (FileTokenizer(made_by).digest, 2)
    with pytest.raises(ConfigError, match=r"--tokenizer = .* must be the tokenizer\.json that"):
        sample.tokenizer_of(config, another)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"--tokenizer = '.*/tokenizer\.json' must be .* No such"):
        sample.tokenizer_of(config, None)


def test_token_files_of_bytes(tmp_path):
    (tmp_path / "text.txt").write_text("one two one")
    prepare((str(tmp_path / "text.txt"),), str(tmp_path / "tokens"), "bytes")
    config = Config(data=DataConfig(sources=(str(tmp_path / "tokens.bin"),)))
    assert isinstance(sample.tokenizer_of(config, None)[0], ByteTokenizer)


MISTAKES = {
    "empty prompt": ({"prompt": ""}, "--prompt must have at least one token"),
    "no token": ({"num_tokens": 0}, "--num_tokens = 0 must be 1 or more"),
    "cold": ({"temperature": -0.5}, "--temperature = -0.5 must be a number, 0 or more"),
    "not a number": ({"temperature": float("nan")}, "--temperature = nan must be a number"),
    "seed": ({"seed": -1}, "--seed = -1 must be 0 or more"),
    "not UTF-8": ({"prompt": "\udcff"}, "must be UTF-8"),
    "tokenizer": ({"tokenizer_name": "t.json"}, "--tokenizer = 't.json' must be left out"),
    "no such step": ({"step": 3}, r"step = 3 must be one of the checkpoints in .*: 4, 6$"),
    "no run": ({"workdir": "/no/such/run"}, "workdir = '/no/such/run' must hold a run"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, trained_run):
    change, message = MISTAKES[name]
    request = {"workdir": trained_run[1], "prompt": PROMPT, "num_tokens": 5, "temperature": 1.0}
    with pytest.raises(ConfigError, match=message):
        sample.sample_text(**request | change)


def test_id_outside_the_vocabulary(tmp_path):
    (tmp_path / "config.json").write_text('{"model": {"vocab_size": 100}}')
    with pytest.raises(ConfigError, match=r"--prompt must have ids below .* = 100, but has 110"):
        sample.sample_text(str(tmp_path), PROMPT, 5, temperature=1.0)


def test_no_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="checkpoints must hold a checkpoint, but there is none"):
        sample.sample_text(str(tmp_path), PROMPT, 5, temperature=1.0)


COMMANDS = {
    "sample": ["disag_jax.sample", "--workdir=/no/such/run", "--prompt=a"],
    "inspect": ["disag_jax.inspect", "/no/such/run"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_tells_a_mistake_in_one_sentence(name):
    command = [sys.executable, "-m", *COMMANDS[name]]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
