"""Times of the phases that the pipeline runs: a unit with its stash, its message's words, its sums.

What `disag_jax.bench_units` times is the arithmetic alone. A phase is what a period waits for, and
so what a prediction of a step needs. Attention and expert workers of one stage run their phases one
role at a time, without transfers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from disag_jax.batches import Batch
from disag_jax.bench_units import loss_call
from disag_jax.config import Config
from disag_jax.dispatch import Cotangent
from disag_jax.geometry import Bucket, buckets, make_geometry
from disag_jax.phases import Entry
from disag_jax.pipeline import EVERYWHERE, PER_WORKER, VOCABULARY_SPECS, make_phases
from disag_jax.reduction import gather_weights
from disag_jax.schedule import IDLE, schedule_of
from disag_jax.timing import Figure, time_calls, time_iterations
from mesh.placement import Meshes
from mesh.roles import Role


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


def measure(config: Config, meshes: Meshes) -> PhaseTimes:
    """Phases in the smallest bucket that holds the routing; one stage, two layers."""
    assert config.split.stages == 1 and config.model.num_layers == 2, config.split
    for bucket in buckets(config):
        bench = _PhaseBench(config, meshes, bucket)
        if bench.fits:
            return bench.measure()
    raise AssertionError("the last bucket holds everything")


class _PhaseBench:
    def __init__(self, config: Config, meshes: Meshes, bucket: Bucket):
        self.config, self.meshes, self.bucket = config, meshes, bucket
        self.g = make_geometry(config, bucket)
        self.phases = make_phases(self.g, schedule_of(config))
        self.arguments = self._arguments()
        start = self._program(self._start, 0)
        self.state, (counts, rows_needed, sorted_needed) = start(*self.arguments)
        counts = np.asarray(counts).sum(axis=0)[0]
        places = self.g.places
        self.pairs = max(
            int(counts[np.array(places.share(worker))].sum())
            for worker in range(places.num_workers)
        )
        # Tokens whose first choice is elsewhere send no shared experts here: the mean counts.
        shared = config.model.num_shared_experts * self.g.T * self.g.M // places.num_workers
        self.pairs += shared
        needed = Bucket(int(np.max(rows_needed)), int(np.max(sorted_needed)))
        self.fits = needed.rows <= bucket.rows and needed.sorted_rows <= bucket.sorted_rows

    def measure(self) -> PhaseTimes:
        figures = {}
        for direction in ("forward", "backward"):
            program = self._program(getattr(self, f"_{direction}"), 3)
            for role in Role:
                name = f"{role.label}_{direction}"
                figures[name] = time_iterations(
                    name,
                    lambda count, program=program, role=role: program(
                        *self.arguments, self.state, jnp.int32(role), jnp.int32(count)
                    ),
                )
        figures["loss"] = time_calls("loss", loss_call(self.g))
        return PhaseTimes(self.bucket, self.pairs, figures)

    def _arguments(self):
        """(rows, vocabulary, router bias, batch): random weights, which route evenly."""
        g, model = self.g, self.config.model
        devices = g.placement.num_devices
        num_rows = -(-model.vocab_size // devices) * devices
        columns = self.phases.layouts.num_columns(Role.ATTENTION)

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

    def _program(self, function, num_states: int):
        """A jitted program of all workers; `num_states`: arguments behind those of the pipeline.

        The first of them and the results are per worker, with a leading dim that is dropped here.
        """

        def run(rows, vocabulary, bias, batch, *states):
            weights = gather_weights(self.g, rows, vocabulary, bias)
            phases = self.phases.bind(
                weights, jax.tree.map(lambda x: x[0], batch), self._zeros, 1.0
            )
            local = [jax.tree.map(lambda x: x[0], state) for state in states[:1]]
            results = function(phases, *local, *states[1:])
            return jax.tree.map(lambda x: x[None], results)

        in_specs = (PER_WORKER, VOCABULARY_SPECS, EVERYWHERE, PER_WORKER)
        in_specs += (PER_WORKER, PartitionSpec(), PartitionSpec())[:num_states]
        return jax.jit(
            jax.shard_map(
                run, mesh=self.meshes.union, in_specs=in_specs, out_specs=PER_WORKER,
                check_vma=False,
            )
        )  # fmt: skip

    @property
    def _zeros(self):
        return jnp.zeros((2,), self.g.wide_dtype)

    def _entry(self, phases, role, layer_row) -> Entry:
        plays = jnp.where(phases.me.plays[Role.ATTENTION], Role.ATTENTION, Role.EXPERT) == role
        return Entry(jnp.where(plays, 0, IDLE), layer_row, jnp.int32(0))

    def _start(self, phases):
        """((message and cotangent to take in, stash), needs): one layer forward in both roles."""
        outbox, _ = phases.empty_boxes()
        stash, stats = phases.pool.zeros(), phases.zero_stats()
        for role in Role:
            inbox = phases.transport.send_forward(outbox)
            entry = self._entry(phases, role, jnp.int32(0))
            outbox, stash, stats = phases.forward(inbox, entry, stash, stats)
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

    def _forward(self, phases, state, role, count):
        inbox, _, stash = state

        def phase(index, carry):
            _, stash, stats = carry
            return phases.forward(inbox, self._entry(phases, role, index % 2), stash, stats)

        carry = (jnp.zeros_like(inbox), stash, phases.zero_stats())
        outbox, stash, stats = lax.fori_loop(0, count, phase, carry)
        return outbox[:, :1], stash[:1], stats.sorted_needed

    def _backward(self, phases, state, role, count):
        _, cotangent, stash = state

        def phase(index, carry):
            _, grads = carry
            return phases.backward(cotangent, self._entry(phases, role, index % 2), stash, grads)

        carry = (jnp.zeros_like(cotangent), phases.zero_grads())
        outbox, grads = lax.fori_loop(0, count, phase, carry)
        return outbox[:, :1], grads.rows[:, :1], grads.embedding[:1]
