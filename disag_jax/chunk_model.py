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


@dataclasses.dataclass(frozen=True)
class Reduction:
    """An all-reduce of gradients, on the link between nodes: `latency` + bytes / rate."""

    latency: float
    bytes_per_second: float

    def seconds(self, num_bytes: float) -> float:
        """Of a reduction of so much; of nothing, none."""
        return self.latency + num_bytes / self.bytes_per_second if num_bytes > 0 else 0.0

    def num_bytes(self, seconds: float) -> float:
        """What a reduction has done after so long."""
        return max(0.0, seconds - self.latency) * self.bytes_per_second


def reduced_layer_seconds(
    times: LayerTimes, num_bytes: float, link: Reduction, degrees: Iterable[int]
) -> float:
    """Time of a layer with so many gradients to reduce, in the degree that is best with them."""
    reduced = dataclasses.replace(times, gradient_reduction=link.seconds(num_bytes))
    return min(layer_seconds(reduced, chunks)[0] for chunks in degrees)


def fill_idle_links(idle: list[float], sizes: list[float], link: Reduction) -> list[float]:
    """Bytes reduced in each layer at no cost, and the rest behind them: the paper's greedy step.

    idle: seconds that each layer's link has nothing to do, in the order of the backward phase.
    sizes: bytes of gradients that each layer makes. They can be reduced from the next layer on, so
      the last one's are always in the rest.
    """
    pieces, waiting = [], 0.0
    for seconds, made in zip(idle, sizes, strict=True):
        pieces.append(min(waiting, link.num_bytes(seconds)))
        waiting += made - pieces[-1]
    return [*pieces, waiting]


def partition_gradients(
    layers: list[LayerTimes],
    sizes: list[float],
    link: Reduction,
    degrees: Iterable[int],
    parts: int = 16,
) -> list[float]:
    """Bytes reduced in each layer of the backward phase, and behind the last: least time in all.

    First each layer's idle link is filled. Then the rest, in `parts` equal parts, goes where it
    costs least: into layers that would rather have fewer chunks, or behind the last. The paper
    searches for that by differential evolution; here every division into these parts is considered,
    layer by layer, as a shortest path.

    layers: times without a gradient reduction, in the order of the backward phase.
    sizes: as for `fill_idle_links`.
    """
    degrees = sorted(degrees)
    idle = [
        idle_link_seconds(times, min(degrees, key=lambda r, t=times: layer_seconds(t, r)[0]))
        for times in layers
    ]
    *pieces, rest = fill_idle_links(idle, sizes, link)
    part = rest / parts
    # Of each number of parts that are placed so far: the least seconds, and where the parts are.
    best = {0: (0.0, ())}
    unused = 0.0
    for i, (times, piece) in enumerate(zip(layers, pieces, strict=True)):
        # Gradients of the layers before that no piece has taken up to here.
        unused += (sizes[i - 1] if i else 0.0) - piece
        most = min(parts, int(unused / part * (1 + 1e-12))) if part else 0
        costs = [
            reduced_layer_seconds(times, piece + count * part, link, degrees)
            for count in range(most + 1)
        ]
        reached = {}
        for placed, (seconds, where) in best.items():
            for count in range(most - placed + 1):
                found = (seconds + costs[count], (*where, count))
                reached[placed + count] = min(reached.get(placed + count, found), found)
        best = reached
    totals = {
        placed: seconds + link.seconds(rest - placed * part)
        for placed, (seconds, _) in best.items()
    }
    placed = min(totals, key=totals.get)
    counts = best[placed][1]
    return [
        *(piece + count * part for piece, count in zip(pieces, counts, strict=True)),
        rest - placed * part,
    ]


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
