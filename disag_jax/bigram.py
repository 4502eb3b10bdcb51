"""The baseline for a language model's loss: a bigram model with Witten-Bell smoothing."""

import dataclasses

import numpy as np

MAX_VOCAB_SIZE = 4096  # V * V counts and log-probabilities are held densely: 128 MiB each here


@dataclasses.dataclass(frozen=True)
class BigramModel:
    """Predicts a token from the one before it.

    Attributes:
      log_probs: float64 [V, V], the log-probability of the second token after the first.
    """

    log_probs: np.ndarray

    @classmethod
    def fit(cls, tokens: np.ndarray, vocab_size: int) -> "BigramModel":
        """Counts the pairs of a text and smooths them.

        p(b | a) = (count(a, b) + kinds(a) p(b)) / (count(a) + kinds(a)), where kinds(a) is the
        number of different tokens seen after a, and p(b) = (count(b) + 1) / (length + V). There is
        no constant to tune, and no probability is 0.

        tokens: integers [tokens], each below vocab_size.
        """
        if vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size = {vocab_size} must be at most {MAX_VOCAB_SIZE} for a bigram model"
            )
        assert len(tokens) == 0 or (tokens.min() >= 0 and tokens.max() < vocab_size)
        unigram = np.bincount(tokens, minlength=vocab_size) + 1.0
        unigram /= unigram.sum()

        pairs = tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
        counts = np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)
        totals = counts.sum(axis=1, keepdims=True)  # [V, 1]
        # A token with no successor in the text leaves everything to the unigram.
        kinds = np.maximum(np.count_nonzero(counts, axis=1, keepdims=True), 1)  # [V, 1]
        return cls(np.log((counts + kinds * unigram) / (totals + kinds)))

    def loss(self, tokens: np.ndarray) -> float:
        """Returns the mean negative log-likelihood, nats per token, of all tokens but the first."""
        return self.loss_on(tokens[None])

    def loss_on(self, batch: np.ndarray) -> float:
        """Returns the mean negative log-likelihood, nats per token, of a batch's labels.

        batch: integers [G, S+1]; the G * S positions are those a model is evaluated on.
        """
        return -float(self.log_probs[batch[:, :-1], batch[:, 1:]].mean())
