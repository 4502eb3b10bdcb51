"""What a table with hop 1 forward and hop 2 backward would bring; the pipeline does not run it.

  python -m disag_jax.planner.mixed_hop

A forward message is used one period after it was made, a backward message two: a backward transfer
then has a whole period to hide in, where with hop 1 it has the forward phase alone, which is the
shorter one. Disaggregated only: the twin has no such messages.

Why such a table exists, and when it is slower. Unit c of a chain of 2 L runs in period s + c of a
micro-batch that starts in s, its loss in s + 2 L, unit c backward in s + 6 L - 2 c. Layers l and l'
on one stage, (l - l') = j p, collide forward if starts differ by 2 j p, backward if by 4 j p; a
loss and an attention backward unit that sends if by 4 j p too; j goes from 1 to v - 1, v being the
rows of a stage, ceil(L / p). So starts of one remainder modulo 2 p must have distances, in units of
2 p, that are none of 1 ... v - 1 and none of 2, 4 ... 2 v - 2. Two successive starts are v apart at
least, and v is allowed only if it is odd (or 1); then all multiples of v are allowed. If v is even,
the least distance is v + 1, and all its multiples are allowed. So the fastest table starts waves of
2 p micro-batches every 2 p v periods for odd v, as hop 1 does, and every 2 p (v + 1) for even v.

A unit's input waits 6 L - 3 c periods in the stash: half as long again as with hop 1, three
quarters of hop 2.
"""

import dataclasses

import numpy as np
import rich.console
import rich.table

from disag_jax.config import Config, SplitConfig
from disag_jax.planner import paper_checks
from disag_jax.planner.costs import Costs
from disag_jax.planner.hardware import Hardware, load
from disag_jax.planner.prediction import timing_of, total_seconds
from disag_jax.planner.simulator import Table, execute
from disag_jax.planner.sizes import Sizes
from disag_jax.schedule import (
    IDLE,
    Column,
    Schedule,
    assign_slots,
    idle_table,
    make_schedule,
    place_losses,
    place_units,
)
from mesh.roles import Role

FORWARD_HOP, BACKWARD_HOP = 1, 2


def make_mixed_schedule(num_layers: int, stages: int, micro_batches: int) -> Schedule:
    """The fastest table with hop 1 forward and 2 backward; its `hop` is the forward one."""
    rows = -(-num_layers // stages)
    wave, place = np.divmod(np.arange(micro_batches), 2 * stages)
    start = 2 * stages * (rows + (rows + 1) % 2) * wave + place
    loss, end = start + 2 * num_layers, start + 6 * num_layers
    num_periods = int(end[-1]) + 1
    forward, backward = (idle_table(num_periods, stages) for _ in range(2))
    place_units(forward, start, (FORWARD_HOP, FORWARD_HOP), num_layers)
    place_units(backward, end, (-BACKWARD_HOP, -BACKWARD_HOP), num_layers)
    slots = assign_slots(forward, backward)
    return Schedule(
        num_layers, stages, micro_batches, FORWARD_HOP, False, forward, backward,
        place_losses(loss, num_periods), slots,
    )  # fmt: skip


def table_of(schedule: Schedule, hops: tuple[int, int]) -> Table:
    """What the simulator executes of a disaggregated schedule."""
    forward, backward = (
        (table[..., Column.MICRO_BATCH] != IDLE).reshape(schedule.num_periods, -1)
        for table in (schedule.forward, schedule.backward)
    )
    return Table(forward, backward, schedule.loss != IDLE, tuple(schedule.segments), hops)


@dataclasses.dataclass(frozen=True)
class Price:
    """A step under some hops: seconds, slots of (attention, expert) workers, bytes of the stash."""

    seconds: float
    slots: tuple[int, int]
    stash_bytes: float


def prices(config: Config, hardware: Hardware) -> dict[tuple[int, int], Price]:
    """The price of a disaggregated config's step by (forward hop, backward hop)."""
    costs = Costs(Sizes.of(config), hardware, copies_boxes=False)
    sizes = config.model.num_layers, config.split.stages, config.batch.micro_batches
    schedules = {(hop, hop): make_schedule(*sizes, hop) for hop in (1, 2)}
    schedules[FORWARD_HOP, BACKWARD_HOP] = make_mixed_schedule(*sizes)
    found = {}
    for hops, schedule in sorted(schedules.items()):
        run = execute(table_of(schedule, hops), timing_of(costs))
        entries = costs.sizes.stash_entry_bytes
        stash = max(schedule.stash_slots[role] * entries[role] for role in Role)
        found[hops] = Price(total_seconds(costs, run), schedule.stash_slots, stash)
    return found


def paper_configs() -> list[Config]:
    """The paper's models at its lengths, 4 stages of 16 attention and 16 expert workers."""
    found = []
    for name in ("Qwen3-235B", "DeepSeek-MoE"):
        for length in (4096, 16_384, 32_768):
            config = paper_checks.model(name, length)
            config.split = SplitConfig(
                stages=paper_checks.STAGES, attention_workers=16, expert_workers=16,
                bucket_factors=(1.0,),
            )  # fmt: skip
            config.name = f"{name} at {length // 1024}K"
            found.append(config)
    return found


def rows() -> list[tuple[str, ...]]:
    """A row of words for each of the paper's configs."""
    hardware, found = load("h800"), []
    for config in paper_configs():
        priced = prices(config, hardware)
        layers = f"{config.model.num_layers} layers, v = {config.layers_per_stage}"
        cells = [
            f"{price.seconds:.2f} s, {price.stash_bytes / 2**30:.0f} GiB"
            for price in priced.values()
        ]
        found.append((f"{config.name}, {layers}", *cells))
    return found


def main():
    """Prints the table."""
    made = rich.table.Table(title="A step and the stash of a worker, data sheet H800")
    for name in ("", "hop 1", "1 forward, 2 backward", "hop 2"):
        made.add_column(name)
    for row in rows():
        made.add_row(*row)
    rich.console.Console(width=120).print(made)


if __name__ == "__main__":
    main()
