"""AF-Pipe as data: which unit runs in which period on which worker.

A micro-batch runs through the chain A(0) F(0) A(1) F(1) ... A(L-1) F(L-1) loss and back through
the same chain. Layer l lives on stage l mod p, in row l div p. A period is a forward phase followed
by a backward phase, and a worker runs at most one unit in each. What a unit sends is used exactly
`hop` periods later, so a transfer always has a phase of other work to hide behind.

The co-located twin runs the same kind of table with one unit per layer: A(l) and F(l) in the same
phase of the same worker, so its chain is half as long.

`python -m disag_jax.schedule --config configs/tiny.py` draws the schedule of a config.
`disag_jax.schedule_check` proves a table right without trusting this file.
"""

import dataclasses
import enum
import string
from typing import NamedTuple

import numpy as np

from disag_jax.config import Config
from mesh.roles import Role

IDLE = -1  # in the micro-batch column (and in `Schedule.loss`): nothing runs


class Column(enum.IntEnum):
    """What the last axis of a schedule table holds; rows and slots of idle cells are 0."""

    MICRO_BATCH = 0
    ROW = 1
    SLOT = 2


class Segment(NamedTuple):
    """Periods [begin, end) that one scan executes, with only the phases that have work in them."""

    begin: int
    end: int
    has_forward: bool
    has_backward: bool

    @property
    def num_periods(self) -> int:
        return self.end - self.begin

    @property
    def name(self) -> str:
        if not self.has_backward:
            return "warm-up"
        return "steady" if self.has_forward else "cool-down"


# eq=False: two tables are compared as arrays or not at all, and a schedule can be a dict key.
@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The table that the pipeline executes.

    Attributes:
      hop: periods from a message's making to its use.
      forward, backward: int32 [periods, stages, 2, 3], the unit that a worker of (stage, `Role`)
        runs in a period's forward and backward phase, as (micro-batch or IDLE, row, stash slot).
        A forward unit keeps its input in the slot, its backward unit finds it there.
      loss: int32 [periods], the micro-batch whose loss is due in a backward phase, or IDLE.
        Its hidden states arrive at attention stage L mod p.
      stash_slots: slots that an (attention, expert) worker needs; the most of any stage.
      colocated: whether both roles of a stage, on the same workers, run a layer's two units in the
        same phase; the tables of the roles are then equal.
    """

    num_layers: int
    stages: int
    micro_batches: int
    hop: int
    colocated: bool
    forward: np.ndarray
    backward: np.ndarray
    loss: np.ndarray
    stash_slots: tuple[int, int]

    @property
    def num_periods(self) -> int:
        return len(self.loss)

    @property
    def forward_only(self) -> bool:
        return bool((self.backward[..., Column.MICRO_BATCH] == IDLE).all())

    @property
    def first_backward(self) -> int:
        """The first period with work in its backward phase, which is always a loss."""
        return int(np.argmax(self.loss != IDLE))

    @property
    def end_forward(self) -> int:
        """One past the last period with a forward unit."""
        return int(np.flatnonzero(_busy(self.forward).any(axis=(1, 2)))[-1]) + 1

    @property
    def segments(self) -> list[Segment]:
        """Warm-up, steady state and cool-down; too few micro-batches have no steady state."""
        steady, cool_down = self.first_backward, max(self.first_backward, self.end_forward)
        segments = [
            Segment(0, steady, has_forward=True, has_backward=False),
            Segment(steady, cool_down, has_forward=True, has_backward=True),
            Segment(cool_down, self.num_periods, has_forward=False, has_backward=True),
        ]
        return [segment for segment in segments if segment.num_periods]

    @property
    def idle_share(self) -> float:
        """Share of the executed phases that a worker spends without a unit.

        It is (4p - 1) / (4p (1 + n v) - 1), just below 1 / (1 + n v), for n whole waves of
        2 * hop * p micro-batches and v = L / p layers on every stage (2p - 1 and 2p co-located).
        The backward phases of a forward-only schedule hold losses alone and do not count.
        """
        phases = sum(segment.num_periods for segment in self.segments if segment.has_forward)
        units = _busy(self.forward).sum()
        if not self.forward_only:
            phases += sum(segment.num_periods for segment in self.segments if segment.has_backward)
            units += _busy(self.backward).sum()
        return 1 - int(units) / (phases * self.stages * len(Role))

    @property
    def in_flight(self) -> int:
        """The most micro-batches of any period that have begun and not ended before it.

        It is 4 hop p + 1 (2p + 1 co-located) for many micro-batches where p divides L: one wave on
        its way forward, one on its way back, and in each period one micro-batch that ends while
        another begins.
        """
        present = np.zeros([self.num_periods, self.micro_batches], bool)
        for table in (self.forward, self.backward):
            present[np.nonzero(_busy(table))[0], table[_busy(table), Column.MICRO_BATCH]] = True
        due = self.loss != IDLE
        present[due, self.loss[due]] = True
        begun = np.logical_or.accumulate(present)
        not_ended = np.logical_or.accumulate(present[::-1])[::-1]
        return int((begun & not_ended).sum(axis=1).max())


def make_schedule(
    num_layers: int, stages: int, micro_batches: int, hop: int = 1, *, colocated: bool = False
) -> Schedule:
    """Returns the training schedule; `stages` is at most `num_layers`.

    Disaggregated (co-located, halve every distance: a chain has L units, not 2L):

    Micro-batches start in waves of 2 hop p, one a period, and a wave starts every 2 hop L' periods,
    where L' is L rounded up to a multiple of p. A micro-batch that starts in period s runs unit c
    of its chain (A(l) is unit 2l, F(l) is 2l + 1) forward in s + hop c, its loss in s + 2 hop L,
    and unit c backward in s + 4 hop L - hop c, the mirror image.

    Why nothing ever collides, for any L, p, K and hop: units of layers l and l' meet in one phase
    of one worker only if l - l' is a multiple of p and the starts of their micro-batches differ by
    2 hop (l - l'), a multiple of 2 hop p. So the two hold the same place in different waves and
    start 2 hop L' or more apart, but 2 hop (l - l') is less. A loss and an attention backward unit
    of layer l meet on one stage only if the starts differ by 2 hop (L - l), again a multiple of
    2 hop p. That takes l = 0, and layer 0 has nothing to send: the stage sends one message at most.

    Stash: at most hop (2L' + 2p - 4g) + 1 slots on attention stage g, 2 hop fewer on expert
    stage g. Stage 0 needs the most, at most hop (2L + 2p) + 1 also where p does not divide L.
    """
    distances = _unit_distances(hop, colocated)
    start, loss_distance = _starts(num_layers, stages, micro_batches, sum(distances))
    num_periods = int(start[-1]) + 2 * loss_distance + 1
    forward, backward = (idle_table(num_periods, stages) for _ in range(2))
    place_units(forward, start, distances, num_layers)
    place_units(backward, start + 2 * loss_distance, [-d for d in distances], num_layers)
    stash_slots = assign_slots(forward, backward)
    return Schedule(
        num_layers, stages, micro_batches, hop, colocated, forward, backward,
        place_losses(start + loss_distance, num_periods), stash_slots,
    )  # fmt: skip


def make_forward_schedule(
    num_layers: int, stages: int, micro_batches: int, hop: int = 1, *, colocated: bool = False
) -> Schedule:
    """Returns the schedule of an evaluation: forward units and losses, nothing to stash."""
    distances = _unit_distances(hop, colocated)
    start, loss_distance = _starts(num_layers, stages, micro_batches, sum(distances))
    num_periods = int(start[-1]) + loss_distance + 1
    forward, backward = (idle_table(num_periods, stages) for _ in range(2))
    place_units(forward, start, distances, num_layers)
    return Schedule(
        num_layers, stages, micro_batches, hop, colocated, forward, backward,
        place_losses(start + loss_distance, num_periods), (0, 0),
    )  # fmt: skip


def schedule_of(config: Config, make=make_schedule) -> Schedule:
    """The schedule that a config asks for; `make` is `make_schedule` or `make_forward_schedule`."""
    split = config.split
    return make(
        config.model.num_layers,
        split.stages,
        config.batch.micro_batches,
        split.hop,
        colocated=split.colocated,
    )


def _unit_distances(hop: int, colocated: bool) -> tuple[int, int]:
    """Periods from A(l) to F(l), and from F(l) to A(l + 1)."""
    return (0, hop) if colocated else (hop, hop)


def _starts(num_layers, stages, micro_batches, layer_distance) -> tuple[np.ndarray, int]:
    """Returns the period in which each micro-batch starts [K], and its loss's distance from it."""
    wave, place = np.divmod(np.arange(micro_batches), layer_distance * stages)
    rounded_up = -(-num_layers // stages) * stages
    return layer_distance * rounded_up * wave + place, layer_distance * num_layers


def idle_table(num_periods, stages) -> np.ndarray:
    table = np.zeros([num_periods, stages, len(Role), len(Column)], np.int32)
    table[..., Column.MICRO_BATCH] = IDLE
    return table


def place_units(table, first, distances, num_layers):
    """Writes the chains of all micro-batches, whose A(0) run in the periods `first` [K]."""
    stages = table.shape[1]
    for layer in range(num_layers):
        row, stage = divmod(layer, stages)
        for role in Role:
            periods = first + sum(distances) * layer + role * distances[Role.ATTENTION]
            table[periods, stage, role, Column.MICRO_BATCH] = np.arange(len(first))
            table[periods, stage, role, Column.ROW] = row


def place_losses(periods, num_periods) -> np.ndarray:
    loss = np.full([num_periods], IDLE, np.int32)
    loss[periods] = np.arange(len(periods))
    return loss


def assign_slots(forward, backward) -> tuple[int, int]:
    """Fills in the stash slots of both tables; returns how many each role needs.

    Interval colouring: a unit takes a free slot in its forward phase and gives it back in its
    backward phase. The forward phase of a period comes first, so the slot is free one period later.
    A new slot is opened only when none is free, hence no assignment needs fewer.
    """
    most = [0 for _ in Role]
    for stage, role in np.ndindex(forward.shape[1:3]):
        free, held = [], {}
        for begun, ended in zip(forward[:, stage, role], backward[:, stage, role], strict=True):
            micro_batch, row, _ = begun.tolist()
            if micro_batch != IDLE:
                begun[Column.SLOT] = held[micro_batch, row] = free.pop() if free else len(held)
            micro_batch, row, _ = ended.tolist()
            if micro_batch != IDLE:
                ended[Column.SLOT] = slot = held.pop((micro_batch, row))
                free.append(slot)
            most[role] = max(most[role], len(held) + len(free))
    return tuple(most)


def _busy(table) -> np.ndarray:
    """Returns which cells of a table hold a unit, bool [periods, stages, 2]."""
    return table[..., Column.MICRO_BATCH] != IDLE


_LEGEND = """\
One column is a period: a forward phase, then a backward phase. `.` is an idle phase.
A is the forward and a the backward unit of micro-batch 0, B and b are of micro-batch 1, ..."""


def render(schedule: Schedule, max_periods: int | None = None) -> str:
    """Returns a picture in text: a line per stage and role, a column per period."""
    shown = min(max_periods or schedule.num_periods, schedule.num_periods)
    segments = [s._replace(end=min(s.end, shown)) for s in schedule.segments if s.begin < shown]
    widths = [3 * segment.num_periods for segment in segments]
    names = [
        s.name if len(s.name) < width else "" for s, width in zip(segments, widths, strict=True)
    ]
    lines = [
        _line("", " " + "".join(map(str.ljust, names, widths))),
        _line("period", " " + "".join(f"{period:<15}" for period in range(0, shown, 5))),
    ]
    idle = " " if schedule.forward_only else "."
    for stage in range(schedule.stages):
        # Co-located roles have equal lines.
        for role in Role if not schedule.colocated else [Role.ATTENTION]:
            forward = schedule.forward[:, stage, role, Column.MICRO_BATCH].tolist()
            backward = schedule.backward[:, stage, role, Column.MICRO_BATCH].tolist()
            cells = [
                [
                    _letter(forward[period], "." if segment.has_forward else " ")
                    + _letter(backward[period], idle if segment.has_backward else " ").lower()
                    for period in range(segment.begin, segment.end)
                ]
                for segment in segments
            ]
            name = "stage" if schedule.colocated else role.name.lower()
            lines.append(_line(f"{name} {stage}", _join(cells)))
    losses = [" " + _letter(micro_batch, " ").lower() for micro_batch in schedule.loss.tolist()]
    lines.append(_line("loss", _join([losses[s.begin : s.end] for s in segments])))
    if shown < schedule.num_periods:
        lines.append(f"... {schedule.num_periods - shown} more periods")
    return "\n".join([*lines, "", _LEGEND])


def _letter(micro_batch: int, idle: str) -> str:
    """Names a micro-batch; after Z comes A again."""
    return idle if micro_batch == IDLE else string.ascii_uppercase[micro_batch % 26]


def _join(cells: list[list[str]]) -> str:
    """Joins two-letter cells [segment][period], with a bar before each segment."""
    return "".join("|" + " ".join(segment) for segment in cells)


def _line(label: str, text: str) -> str:
    return f"{label:<13}{text}".rstrip()


def summary(schedule: Schedule) -> str:
    """Returns the figures of a schedule that decide its speed and its memory."""
    parts = ", ".join(f"{segment.name} {segment.num_periods}" for segment in schedule.segments)
    attention, expert = schedule.stash_slots
    return "\n".join(
        [
            f"periods                  {schedule.num_periods} ({parts})",
            f"idle share               {schedule.idle_share:.3f}",
            f"micro-batches in flight  {schedule.in_flight}",
            f"stash slots              attention {attention}, expert {expert}",
        ]
    )


def main(config, max_periods: int | None):
    """Prints the training schedule of a config."""
    schedule = schedule_of(config.validate())
    print(render(schedule, max_periods))
    print()
    print(summary(schedule))


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli

    _CONFIG = cli.define_config_flag()
    _MAX_PERIODS = flags.DEFINE_integer("max_periods", 40, "Periods to draw; 0 draws all.")
    flags.mark_flag_as_required("config")
    cli.run(lambda: main(_CONFIG.value, _MAX_PERIODS.value))
