"""Batches of token sequences: a pure function of the text, the seed and the step."""

from collections.abc import Sequence

import grain
import numpy as np

from disag_jax.config import ConfigError


class Batches:
    """The batches of every optimizer step, without a state: a resumed run needs only its step.

    Record n of the text is tokens[nS : nS+S+1], so each token but the first is a label once. Row j
    of step i is example iG + j of an endless stream that goes through all records in every epoch,
    in a new order each time. An epoch need not end with a step: a step can hold the last records of
    one epoch and the first of the next, and if there are fewer records than G, repeats.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        sequence_length: int,
        sequences_per_step: int,
        *,
        seed: int,
        split: str,
        vocab_size: int,
        shuffle: bool = True,
    ):
        """Checks the text.

        Args:
          tokens: integers [tokens]; kept, not copied, so a memory map stays one.
          sequence_length: S, tokens per sequence.
          sequences_per_step: G, sequences of one step over all devices.
          seed: 0 or more; fixes the order of the records in every epoch.
          split: name of this text in error messages, such as "held-out".
          vocab_size: every token id must be below it.
          shuffle: whether to shuffle; False takes the records in the order of the text, so the
            first steps see its first documents only.

        Raises:
          ConfigError: the text is shorter than one record or has an id outside the vocabulary.
        """
        assert tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer)
        if len(tokens) < sequence_length + 1:
            raise ConfigError(
                f"data.paths: the {split} text has {len(tokens)} tokens, fewer than one sequence "
                f"of batch.sequence_length + 1 = {sequence_length + 1}"
            )
        _check_vocabulary(tokens, vocab_size, split)
        self.sequence_length = sequence_length
        self.sequences_per_step = sequences_per_step
        records = _Records(tokens, sequence_length)
        self.num_records = len(records)
        stream = grain.MapDataset.source(records)
        if shuffle:
            # Grain shuffles epoch e with seed + e. Without this, seeds 0 and 1 would share epochs.
            stream = stream.shuffle(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        self._stream = stream.repeat()

    def step(self, i: int) -> np.ndarray:
        """Returns the batch of step i, int32 [G, S+1]: inputs [:, :-1] and labels [:, 1:]."""
        return self.rows(i, range(self.sequences_per_step))

    def rows(self, i: int, indices: Sequence[int]) -> np.ndarray:
        """Returns the rows `indices` of step i, int32 [len(indices), S+1], reading no others."""
        batch = np.empty((len(indices), self.sequence_length + 1), np.int32)
        for row, j in zip(batch, indices, strict=True):
            assert i >= 0 and 0 <= j < self.sequences_per_step, (i, j)
            row[:] = self._stream[int(i) * self.sequences_per_step + int(j)]
        return batch


class _Records:
    """The text cut into records of S+1 tokens that overlap by one: a label is the next input."""

    def __init__(self, tokens: np.ndarray, sequence_length: int):
        self._tokens = tokens
        self._length = sequence_length

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._length

    def __getitem__(self, n: int) -> np.ndarray:
        start = n * self._length
        return self._tokens[start : start + self._length + 1]


def _check_vocabulary(tokens: np.ndarray, vocab_size: int, split: str):
    if tokens.min() >= 0 and tokens.max() < vocab_size:
        return
    offset = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
    raise ConfigError(
        f"model.vocab_size = {vocab_size} must be above every token id and no id negative, but the "
        f"{split} text has {tokens[offset]} at token {offset}"
    )
