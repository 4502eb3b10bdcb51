"""Batches of token sequences: a pure function of the sources, the seed and the step."""

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from disag_jax.config import ConfigError
from disag_jax.mixture import Mixture
from layers.head import NO_LABEL

# Tokens that stand for the data in its checksum, and how many are read in one place.
DIGEST_TOKENS, DIGEST_PIECE = 2**24, 2**14


class Batch(NamedTuple):
    """Sequences of one optimizer step: [G, S] each on the host, [W, K, B, S] on the devices.

    Attributes:
      tokens: int32, what the model reads.
      labels: int32, what it is to predict at each token: the next one, or NO_LABEL.
      segments: int32, number of the token's document in its sequence, if attention stays within
        documents; None if it may cross them.
    """

    tokens: np.ndarray
    labels: np.ndarray
    segments: np.ndarray | None = None

    @classmethod
    def of(
        cls, sequences, end_of_document: int | None = None, *, across_documents: bool = True
    ) -> "Batch":
        """The batch of sequences [G, S+1]; after the end of a document nothing is to be predicted.

        end_of_document: the token that ends every document; None if no token does.
        """
        tokens, labels = sequences[:, :-1], sequences[:, 1:]
        # No token is NO_LABEL.
        ends = tokens == (NO_LABEL if end_of_document is None else end_of_document)
        segments = None if across_documents else np.cumsum(ends, axis=1, dtype=np.int32) - ends
        return cls(tokens, np.where(ends, np.int32(NO_LABEL), labels), segments)


@dataclasses.dataclass(frozen=True)
class Source:
    """Tokens that records are cut from.

    Attributes:
      name: begins a sentence about them, such as "data.sources = 'a.bin'".
      tokens: integers [tokens], in memory or mapped.
      first: number of the first token in its file.
    """

    name: str
    tokens: np.ndarray
    first: int = 0


class Batches:
    """The batches of every optimizer step, without a state: a resumed run needs only its step.

    Record n of a source is tokens[nS : nS+S+1], so each token but the first is a label once.
    Documents follow each other in it. Row j of step i is example iG + j of an endless stream in
    which `Mixture` interleaves the sources; each source's part of it goes through all its records
    in every epoch, in a new order each time. A step can hold the last records of one epoch and the
    first of the next.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        sequence_length: int,
        sequences_per_step: int,
        *,
        seed: int,
        vocab_size: int,
        weights: Sequence[float] = (),
        end_of_document: int | None = None,
        across_documents: bool = True,
        shuffle: bool = True,
    ):
        """Checks the sizes of the sources; token ids are checked when they are read.

        Args:
          sources: kept, not copied, so a memory map stays one.
          sequence_length: S, tokens per sequence.
          sequences_per_step: G, sequences of one step over all devices.
          seed: 0 or more; fixes the order of the records in every epoch.
          vocab_size: every token id must be below it.
          weights: share of each source; empty takes them by their number of records.
          end_of_document, across_documents: as in `Batch.of`.
          shuffle: whether to shuffle; False takes the records of a source in their order, so the
            first steps see its first documents only.

        Raises:
          ConfigError: a source has no record, or all have fewer than one step takes.
        """
        self.sequence_length = sequence_length
        self.sequences_per_step = sequences_per_step
        self._sources = sources
        self._vocab_size = vocab_size
        self._documents = dict(end_of_document=end_of_document, across_documents=across_documents)
        sizes = [self._num_records(source) for source in sources]
        self.num_records = sum(sizes)
        if self.num_records < sequences_per_step:
            names = sources[0].name + (f" and {len(sources) - 1} more" if sources[1:] else "")
            raise ConfigError(
                f"{names} has {sum(len(source.tokens) for source in sources)} tokens, fewer than "
                f"one batch of {sequences_per_step} sequences of batch.sequence_length = "
                f"{sequence_length} and the token after each"
            )
        self._mixture = Mixture(weights or sizes)
        # Grain shuffles epoch e with seed + e. Without this, seeds 0 and 1 would share epochs.
        seeds = np.random.SeedSequence(seed).generate_state(len(sources))
        orders = [grain.MapDataset.range(size) for size in sizes]
        if shuffle:
            orders = [o.shuffle(int(s)) for o, s in zip(orders, seeds, strict=True)]
        self._orders = [order.repeat() for order in orders]

    def step(self, i: int) -> Batch:
        """Returns the batch of step i, [G, S]."""
        return self.rows(i, range(self.sequences_per_step))

    def rows(self, i: int, indices: Sequence[int]) -> Batch:
        """Returns the rows `indices` of step i, [len(indices), S], reading no others."""
        assert i >= 0 and all(0 <= j < self.sequences_per_step for j in indices), (i, indices)
        return self.examples([int(i) * self.sequences_per_step + int(j) for j in indices])

    def examples(self, numbers: Sequence[int]) -> Batch:
        """Returns examples of the stream, [len(numbers), S].

        Raises:
          ConfigError: a token is outside the vocabulary.
        """
        sequences = np.empty((len(numbers), self.sequence_length + 1), np.int32)
        for row, n in zip(sequences, numbers, strict=True):
            source, start = self._locate(n)
            row[:] = source.tokens[start : start + len(row)]
        if sequences.min(initial=0) < 0 or sequences.max(initial=0) >= self._vocab_size:
            self._refuse(numbers, sequences)
        return Batch.of(sequences, **self._documents)

    def digest(self) -> str:
        """A checksum of the data: the first batch, the sources' shares, lengths and tokens.

        All tokens of small sources; of large ones pieces evenly apart, DIGEST_TOKENS in all.
        """
        first, shares = self.step(0), self._mixture.counts(2**32)
        lengths = [len(source.tokens) for source in self._sources]
        checksum = zlib.crc32(repr((shares, lengths, self._documents)).encode())
        for array in (first.tokens, first.labels, *self._sampled_tokens()):
            checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
        return f"{checksum:08x}"

    def _sampled_tokens(self) -> Iterator[np.ndarray]:
        most_pieces = max(1, DIGEST_TOKENS // DIGEST_PIECE // len(self._sources))
        for source in self._sources:
            num_pieces = -(-len(source.tokens) // DIGEST_PIECE)
            for piece in np.linspace(0, num_pieces - 1, min(num_pieces, most_pieces), dtype=int):
                yield source.tokens[piece * DIGEST_PIECE : (piece + 1) * DIGEST_PIECE]

    def _num_records(self, source: Source) -> int:
        tokens, needed = source.tokens, self.sequence_length + 1
        assert tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer)
        if len(tokens) < needed:
            raise ConfigError(
                f"{source.name} has {len(tokens)} tokens, fewer than one sequence of "
                f"batch.sequence_length + 1 = {needed}"
            )
        return (len(tokens) - 1) // self.sequence_length

    def _locate(self, n: int) -> tuple[Source, int]:
        """Returns the source of an example, and the number of its first token there."""
        index, count = self._mixture.locate(n)
        return self._sources[index], int(self._orders[index][count]) * self.sequence_length

    def _refuse(self, numbers: Sequence[int], sequences: np.ndarray):
        """Raises the error for the first token outside the vocabulary."""
        row, column = np.argwhere((sequences < 0) | (sequences >= self._vocab_size))[0]
        source, start = self._locate(numbers[row])
        place = start + column
        raise ConfigError(
            f"model.vocab_size = {self._vocab_size} must be above every token id, but "
            f"{source.name} has {source.tokens[place]} at token {source.first + place}"
        )
