"""Seconds of the co-located twin's phases, in the order in which its loop runs their pieces.

`split.overlap` = none and chunked: disag_jax/colocated.py; interleaved: disag_jax/interleaved.py.
All functions take `Costs` of a co-located config. Not counted: cutting rows into chunks and joining
them, and that the sum of a token's copies, part of an attention unit, is outside of what hides an
exchange.
"""

import functools

from disag_jax.chunk_model import LayerTimes, Operation, best_chunks, in_step_seconds
from disag_jax.planner.costs import Costs
from disag_jax.planner.simulator import PhaseSeconds
from disag_jax.reduction import sums_rows_early

EXPERT_UNITS = ("expert_forward", "expert_backward")


def alone(costs: Costs, share: float = 1.0) -> PhaseSeconds:
    """Phases that have none of another micro-batch beside them.

    share: what exchanges take, of what they do; 0 makes them free.
    """
    through = [_through_experts(costs, unit, share, with_experts=True) for unit in EXPERT_UNITS]
    idle = [_through_experts(costs, unit, share, with_experts=False) for unit in EXPERT_UNITS]
    units = costs.unit_seconds
    return PhaseSeconds(
        units["attention_forward"] + through[0] + _regroup(costs, *costs.chunks.values(), share),
        units["attention_backward"] + through[1],
        *idle,
    )


def cool_down(costs: Costs, share: float = 1.0) -> PhaseSeconds:
    """As `alone`, with a layer's gradients summed beside attention where the loop does that."""
    phases = alone(costs, share)
    if not sums_rows_early(costs.config):
        return phases
    reduction, attention = share * costs.reduce_layer, costs.unit_seconds["attention_backward"]
    return phases._replace(
        backward=phases.backward + max(0.0, reduction - attention),
        idle_backward=phases.idle_backward + reduction,
    )


def interleaved(costs: Costs, share: float = 1.0) -> PhaseSeconds:
    """Phases of two micro-batches in turns: each exchange beside a piece of the other phase.

    An exchange takes place whether there is a piece beside it or not, so a piece adds what it takes
    longer than its exchange, and periods are sums of their phases.
    """
    units = costs.unit_seconds
    of_forward, of_backward = (share * exchange(costs, unit).of_chunk(1) for unit in EXPERT_UNITS)
    forward, backward = (
        sum(max(units[f"{role}_{phase}"], beside) for role in ("attention", "expert"))
        for phase, beside in (("forward", of_backward), ("backward", of_forward))
    )
    return PhaseSeconds(forward, backward, 2 * of_backward, 2 * of_forward)


def best_degrees(costs: Costs, candidates: list[int], *, alike: bool) -> tuple[int, int]:
    """(forward, backward) chunks with which a layer takes least, of the degrees that may be used.

    alike: whether both must be the same (`run.recompute` = none).
    """

    layer_times = functools.cache(functools.partial(_layer_times, costs))

    def times_of(*units):
        return lambda chunks: [layer_times(unit, chunks) for unit in units]

    def seconds(degrees):
        exchanged = sum(
            in_step_seconds(layer_times(unit, chunks), chunks)
            for unit, chunks in zip(EXPERT_UNITS, degrees, strict=True)
        )
        return exchanged + _regroup(costs, *degrees)

    both = (best_chunks(times_of(*EXPERT_UNITS), candidates),) * 2
    if alike:
        return both
    apart = tuple(best_chunks(times_of(unit), candidates) for unit in EXPERT_UNITS)
    return min(both, apart, key=seconds)


def _through_experts(costs: Costs, unit: str, share: float, *, with_experts: bool) -> float:
    """Seconds from the first dispatch to the last combine."""
    chunks = costs.chunks[unit]
    times = _layer_times(costs, unit, chunks, share)
    if not with_experts:
        times = LayerTimes(times.all_to_all, Operation())
    return in_step_seconds(times, chunks)


def _layer_times(costs: Costs, unit: str, chunks: int, share: float = 1.0) -> LayerTimes:
    """Exchange and experts of a phase in chunks.

    A chunk's experts are timed by its own work, tiles and weights included, so that all of it
    stands as what a chunk takes whatever its size.
    """
    moved = exchange(costs, unit, chunks)
    return LayerTimes(
        all_to_all=Operation(share * moved.latency, share * moved.seconds),
        experts=Operation(latency=costs.expert_seconds(unit, chunks)),
    )


def exchange(costs: Costs, unit: str, chunks: int = 1) -> Operation:
    """One all-to-all of the phase that an expert unit is in, in `chunks` chunks."""
    sizes = costs.sizes
    is_forward = unit == "expert_forward"
    return costs.exchange(sizes.message_bytes if is_forward else sizes.cotangent_bytes, chunks)


def _regroup(costs: Costs, forward_chunks: int, backward_chunks: int, share: float = 1.0) -> float:
    """What dealing rows to other chunks takes longer than the last exchange, which hides it."""
    hidden_by = exchange(costs, "expert_forward", forward_chunks).of_chunk(forward_chunks)
    return max(0.0, costs.regroup_seconds(forward_chunks, backward_chunks) - share * hidden_by)
