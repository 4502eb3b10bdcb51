"""Seconds that a loop cannot undercut, without running it: for a search over many splits."""

import numpy as np

from disag_jax.planner.simulator import Timing, segments_of
from disag_jax.schedule import Segment


def lower_bound(
    timing: Timing, num_layers: int, stages: int, micro_batches: int, hop: int, colocated: bool
) -> float:
    """Seconds that no run can undercut, without running: the most of any class of workers.

    A class's phases follow each other, and so do its transfers, which hide under at most the other
    phase (hop 1) or the period (hop 2), and under a loss that nobody helps with.
    """
    segments = segments_of(num_layers, stages, micro_batches, hop, colocated)
    num_classes = len(timing.forward)
    loss = timing.loss
    if timing.loss_owner is not None:
        loss = loss + timing.loss_transfer
    elif hop == 1:
        loss = np.maximum(loss - timing.forward_transfer, 0)
    layers = [len(range(stage, num_layers, stages)) for stage in range(stages)]
    units = micro_batches * np.repeat(layers, num_classes // stages)
    if hop == 1:
        seconds = sum(s.num_periods * _least_period(timing, s) for s in segments)
        seconds += _least_of_units(timing, segments, units)
    else:
        work = units * (timing.forward + timing.backward)
        periods = segments[-1].end
        backwards = sum(s.num_periods for s in segments if s.has_backward)
        moves = periods * timing.forward_transfer + backwards * timing.backward_transfer
        if timing.loss_owner is None:
            work, loss = work + micro_batches * loss, 0.0
        seconds = np.maximum(work, moves)
    return float((seconds + micro_batches * loss).max())


def _hides_transfers(timing: Timing, segment: Segment) -> bool:
    """Whether each phase of a segment's periods (hop 1) hides the other direction's transfer."""
    return segment.has_forward and segment.has_backward and not timing.interleaved


def _least_period(timing: Timing, segment: Segment) -> np.ndarray:
    """Seconds [classes] of a period (hop 1) without a unit."""
    phases = timing.phases(segment)
    if _hides_transfers(timing, segment):
        # Without a unit a phase is as long as what it hides, or as its exchanges.
        return np.maximum(phases.idle_forward, timing.backward_transfer) + np.maximum(
            phases.idle_backward, timing.forward_transfer
        )
    seconds = np.zeros(len(phases.forward))
    if segment.has_forward:
        seconds = seconds + phases.idle_forward + timing.forward_transfer
    if segment.has_backward:
        seconds = seconds + phases.idle_backward + timing.backward_transfer
    return seconds


def _least_of_units(timing: Timing, segments: tuple[Segment, ...], units) -> np.ndarray:
    """Seconds [classes] that `units` [classes] add to their periods at least, in any segment.

    A segment has no more units than periods: those that add least are taken first.
    """
    total = np.zeros(len(units))
    for has, unit, idle, hidden in (
        ("has_forward", "forward", "idle_forward", timing.backward_transfer),
        ("has_backward", "backward", "idle_backward", timing.forward_transfer),
    ):
        added, periods = [], []
        for segment in segments:
            if getattr(segment, has):
                phases = timing.phases(segment)
                least = getattr(phases, idle)
                if _hides_transfers(timing, segment):
                    least = np.maximum(least, hidden)
                added.append(np.maximum(getattr(phases, unit) - least, 0))
                periods.append(segment.num_periods)
        order = np.argsort(added, axis=0)
        cheapest = np.take_along_axis(np.array(added), order, axis=0)
        room = np.array(periods)[order]
        before = np.cumsum(room, axis=0) - room
        total += (np.clip(units - before, 0, room) * cheapest).sum(axis=0)
    return total
