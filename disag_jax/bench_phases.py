"""Times of the phases that the pipeline runs: a unit with its stash, its message's words, its sums.

What `disag_jax.bench_units` times is the arithmetic alone. A phase is what a period waits for, and
so what a prediction of a step needs. Attention and expert workers of one stage run their phases one
role at a time, without transfers.
"""

import concurrent.futures
import dataclasses
import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from disag_jax import processes
from disag_jax.batches import Batch
from disag_jax.bench_units import loss_call
from disag_jax.config import Config
from disag_jax.dispatch import Cotangent
from disag_jax.geometry import Bucket, buckets, make_geometry
from disag_jax.overlap import transfers
from disag_jax.phases import Entry
from disag_jax.pipeline import (
    EVERYWHERE,
    PER_WORKER,
    VOCABULARY_SPECS,
    compiler_options,
    make_phases,
)
from disag_jax.reduction import gather_weights
from disag_jax.schedule import IDLE, schedule_of
from disag_jax.timing import Figure, time_calls, time_iterations
from mesh.placement import Meshes
from mesh.roles import Role

# A transfer of at most this share of a phase hides under it for certain. Of a longer one a part is
# sent instead, cut in at most so many.
HIDDEN_SHARE, MOST_PARTS = 0.5, 256

# So often a phase is timed alone and beside a transfer, in turns.
TURNS = 3

COMPILED_AT_ONCE = 16

DIRECTIONS = ("forward", "backward")


def _beside(direction: str) -> str:
    return f"{direction} beside a transfer"


def _transfer(direction: str) -> str:
    return f"transfer under {direction}"


def _unit(role: Role, direction: str) -> str:
    return f"{role.label}_{direction}"


def _overlaps(program) -> bool:
    """Whether the transfer is under way while the phase runs, by the compiled program."""
    found = transfers(program.as_text())
    return bool(found) and all(transfer.conditionals for transfer in found)


# Names of the programs.
START = "start"
ALONE = (START, *DIRECTIONS)
TRANSFERS = tuple(_transfer(direction) for direction in DIRECTIONS)


@dataclasses.dataclass(frozen=True)
class PhaseTimes:
    """What was measured in one shape.

    Attributes:
      bucket: the transport bucket that held the routing.
      pairs: (token, expert) pairs of the busiest expert worker.
      figures: times by unit, as `planner.hardware.UNITS`.
    """

    bucket: Bucket
    pairs: int
    figures: dict[str, Figure]


def measure(
    configs: list[Config], meshes: Meshes, say
) -> tuple[list[PhaseTimes], dict[str, float]]:
    """(times of each config in the smallest bucket that holds its routing, what the first loses).

    The configs have one stage and two layers. What is lost, by unit, is the seconds that its phase
    takes longer for each second of the transfer that it hides. Programs are compiled side by side,
    and run one at a time. `say` is told what is being done.
    """
    assert all(c.split.stages == 1 and c.model.num_layers == 2 for c in configs), configs
    benches = [_PhaseBench(config, meshes, buckets(config)[0]) for config in configs]
    with concurrent.futures.ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
        programs = [(bench, name) for bench in benches for name in ALONE]
        programs += [(benches[0], name) for name in TRANSFERS]
        losses = [pool.submit(bench.loss) for bench in benches]
        waiting = [pool.submit(bench.program, name) for bench, name in programs]
        for done in waiting + losses:
            done.result()
    say(f"{len(waiting)} programs are compiled; phases alone")
    benches = [bench.that_fits() for bench in benches]
    times = [bench.measure() for bench in benches]
    say("phases beside transfers")
    return times, benches[0].lost_beside_transfers(times[0])


class _PhaseBench:
    def __init__(self, config: Config, meshes: Meshes, bucket: Bucket):
        self.config, self.meshes, self.bucket = config, meshes, bucket
        self.g = make_geometry(config, bucket)
        self.arguments = self._arguments()
        self.compiled = {}
        self.loss = functools.cache(lambda: loss_call(self.g))

    @functools.cached_property
    def _started(self):
        """(state of the loops, what the routing needed), of a layer run forward."""
        return self.program(START)(*self.arguments)

    @functools.cached_property
    def pairs(self) -> int:
        """(token, expert) pairs of the busiest expert worker."""
        counts = processes.gathered(self._started[1][0]).sum(axis=0)[0]
        places, model = self.g.places, self.config.model
        busiest = max(
            int(counts[np.array(places.share(worker))].sum())
            for worker in range(places.num_workers)
        )
        # Tokens whose first choice is elsewhere send no shared experts here: the mean counts.
        return busiest + model.num_shared_experts * self.g.T * self.g.M // places.num_workers

    @property
    def fits(self) -> bool:
        _, *needed = self._started[1]
        return self.bucket.holds(Bucket(*(int(processes.gathered(one).max()) for one in needed)))

    def that_fits(self) -> "_PhaseBench":
        """This one, or the one of the next bucket that holds the routing."""
        larger, bench = iter(buckets(self.config)[1:]), self
        while not bench.fits:
            bench = _PhaseBench(self.config, self.meshes, next(larger))
        return bench

    def measure(self) -> PhaseTimes:
        figures = self.phase_times() | {"loss": time_calls("loss", self.loss())}
        return PhaseTimes(self.bucket, self.pairs, figures)

    def lost_beside_transfers(self, alone: PhaseTimes) -> dict[str, float]:
        """Of the units beside such a part of their transfer as they hide for certain.

        Of a longer one what was timed would be the transfer. A direction is left out where XLA runs
        both in turn, or where no part is short enough.
        """
        before = {name: figure.milliseconds for name, figure in alone.figures.items()}
        parts = {direction: self._part(direction, before) for direction in DIRECTIONS}
        parts = {direction: part for direction, part in parts.items() if part}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            beside = {
                direction: pool.submit(self.program, _beside(direction), count)
                for direction, (count, _) in parts.items()
            }
            programs = {direction: program.result() for direction, program in beside.items()}
        return {
            _unit(role, direction): self._lost(role, direction, program) / parts[direction][1]
            for direction, program in programs.items()
            if _overlaps(program)
            for role in Role
        }

    def _lost(self, role: Role, direction: str, program) -> float:
        """Milliseconds that a role's unit takes longer in a program than alone, timed in turns.

        0 where it was not longer each time: then it is noise.
        """
        name, alone = _unit(role, direction), self.program(direction)
        turns = [
            [self.time(name, one, role).milliseconds for one in (alone, program)]
            for _ in range(TURNS)
        ]
        longer = [beside - before for before, beside in turns]
        return statistics.median(longer) if min(longer) > 0 else 0.0

    def _part(self, direction: str, before: dict[str, float]) -> tuple[int, float] | None:
        """(how many parts a transfer is cut in, milliseconds of one) beside a direction's phases.

        None if no part of at most so many is short enough.
        """
        longest = HIDDEN_SHARE * min(before[_unit(role, direction)] for role in Role)
        parts = 1
        while (milliseconds := self._transfer_time(direction, parts)) > longest:
            parts *= 2 ** math.ceil(math.log2(milliseconds / longest))
            if parts > MOST_PARTS:
                return None
        return parts, milliseconds

    def _transfer_time(self, direction: str, parts: int) -> float:
        """Milliseconds of such a part of the transfer that a phase of a direction hides."""
        program = self.program(_transfer(direction), parts)
        return self.time(direction, program, Role.ATTENTION).milliseconds

    def phase_times(self) -> dict[str, Figure]:
        """Times by unit, without transfers."""
        return {
            name: figure
            for direction in DIRECTIONS
            for name, figure in self._role_times(direction, self.program(direction)).items()
        }

    def _role_times(self, direction: str, program) -> dict[str, Figure]:
        """Times by unit of a program that runs the phases of a direction."""
        return {
            _unit(role, direction): self.time(_unit(role, direction), program, role)
            for role in Role
        }

    def time(self, name: str, program, role: Role) -> Figure:
        """Time of one of the phases that a program runs in a loop."""
        return time_iterations(
            name,
            lambda count: program(
                *self.arguments, self._started[0], jnp.int32(role), jnp.int32(count)
            ),
        )

    def _arguments(self):
        """(rows, vocabulary, router bias, batch): random weights, which route evenly."""
        g, model = self.g, self.config.model
        devices = g.placement.num_devices
        num_rows = -(-model.vocab_size // devices) * devices
        columns = self._phases().layouts.num_columns(Role.ATTENTION)

        def draw(seed, shape, spec):
            make = jax.jit(
                lambda: 0.02 * jax.random.normal(jax.random.key(seed), shape, g.compute_dtype),
                out_shardings=NamedSharding(self.meshes.union, spec),
            )
            return make()

        rows = draw(0, (devices, self.config.layers_per_stage, columns), PER_WORKER)
        shapes = {"embedding": (num_rows, g.D), "final_norm": (g.D,), "head": (num_rows, g.D)}
        vocabulary = {
            name: draw(1 + i, shape, VOCABULARY_SPECS[name])
            for i, (name, shape) in enumerate(shapes.items())
        }
        bias = jnp.zeros((model.num_layers, g.E), g.wide_dtype)
        shape = (devices * self.config.batch.sequences_per_worker, g.S + 1)
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape, dtype=np.int32)
        batch = Batch.of(tokens, None, across_documents=True)
        sharding = NamedSharding(self.meshes.union, PER_WORKER)
        batch = jax.tree.map(
            lambda leaf: jax.device_put(
                leaf.reshape(devices, 1, self.config.batch.sequences_per_worker, -1), sharding
            ),
            batch,
        )
        return rows, vocabulary, bias, batch

    def program(self, name: str, parts: int = 1):
        """The compiled program of a name; safe to call from several threads for several names.

        parts: a program that sends sends one of so many parts of a message.
        """
        if (name, parts) not in self.compiled:
            self.compiled[name, parts] = self._lower(name, parts).compile()
        return self.compiled[name, parts]

    def _lower(self, name: str, parts: int):
        if name == START:
            return self._jitted(self._start).lower(*self.arguments)
        functions = {direction: getattr(self, f"_{direction}") for direction in DIRECTIONS}
        for direction in DIRECTIONS:
            phase = functions[direction]
            functions[_beside(direction)] = self._beside_transfer(phase, direction, parts)
            functions[_transfer(direction)] = self._only_transfer(direction, parts)
        state, _ = jax.eval_shape(self._jitted(self._start), *self.arguments)
        arguments = [
            jax.tree.map(lambda x, s=spec: self._abstract(x, s), value)
            for value, spec in (
                (state, PER_WORKER), (jnp.int32(0), EVERYWHERE), (jnp.int32(0), EVERYWHERE),
            )
        ]  # fmt: skip
        return self._jitted(functions[name], loops=True).lower(*self.arguments, *arguments)

    def _abstract(self, x, spec):
        sharding = NamedSharding(self.meshes.union, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def _jitted(self, function, *, loops: bool = False):
        """A program of all workers on the pipeline's arguments.

        It calls `function(phases)`. With `loops` it takes (state, role, count) besides and runs
        `count` iterations of the loop that `function(phases, state, role)` describes. State and
        results are per worker.
        """

        def run(rows, vocabulary, bias, batch, *states):
            weights = gather_weights(self.g, rows, vocabulary, bias)
            phases = self._phases().bind(
                weights, jax.tree.map(lambda x: x[0], batch), self._zeros, 1.0
            )
            if states:
                state, role, count = states
                state = jax.tree.map(lambda x: x[0], state)
                carry, body, result = function(phases, state, role)
                results = result(lax.fori_loop(0, count, body, carry))
            else:
                results = function(phases)
            return jax.tree.map(lambda x: x[None], results)

        in_specs = (PER_WORKER, VOCABULARY_SPECS, EVERYWHERE, PER_WORKER)
        if loops:
            in_specs += (PER_WORKER, EVERYWHERE, EVERYWHERE)
        return jax.jit(
            jax.shard_map(
                run, mesh=self.meshes.union, in_specs=in_specs, out_specs=PER_WORKER,
                check_vma=False,
            ),
            compiler_options=compiler_options(self.meshes, self.config.split.hop),
        )  # fmt: skip

    def _phases(self):
        """New ones: a trace binds them to its own values, and several threads trace."""
        return make_phases(self.g, schedule_of(self.config))

    @property
    def _zeros(self):
        return jnp.zeros((2,), self.g.wide_dtype)

    def _entry(self, phases, role, layer_row) -> Entry:
        plays = jnp.where(phases.me.plays[Role.ATTENTION], Role.ATTENTION, Role.EXPERT) == role
        return Entry(jnp.where(plays, 0, IDLE), layer_row, jnp.int32(0))

    def _start(self, phases):
        """((message and cotangent to take in, stash), needs): one layer forward in both roles."""
        outbox, _ = phases.empty_boxes()
        empty, stash, stats = outbox, phases.pool.zeros(), phases.zero_stats()
        for role in Role:
            inbox = phases.transport.send_forward(outbox)
            entry = self._entry(phases, role, jnp.int32(0))
            outbox, stash, stats = phases.forward(inbox, empty, entry, stash, stats)
            if role is Role.ATTENTION:
                received = phases.transport.send_forward(outbox)
        finished = phases.transport.send_forward(outbox)
        inbox = jnp.where(phases.me.plays[Role.ATTENTION], finished, received)
        g = self.g
        x = 0.02 * jax.random.normal(jax.random.key(9), (g.R, g.C, g.D), g.compute_dtype)
        gate = jax.random.normal(jax.random.key(8), (g.R, g.C, g.K), g.wide_dtype)
        cotangent = phases.cotangent.encode(Cotangent(x, gate))
        routing = stats.routing
        return (inbox, cotangent, stash), (
            routing.counts, routing.rows_needed, stats.sorted_needed
        )  # fmt: skip

    def _forward(self, phases, state, role):
        """(carry, body, what of the carry is returned) of a loop over forward phases."""
        inbox, _, stash = state

        def phase(index, carry):
            return phases.forward(inbox, carry[0], self._entry(phases, role, index % 2), *carry[1:])

        def result(carry):
            outbox, stash, stats = carry
            return outbox[:, :1], stash[:1], stats.sorted_needed

        return (jnp.zeros_like(inbox), stash, phases.zero_stats()), phase, result

    def _backward(self, phases, state, role):
        _, cotangent, stash = state

        def phase(index, carry):
            outbox, grads = carry
            entry = self._entry(phases, role, index % 2)
            return phases.backward(cotangent, outbox, entry, stash, grads)

        def result(carry):
            outbox, grads = carry
            return outbox[:, :1], grads.rows[:, :1], grads.embedding[:1]

        return (jnp.zeros_like(cotangent), phases.zero_grads()), phase, result

    def _beside_transfer(self, make, direction: str, parts: int):
        """The same loop with the transfer of the other direction's messages in each iteration."""

        def make_both(phases, state, role):
            carry, phase, result = make(phases, state, role)
            sent, send = self._other_transfer(phases, state, direction, parts)

            def both(index, carry):
                sent, carry = carry
                # As in the pipeline: the transfer ends with the phase.
                return lax.optimization_barrier((send(sent), phase(index, carry)))

            return (sent, carry), both, lambda carry: (carry[0][:, :1], result(carry[1]))

        return make_both

    def _only_transfer(self, direction: str, parts: int):
        """A loop over the transfer that a phase of this direction hides."""

        def make(phases, state, role):
            del role
            sent, send = self._other_transfer(phases, state, direction, parts)
            return sent, lambda _, sent: send(sent), lambda sent: sent[:, :1]

        return make

    @staticmethod
    def _other_transfer(phases, state, direction: str, parts: int):
        """(words, function that sends them): a forward phase hides a backward transfer."""
        message, cotangent, _ = state
        words, send = {
            "forward": (cotangent, phases.transport.send_backward),
            "backward": (message, phases.transport.send_forward),
        }[direction]
        return words[:, : -(-words.shape[1] // parts)], send
