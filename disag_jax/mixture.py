"""Which source each example of a mixture comes from."""

import fractions
import math
from collections.abc import Sequence


class Mixture:
    """Interleaves sources so that every beginning of the stream has each one's share.

    Of the first n examples a source of weight w has n * w / sum(weights), up to a difference
    smaller than the number of sources. Weights are taken as exact fractions, so nothing drifts.
    When the weights are the sources' sizes, sum(sizes) examples have every one of each source once.
    """

    def __init__(self, weights: Sequence[float]):
        """weights: 0 or more each, and not all 0."""
        exact = [fractions.Fraction(weight) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * scale) for weight in exact]

    def counts(self, n: int) -> list[int]:
        """Returns how many of the first n examples come from each source.

        The first source takes its share, rounded up; the next its share of what that left, and so
        on. So one more example is one more of exactly one source.
        """
        counts, weight_left = [], sum(self._weights)
        for weight in self._weights:
            count = -(-n * weight // weight_left) if weight else 0
            counts.append(count)
            n -= count
            weight_left -= weight
        return counts

    def locate(self, n: int) -> tuple[int, int]:
        """Returns the source of example n, and how many examples it gave before."""
        before = self.counts(n)
        after = self.counts(n + 1)
        source = next(i for i, count in enumerate(before) if after[i] > count)
        return source, before[source]
