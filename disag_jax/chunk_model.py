"""How long a layer's experts and exchanges take in r chunks, and the r that takes the least.

The model of "FSMoE" (arXiv 2501.10714): chunks pass all-to-all, all-gather,
experts, reduce-scatter and all-to-all, on three resources that work side by side: the link between
nodes (all-to-all and, behind the last dispatch, a gradient reduction), the link within a node
(all-gather and reduce-scatter, where experts are sharded) and compute. All times are seconds.

`layer_seconds` is the paper's, whose resources run freely. `in_step_seconds` is what the twin's own
loop takes, and what the planner predicts with.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterable


class Bound(enum.StrEnum):
    """What a layer waits for: the paper's cases 1 to 4."""

    INTER_NODE = "link between nodes, gradient reduction included"
    EXPERTS = "experts"
    ALL_TO_ALL = "all-to-all"
    INTRA_NODE = "link within a node"


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation whose chunk takes `latency` + `seconds` / r."""

    latency: float = 0.0
    seconds: float = 0.0

    def of_chunk(self, chunks: int) -> float:
        return self.latency + self.seconds / chunks


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """The operations of one layer in one direction.

    Attributes:
      all_to_all: one of the two, dispatch or combine.
      experts: their work.
      all_gather, reduce_scatter: of sharded experts; nothing where each is whole on its worker.
      gradient_reduction: of replicated parameters, placed in this layer; 0 in the forward phase.
    """

    all_to_all: Operation
    experts: Operation
    all_gather: Operation = Operation()
    reduce_scatter: Operation = Operation()
    gradient_reduction: float = 0.0


def layer_seconds(times: LayerTimes, chunks: int) -> tuple[float, Bound]:
    """(time of a layer in `chunks` chunks, what bounds it).

    The paper's conditions on the cases compare them in pairs: they pick the largest. (Its Q1, which
    compares all-to-all with all-gather alone, says so where all-gather and reduce-scatter take
    equally long; the larger of cases 3 and 4 is right for any.)
    """
    bounds = _bounds(times, chunks)
    bound = max(bounds, key=bounds.get)
    return bounds[bound], bound


def idle_link_seconds(times: LayerTimes, chunks: int) -> float:
    """The longest gradient reduction that the layer hides: its link's idle time."""
    without = dataclasses.replace(times, gradient_reduction=0.0)
    seconds, _ = layer_seconds(without, chunks)
    return seconds - 2 * chunks * times.all_to_all.of_chunk(chunks)


def in_step_seconds(times: LayerTimes, chunks: int) -> float:
    """Time of whole experts and their exchanges, in the order of disag_jax/colocated.py.

    Barriers make chunks go in step: beside each chunk's work one exchange is under way, which
    dispatches the next chunk and combines the last one's rows side by side. The first dispatch and
    the last combine are exposed.

    times: of experts that are not sharded, without a gradient reduction: the loop has neither.
    """
    experts, exchange = times.experts.of_chunk(chunks), times.all_to_all.of_chunk(chunks)
    if chunks == 1:
        return 2 * exchange + experts
    of_two_chunks = times.all_to_all.latency + 2 * times.all_to_all.seconds / chunks
    at_ends = 2 * max(experts, exchange)
    return 2 * exchange + at_ends + (chunks - 2) * max(experts, of_two_chunks)


def best_chunks(times_of: Callable[[int], list[LayerTimes]], candidates: Iterable[int]) -> int:
    """The degree with the least time in step, the smallest of equals.

    times_of: function of a degree that returns the times of all that is cut in so many chunks: one
      direction, or both if they must be cut alike.
    candidates: degrees that may be used, such as the divisors of a micro-batch's tokens: few
      enough to try each, where the paper solves for a real r.
    """

    def seconds(chunks):
        return sum(in_step_seconds(times, chunks) for times in times_of(chunks))

    return min(sorted(candidates), key=seconds)


def _bounds(times: LayerTimes, chunks: int) -> dict[Bound, float]:
    all_to_all, experts, gather, scatter = (
        operation.of_chunk(chunks)
        for operation in (
            times.all_to_all, times.experts, times.all_gather, times.reduce_scatter,
        )
    )  # fmt: skip
    ends = 2 * all_to_all  # the first dispatch and the last combine
    return {
        Bound.INTER_NODE: 2 * chunks * all_to_all + times.gradient_reduction,
        Bound.EXPERTS: ends + gather + scatter + chunks * experts,
        Bound.ALL_TO_ALL: 2 * chunks * all_to_all + gather + scatter,
        Bound.INTRA_NODE: ends + chunks * (gather + scatter),
    }
