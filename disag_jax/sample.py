"""Text from a checkpoint, on one device.

  python -m disag_jax.sample --workdir runs/tiny --prompt "def main(" --num_tokens 200

Each token is a run of the whole model over the tokens before it, at most as many as a sequence of
training had. There is no cache: this is for looking at a model, not for serving it.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from disag_jax import plain_model, text
from disag_jax.batches import Batch
from disag_jax.checkpoint import SavedCheckpoint
from disag_jax.config import Config, ConfigError, Dtype
from disag_jax.workdir import Workdir


class ByteTokenizer:
    """Text as its UTF-8 bytes, which is how a run without token files reads it."""

    end_of_document = text.END_OF_DOCUMENT

    def encode(self, text: str) -> list[int]:
        # A command line that is not UTF-8 comes with surrogates.
        return list(text.encode(errors="surrogateescape"))

    def decode(self, tokens: Sequence[int]) -> str:
        # An id that is no byte becomes one that UTF-8 never has, and shows as U+FFFD.
        return bytes(min(token, 255) for token in tokens).decode(errors="replace")


class Sampler:
    """Draws tokens from a model, one after another.

    Args:
      params: the logical tree, in the type to compute with.
      router_bias: [L, E].
      end_of_document: token that ends a text, or None.
    """

    def __init__(self, config: Config, params, router_bias, end_of_document: int | None):
        self._config, self._model = config, (params, router_bias)
        self._end_of_document = end_of_document
        self._next_token = jax.jit(functools.partial(_next_token, config))

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
            tokens.append(int(token))
            if tokens[-1] == self._end_of_document:
                break
        return tokens[len(prompt) :]


def _next_token(config: Config, params, router_bias, batch: Batch, position, temperature, key):
    """A draw from the model's distribution after the token at `position` of the only sequence."""
    logits_BSV = plain_model.logits(config, params, router_bias, batch.tokens, batch.segments)
    logits_V = logits_BSV[0, position]
    drawn = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V))


def sample_text(
    workdir: str, prompt: str, num_tokens: int, temperature: float, seed: int, step: int | None
) -> str:
    """The prompt and what the run's model at a step, by default the last, makes of it."""
    directory = Workdir(workdir)
    config = directory.read_config()
    if config.run.compute_dtype is Dtype.FLOAT64:
        jax.config.update("jax_enable_x64", True)
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(prompt)
    _check(config, tokens, num_tokens, temperature, seed)
    saved = SavedCheckpoint.open(directory.checkpoints, step)
    params = saved.params(config.run.compute_dtype.value)
    sampler = Sampler(config, params, saved.router_bias(), tokenizer.end_of_document)
    tokens += sampler.sample(tokens, num_tokens, temperature=temperature, seed=seed)
    return tokenizer.decode(tokens)


def _check(config: Config, prompt: list[int], num_tokens: int, temperature: float, seed: int):
    vocab_size = config.model.vocab_size
    if not prompt:
        raise ConfigError("--prompt = '' must have a token, which the text goes on from")
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
    _STEP = flags.DEFINE_integer("step", None, "the checkpoint to take, by default the last")
    flags.mark_flags_as_required(["workdir", "prompt"])
    cli.run(
        lambda: print(
            sample_text(
                _WORKDIR.value,
                _PROMPT.value,
                _NUM_TOKENS.value,
                _TEMPERATURE.value,
                _SEED.value,
                _STEP.value,
            )
        )
    )
