"""The baseline for a language model's loss: a bigram model with Witten-Bell smoothing."""

import dataclasses

import numpy as np

from disag_jax.batches import Batch
from layers.head import NO_LABEL


@dataclasses.dataclass(frozen=True)
class BigramModel:
    """Predicts a label from the token before it.

    Attributes:
      pairs: int64 [pairs], token * V + label of every pair that was seen, sorted.
      pair_counts: int64 [pairs], how often.
      totals: int64 [V], how often a token was seen.
      kinds: int64 [V], number of different labels seen after a token.
      unigram: float64 [V], smoothed frequency of a label.
    """

    pairs: np.ndarray
    pair_counts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray
    unigram: np.ndarray

    @classmethod
    def fit(cls, batch: Batch, vocab_size: int) -> "BigramModel":
        """Counts the pairs of token and label in a batch and smooths them.

        p(b | a) = (count(a, b) + kinds(a) p(b)) / (count(a) + kinds(a)), where kinds(a) is the
        number of different labels seen after a, and p(b) = (count(b) + 1) / (labels + V). There is
        no constant to tune, and no probability is 0.
        """
        tokens, labels = _scored(batch)
        unigram = np.bincount(labels, minlength=vocab_size) + 1.0
        pairs, counts = np.unique(tokens * vocab_size + labels, return_counts=True)
        return cls(
            pairs=pairs,
            pair_counts=counts,
            totals=np.bincount(tokens, minlength=vocab_size),
            kinds=np.bincount(pairs // vocab_size, minlength=vocab_size),
            unigram=unigram / unigram.sum(),
        )

    def loss(self, batch: Batch) -> float:
        """Returns the mean negative log-likelihood of a batch's labels, nats per label."""
        tokens, labels = _scored(batch)
        return -float(np.mean(np.log(self._probability(tokens, labels))))

    def _probability(self, tokens, labels):
        """p(label | token) of each pair."""
        wanted = tokens * len(self.unigram) + labels
        place = np.minimum(np.searchsorted(self.pairs, wanted), max(len(self.pairs) - 1, 0))
        counts = np.zeros(wanted.shape)
        if len(self.pairs):
            counts = np.where(self.pairs[place] == wanted, self.pair_counts[place], 0)
        # A token that was never seen leaves everything to the unigram.
        kinds = np.maximum(self.kinds[tokens], 1)
        return (counts + kinds * self.unigram[labels]) / (self.totals[tokens] + kinds)


def _scored(batch: Batch):
    """The tokens that have a label, and the labels: int64 [labels]."""
    has_label = batch.labels != NO_LABEL
    return batch.tokens[has_label].astype(np.int64), batch.labels[has_label].astype(np.int64)
