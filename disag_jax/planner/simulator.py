"""Executes a schedule table in simulated time, as the loop of disag_jax/pipeline.py runs it.

There is no global clock: each worker goes through its phases in order, and waits only where it
needs what a transfer brings. Workers of one stage and role are alike, so there are as many clocks
as classes of them: A(0) F(0) A(1) F(1) ... disaggregated, one a stage co-located. The classes form
the ring along which messages travel.

What the loop does in a period, with hop 1:

    backward transfer of the last period's messages  ||  forward phase
    forward transfer of what that made               ||  backward phase, which needs the former
    loss, where one is due: of all workers together

With hop 2 both transfers carry what the last period made, and have the whole period; with hop 1
forward and 2 backward (disag_jax/planner/mixed_hop.py) the backward one has. A twin that
interleaves its phases (disag_jax/interleaved.py) hides no transfer: the backward one is before both
phases, the forward one behind them. A device's
transfers follow one another. A transfer is R rounds of pairwise exchanges with both neighbours of
the ring: in round r a worker waits for those that its partners finished in round r - 1, so after R
rounds it has waited for all classes within R of it.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from disag_jax.schedule import Segment

# Waves that a shortened run keeps: the loop is full from the third on; one to see the clocks'
# advance, and two to end with, the last of which may be partial.
KEPT_WAVES = 6


class PhaseSeconds(NamedTuple):
    """Of a phase with a unit, and without one (the twin's exchanges run all the same)."""

    forward: np.ndarray
    backward: np.ndarray
    idle_forward: np.ndarray
    idle_backward: np.ndarray


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of what a loop is made of; arrays [classes].

    Attributes:
      forward, backward, idle_forward, idle_backward: as `PhaseSeconds`.
      forward_transfer, backward_transfer: all rounds of one transfer.
      rounds: R, of a transfer.
      loss: of the tokens that a worker of each class computes.
      loss_owner: the class whose tokens they are; None where each class has its own.
      loss_transfer: of tokens to the others, and of gradients back.
      interleaved: of a period with both phases, where they run in turns (hop 1).
      cool_down: of a period without a forward phase, where its backward phase is another.
    """

    forward: np.ndarray
    backward: np.ndarray
    idle_forward: np.ndarray
    idle_backward: np.ndarray
    forward_transfer: float
    backward_transfer: float
    rounds: int
    loss: np.ndarray
    loss_owner: int | None
    loss_transfer: float
    interleaved: PhaseSeconds | None = None
    cool_down: PhaseSeconds | None = None

    def phases(self, segment: Segment) -> PhaseSeconds:
        """Those of a segment's periods."""
        if segment.has_forward and segment.has_backward and self.interleaved:
            return self.interleaved
        if not segment.has_forward and self.cool_down:
            return self.cool_down
        return PhaseSeconds(self.forward, self.backward, self.idle_forward, self.idle_backward)


@dataclasses.dataclass(frozen=True)
class Table:
    """Which classes have a unit in which phase, and what the loop's scans leave out.

    Attributes:
      forward, backward: bool [periods, classes].
      loss: bool [periods].
      segments: as `Schedule.segments`.
      hops: as `Schedule.hop`, (forward, backward).
    """

    forward: np.ndarray
    backward: np.ndarray
    loss: np.ndarray
    segments: tuple[Segment, ...]
    hops: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Run:
    """Simulated clocks, seconds from the loop's start; [periods, classes].

    Attributes:
      begin: start of the period.
      forward_end, backward_begin, backward_end: of the phases.
      loss_begin, loss_end: where a loss is due, its start and end; else the end of the period.
      end: end of the period, transfers and loss included.
      repeats: (first, one past last period of a wave in the steady state, how many further waves
        like it there are that the clocks leave out); none left out is (0, 0, 0).
    """

    begin: np.ndarray
    forward_end: np.ndarray
    backward_begin: np.ndarray
    backward_end: np.ndarray
    loss_begin: np.ndarray
    loss_end: np.ndarray
    end: np.ndarray
    repeats: tuple[int, int, int]

    @property
    def seconds(self) -> float:
        """Length of the whole loop, waves left out included."""
        first, last, count = self.repeats
        advance = self.begin[last, 0] - self.begin[first, 0] if count else 0.0
        return float(self.end[-1].max()) + count * advance


@functools.lru_cache(maxsize=64)
def make_table(
    num_layers: int, stages: int, micro_batches: int, hop: int, colocated: bool
) -> Table:
    """The table of `schedule.make_schedule`, without rows and slots: for many splits in a second.

    Micro-batch i starts in period W' (i div w) + i mod w, where w = d p is a wave, d = 2 hop the
    distance between layers (1 co-located) and W' = d L' (see `schedule.make_schedule`).
    """
    unit_distances = (0, hop) if colocated else (hop, hop)
    distance = sum(unit_distances)
    wave, place = np.divmod(np.arange(micro_batches), distance * stages)
    start = distance * -(-num_layers // stages) * stages * wave + place
    loss_distance = distance * num_layers
    num_periods = int(start[-1]) + 2 * loss_distance + 1
    units = 1 if colocated else 2
    forward, backward = np.zeros((2, num_periods, units * stages), bool)
    for layer in range(num_layers):
        for unit in range(units):
            place = distance * layer + unit * unit_distances[0]
            column = units * (layer % stages) + unit
            forward[start + place, column] = True
            backward[start + 2 * loss_distance - place, column] = True
    loss = np.zeros(num_periods, bool)
    loss[start + loss_distance] = True
    segments = segments_of(num_layers, stages, micro_batches, hop, colocated)
    return Table(forward, backward, loss, segments, (hop, hop))


def segments_of(
    num_layers: int, stages: int, micro_batches: int, hop: int, colocated: bool
) -> tuple[Segment, ...]:
    """`Schedule.segments`, without a table."""
    unit_distances = (0, hop) if colocated else (hop, hop)
    distance = sum(unit_distances)
    wave, place = divmod(micro_batches - 1, distance * stages)
    last_start = distance * -(-num_layers // stages) * stages * wave + place
    steady = distance * num_layers
    # One past the last expert unit of the last micro-batch.
    end_forward = last_start + distance * (num_layers - 1) + unit_distances[0] + 1
    cool_down = max(steady, end_forward)
    segments = (
        Segment(0, steady, has_forward=True, has_backward=False),
        Segment(steady, cool_down, has_forward=True, has_backward=True),
        Segment(cool_down, last_start + 2 * steady + 1, has_forward=False, has_backward=True),
    )
    return tuple(segment for segment in segments if segment.num_periods)


def stash_slots(num_layers: int, stages: int, micro_batches: int, hop: int, colocated: bool):
    """Slots that an (attention, expert) worker needs, as `Schedule.stash_slots`.

    A slot is taken in a forward phase and free again after its backward phase's period. A
    micro-batch stays for two waves at most, so that further ones need no more.
    """
    wave = (hop if colocated else 2 * hop) * stages
    return _stash_slots(num_layers, stages, min(micro_batches, 4 * wave), hop, colocated)


@functools.cache
def _stash_slots(num_layers, stages, micro_batches, hop, colocated) -> tuple[int, int]:
    table = make_table(num_layers, stages, micro_batches, hop, colocated)
    taken = np.cumsum(table.forward, axis=0)
    freed = np.cumsum(table.backward, axis=0)
    # A slot that is freed in this period's backward phase cannot be taken before the next.
    most = (taken - np.concatenate([np.zeros_like(freed[:1]), freed[:-1]])).max(axis=0)
    roles = most[None] if colocated else most.reshape(stages, 2).T
    attention, expert = roles[0].max(), roles[-1].max()
    return int(attention), int(expert)


def simulate(
    timing: Timing,
    num_layers: int,
    stages: int,
    micro_batches: int,
    hop: int,
    *,
    colocated: bool,
    shorten: bool = True,
) -> Run:
    """Runs the schedule of these sizes.

    With `shorten`, waves in the steady state that are proven to repeat the one before are left out:
    the table repeats there, so once all clocks advance alike in a wave they do so in every next.
    """
    distance = hop if colocated else 2 * hop
    kept = _kept_micro_batches(stages, micro_batches, hop, colocated) if shorten else micro_batches
    table = make_table(num_layers, stages, kept, hop, colocated)
    run = execute(table, timing)
    left_out = (micro_batches - kept) // (distance * stages)
    if not left_out:
        return run
    period = distance * -(-num_layers // stages) * stages
    # The last full wave but one that the kept waves hold: forward and backward are both full.
    first = (KEPT_WAVES - 3) * period
    advance = run.begin[first + period] - run.begin[first]
    if not np.allclose(advance, advance[0], rtol=1e-9, atol=0):
        return simulate(
            timing, num_layers, stages, micro_batches, hop, colocated=colocated, shorten=False
        )
    return dataclasses.replace(run, repeats=(first, first + period, left_out))


def _kept_micro_batches(stages, micro_batches, hop, colocated) -> int:
    """The fewest that have `KEPT_WAVES` waves and the same last one, or all."""
    wave = (hop if colocated else 2 * hop) * stages
    left_out = max(0, -(-micro_batches // wave) - KEPT_WAVES)
    return micro_batches - left_out * wave


def execute(table: Table, timing: Timing) -> Run:
    """Runs every period of a table."""
    num_periods, num_classes = table.forward.shape
    clocks = np.empty((7, num_periods, num_classes))
    begin, forward_end, backward_begin, backward_end, loss_begin, loss_end, end = clocks
    now = np.zeros(num_classes)
    ring = _Ring(num_classes, timing.rounds)
    for segment in table.segments:
        phases, span = timing.phases(segment), slice(segment.begin, segment.end)
        forward = np.where(table.forward[span], phases.forward, phases.idle_forward)
        backward = np.where(table.backward[span], phases.backward, phases.idle_backward)
        period = _in_turns if phases is timing.interleaved else PERIODS[table.hops]
        seconds = _transfer_seconds(table, timing, segment)
        for t in range(segment.begin, segment.end):
            begin[t] = now
            f = forward[t - segment.begin] if segment.has_forward else 0.0
            b = backward[t - segment.begin] if segment.has_backward else 0.0
            forward_end[t], backward_begin[t], backward_end[t], now = period(
                now, f, b, seconds, ring
            )
            loss_begin[t] = loss_end[t] = now
            if table.loss[t]:
                loss_begin[t], loss_end[t] = _loss(backward_end[t], now, timing)
            end[t] = now = np.maximum(now, loss_end[t])
    return Run(*clocks, repeats=(0, 0, 0))


def _loss(
    backward_end: np.ndarray, now: np.ndarray, timing: Timing
) -> tuple[np.ndarray, np.ndarray]:
    """(start, end) of a loss in each class.

    now: end of the backward phase and of the transfers under it. Without helpers a loss is one
    more unit behind the backward phase, under the transfers. With helpers it waits for these; then
    the owner begins at once, others when they have its tokens. It goes on with their gradients; so
    do they, because the next transfer needs it.
    """
    if timing.loss_owner is None:
        return backward_end, backward_end + timing.loss
    begin = np.maximum(now, now[timing.loss_owner] + timing.loss_transfer)
    begin[timing.loss_owner] = now[timing.loss_owner]
    end = (begin + timing.loss).max() + timing.loss_transfer
    return begin, np.full(len(now), end)


def _transfer_seconds(table: Table, timing: Timing, segment: Segment):
    """(forward, backward) transfer in a period of the segment; None where there is none."""
    return (
        timing.forward_transfer if segment.has_forward or table.hops[0] == 2 else None,
        timing.backward_transfer if segment.has_backward else None,
    )


def transfer_times(table: Table, timing: Timing, run: Run):
    """Yields (direction, period, begin, end) of each transfer of a run that left no wave out.

    Arrays [classes]: when a class has all that the transfer waits for, and when it has ended.
    """
    ring = _Ring(table.forward.shape[1], timing.rounds)
    for segment in table.segments:
        forward, backward = _transfer_seconds(table, timing, segment)
        in_turns = timing.phases(segment) is timing.interleaved
        made = run.backward_end if in_turns else run.backward_begin
        for t in range(segment.begin, segment.end):
            parts = {"forward": forward, "backward": backward}
            if table.hops[0] == 1:
                parts = {"backward": backward, "forward": forward}
            sent = run.begin[t]
            for kind, seconds in parts.items():
                if seconds is None:
                    continue
                if table.hops[0] == 1 and kind == "forward":
                    sent = np.maximum(sent, made[t])
                began = ring.wait(sent)
                sent = began + seconds
                yield kind, t, began, sent


def _one_hop(now, forward, backward, transfers, ring):
    """(forward_end, backward_begin, backward_end, end) of a period from `now`."""
    forward_transfer, backward_transfer = transfers
    sent = now
    if backward_transfer is not None:
        sent = ring.wait(now) + backward_transfer
    forward_end = now + forward
    backward_begin = np.maximum(forward_end, sent)
    backward_end = end = backward_begin + backward
    if forward_transfer is not None:
        # Behind the backward transfer on the device's communication stream.
        end = np.maximum(end, ring.wait(backward_begin) + forward_transfer)
    return forward_end, backward_begin, backward_end, end


def _in_turns(now, forward, backward, transfers, ring):
    """As `_one_hop`; the phases' pieces alternate, and are given as one phase after the other."""
    forward_transfer, backward_transfer = transfers
    arrived = ring.wait(now) + backward_transfer
    forward_end = arrived + forward
    backward_end = forward_end + backward
    return forward_end, forward_end, backward_end, ring.wait(backward_end) + forward_transfer


def _two_hops(now, forward, backward, transfers, ring):
    forward_end = now + forward
    backward_end = forward_end + backward
    sent = now
    for seconds in transfers:
        if seconds is not None:
            sent = ring.wait(sent) + seconds
    return forward_end, forward_end, backward_end, np.maximum(backward_end, sent)


def _mixed_hops(now, forward, backward, transfers, ring):
    forward_transfer, backward_transfer = transfers
    forward_end = now + forward
    backward_end = forward_end + backward
    sent = now
    if backward_transfer is not None:
        sent = ring.wait(now) + backward_transfer
    end = np.maximum(backward_end, sent)
    if forward_transfer is not None:
        end = np.maximum(end, ring.wait(np.maximum(forward_end, sent)) + forward_transfer)
    return forward_end, forward_end, backward_end, end


# How a period runs, by the hops forward and backward.
PERIODS = {(1, 1): _one_hop, (2, 2): _two_hops, (1, 2): _mixed_hops}


class _Ring:
    """Classes in the order of messages; a transfer waits for all within its rounds."""

    def __init__(self, num_classes: int, rounds: int):
        self.reach = min(rounds, num_classes // 2)
        self.is_whole = 2 * self.reach >= num_classes - 1
        shifts = np.arange(-self.reach, self.reach + 1)
        self.neighbours = (np.arange(num_classes)[:, None] + shifts) % num_classes

    def wait(self, clocks: np.ndarray) -> np.ndarray:
        if self.is_whole:
            return np.full_like(clocks, clocks.max())
        return clocks[self.neighbours].max(axis=1)
