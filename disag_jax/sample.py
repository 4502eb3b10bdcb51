"""Text from a checkpoint, on one device.

  python -m disag_jax.sample --workdir runs/tiny --prompt "def main(" --num_tokens 200

Each token is a run of the whole model over the tokens before it, at most as many as a sequence of
training had. There is no cache: this is for looking at a model, not for serving it.
"""

import functools
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from disag_jax import plain_model
from disag_jax.batches import Batch
from disag_jax.config import Config, ConfigError
from disag_jax.geometry import enable_float64
from disag_jax.saved_checkpoint import SavedCheckpoint
from disag_jax.token_files import open_tokens
from disag_jax.tokenizer import BYTES, ByteTokenizer, load_tokenizer
from disag_jax.workdir import Workdir


class Sampler:
    """Draws tokens from a model, one after another.

    Args:
      params: the logical tree, in the type to compute with.
      router_bias: [L, E].
      num_ids: ids that mean something, of those that the model has.
      end_of_document: token that ends a text, or None.
    """

    def __init__(
        self, config: Config, params, router_bias, *, num_ids: int, end_of_document: int | None
    ):
        self._config, self._model = config, (params, router_bias)
        self._end_of_document = end_of_document
        self._next_token = jax.jit(functools.partial(_next_token, config, num_ids))

    def sample(
        self, prompt: Sequence[int], num_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> list[int]:
        """The tokens after `prompt`, `num_tokens` of them unless the document ends before.

        prompt: one id or more, all in the vocabulary.
        temperature: what logits are divided by; 0 takes the most likely token.
        """
        tokens, key = list(prompt), jax.random.key(seed)
        length = self._config.batch.sequence_length
        # What stands after the tokens changes nothing before: the shape is always the same.
        sequence = np.zeros((1, length + 1), np.int32)
        for _ in range(num_tokens):
            seen = tokens[-length:]
            sequence[0, : len(seen)] = seen
            token = self._next_token(
                *self._model,
                Batch.of(
                    sequence,
                    self._end_of_document,
                    across_documents=self._config.data.attend_across_documents,
                ),
                len(seen) - 1,
                float(temperature),
                jax.random.fold_in(key, len(tokens)),
            )
            if token == self._end_of_document:
                break
            tokens.append(int(token))
        return tokens[len(prompt) :]


def _next_token(
    config: Config, num_ids: int, params, router_bias, batch: Batch, position, temperature, key
):
    """A draw from the model's distribution after the token at `position` of the only sequence."""
    logits_BSV = plain_model.logits(config, params, router_bias, batch.tokens, batch.segments)
    logits_V = logits_BSV[0, position, :num_ids]
    drawn = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V))


def sample_text(
    workdir: str,
    prompt: str,
    num_tokens: int,
    *,
    temperature: float,
    seed: int = 0,
    step: int | None = None,
    tokenizer_name: str | None = None,
) -> str:
    """The prompt and what the run's model at a step, by default the last, makes of it.

    tokenizer_name: as `tokenizer_of` takes it.
    """
    directory = Workdir(workdir)
    config = directory.read_config()
    enable_float64(config)
    tokenizer, end_of_document = tokenizer_of(config, tokenizer_name)
    tokens = _encode(tokenizer, prompt)
    _check(config, tokens, num_tokens, temperature, seed)
    saved = SavedCheckpoint.open(directory.checkpoints, step)
    params = saved.params(config.run.compute_dtype.value)
    sampler = Sampler(
        config,
        params,
        saved.router_bias(),
        num_ids=tokenizer.vocab_size,
        end_of_document=end_of_document,
    )
    tokens += sampler.sample(tokens, num_tokens, temperature=temperature, seed=seed)
    return tokenizer.decode(tokens)


def tokenizer_of(config: Config, name: str | None):
    """The tokenizer of a run's tokens, and the id that ends a document there.

    name: of the tokenizer.json that made the run's token files; None takes the one beside them. A
      run on text, or on token files of bytes, needs none.
    """
    if not config.data.sources:
        if name is not None:
            raise ConfigError(f"--tokenizer = {name!r} must be left out: the run reads bytes")
        return ByteTokenizer(), ByteTokenizer.end_of_document
    source = config.data.sources[0]
    header = open_tokens(source, "data.sources").header
    if name is None:
        beside = pathlib.Path(source).with_name(header.tokenizer)
        name = BYTES if header.tokenizer == BYTES else str(beside)
    tokenizer = load_tokenizer(name)
    if tokenizer.digest != header.tokenizer_digest:
        raise ConfigError(
            f"--tokenizer = {name!r} must be the {header.tokenizer} that made {source!r}, but its "
            f"digest is another"
        )
    return tokenizer, header.end_of_document


def _encode(tokenizer, prompt: str) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"--prompt = {prompt!r} must be UTF-8") from error
    return tokenizer.encode([prompt])[0].tolist()


def _check(config: Config, prompt: list[int], num_tokens: int, temperature: float, seed: int):
    vocab_size = config.model.vocab_size
    if not prompt:
        raise ConfigError("--prompt must have at least one token, which the text goes on from")
    if max(prompt) >= vocab_size:
        raise ConfigError(
            f"--prompt must have ids below model.vocab_size = {vocab_size}, but has {max(prompt)}"
        )
    if num_tokens < 1:
        raise ConfigError(f"--num_tokens = {num_tokens} must be 1 or more")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"--temperature = {temperature} must be a number, 0 or more")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed = {seed} must be 0 or more and below 2**32")


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli

    _WORKDIR = flags.DEFINE_string("workdir", None, "directory of a run that saved checkpoints")
    _PROMPT = flags.DEFINE_string("prompt", None, "what the text begins with")
    _NUM_TOKENS = flags.DEFINE_integer("num_tokens", 200, "tokens to add to it at most")
    _TEMPERATURE = flags.DEFINE_float(
        "temperature", 0.8, "what logits are divided by; 0 takes the most likely token each time"
    )
    _SEED = flags.DEFINE_integer("seed", 0, "another one gives another text")
    _TOKENIZER = flags.DEFINE_string(
        "tokenizer", None, "tokenizer.json of the run's token files, by default that beside them"
    )
    _STEP = flags.DEFINE_integer("step", None, "the checkpoint to take, by default the last")
    flags.mark_flags_as_required(["workdir", "prompt"])
    cli.run(
        lambda: print(
            sample_text(
                _WORKDIR.value,
                _PROMPT.value,
                _NUM_TOKENS.value,
                temperature=_TEMPERATURE.value,
                seed=_SEED.value,
                step=_STEP.value,
                tokenizer_name=_TOKENIZER.value,
            )
        )
    )
