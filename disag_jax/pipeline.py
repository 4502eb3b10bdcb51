"""AF-Pipe: the jitted loop in which attention and expert workers run side by side.

One period of the loop (hop 1):

    backward messages in flight  ||  forward phase:  attention or expert unit, or idle
    forward messages in flight   ||  backward phase: attention' or expert' unit, or idle; loss

The transfer of what one phase made has no data dependence on the other phase, so XLA runs it
underneath. With hop 2 both transfers have the whole period. What each worker does in each period is
a table (disag_jax/schedule.py) over which up to three `lax.scan`s run: warm-up, steady, cool-down.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from disag_jax.batches import Batch
from disag_jax.colocated import ColocatedPhases
from disag_jax.config import Overlap
from disag_jax.disaggregated import DisaggregatedPhases
from disag_jax.geometry import Geometry
from disag_jax.interleaved import InterleavedPhases
from disag_jax.phases import Entry, Grads, Phases, Stats
from disag_jax.reduction import (
    gather_weights,
    reduce_grads,
    reduce_stats,
    sums_rows_early,
)
from disag_jax.schedule import Schedule
from layers.head import NO_LABEL
from layers.router import updated_bias
from mesh import runtime
from mesh.placement import ALL_DEVICES, Meshes, Whoami
from mesh.roles import Role

PER_WORKER = PartitionSpec(ALL_DEVICES)
EVERYWHERE = PartitionSpec()
VOCABULARY_SPECS = {"embedding": PER_WORKER, "final_norm": EVERYWHERE, "head": PER_WORKER}


class Carry(NamedTuple):
    """State of the loop on one worker; boxes are words [R, ...].

    Co-located, hidden states take the place of boxes.

    inbox_f, outbox_f: forward messages received and made; inbox_b, outbox_b: backward ones. With
    hop 1 outbox_f was sent already and is only memory for the next message, and inbox_b, which does
    not outlive a period, is None.
    """

    inbox_f: jax.Array
    outbox_f: jax.Array
    inbox_b: jax.Array | None
    outbox_b: jax.Array
    stash: jax.Array
    grads: Grads | None
    stats: Stats


class Loop:
    """Runs a schedule on the executing worker."""

    def __init__(self, phases: Phases, schedule: Schedule):
        self.phases, self.schedule = phases, schedule
        self.transport = phases.transport

    def run(self, *, with_gradients: bool) -> Carry:
        """Executes every period of the schedule."""
        schedule = self.schedule
        tables = (schedule.forward, schedule.backward, schedule.loss)
        carry = self._start(with_gradients)
        for segment in schedule.segments:
            begin, end, forward, backward = segment
            rows = jax.tree.map(lambda table, b=begin, e=end: jnp.asarray(table[b:e]), tables)

            def period(carry, row, forward=forward, backward=backward):
                return self._period(carry, row, forward, backward), None

            # The name by which a trace tells the loops apart (disag_jax/measured_timeline.py).
            with jax.named_scope(segment.name):
                carry, _ = lax.scan(period, carry, rows)
        return carry

    def _start(self, with_gradients: bool) -> Carry:
        phases = self.phases
        message, cotangent = phases.empty_boxes()
        two_hops = self.schedule.hop == 2
        return Carry(
            inbox_f=message,
            outbox_f=message,
            inbox_b=cotangent if two_hops else None,
            outbox_b=cotangent,
            stash=phases.pool.zeros(),
            grads=phases.zero_grads() if with_gradients else None,
            stats=phases.zero_stats(),
        )

    def _period(self, carry: Carry, row, forward: bool, backward: bool) -> Carry:
        """One period; `forward` and `backward` say which phases this segment has."""
        if self.schedule.hop == 2:
            return self._period_of_two_hops(carry, row, forward, backward)
        # An evaluation has losses, and no backward units, in its backward phases.
        both = forward and backward and carry.grads is not None
        if both and isinstance(self.phases, InterleavedPhases):
            return self._interleaved_period(carry, row)
        inbox_b = self._send_backward(carry.outbox_b) if backward else None
        after = carry
        if forward:
            outbox_f, after = self._forward_phase(carry.inbox_f, carry.outbox_f, row, after)
            after = after._replace(outbox_f=outbox_f, inbox_f=self._send_forward(outbox_f))
        if backward:
            run = self.phases.backward
            if not forward and sums_rows_early(self.phases.geometry.config):
                run = self.phases.cool_down
            boxes = (inbox_b, carry.outbox_b)
            outbox_b, after = self._backward_phase(boxes, carry.inbox_f, row, after, run)
            after = after._replace(outbox_b=outbox_b)
        return after

    def _interleaved_period(self, carry: Carry, row) -> Carry:
        forward, backward, _ = row
        outbox_f, outbox_b, stash, stats, grads = self.phases.forward_and_backward(
            carry.inbox_f,
            self._send_backward(carry.outbox_b),
            self._entry(forward),
            self._entry(backward),
            carry.stash,
            carry.stats,
            carry.grads,
        )
        after = carry._replace(
            inbox_f=self._send_forward(outbox_f), stash=stash, stats=stats, grads=grads
        )
        outbox_b, after = self._loss(carry.inbox_f, outbox_b, row, after)
        return after._replace(outbox_b=outbox_b)

    def _period_of_two_hops(self, carry: Carry, row, forward: bool, backward: bool) -> Carry:
        # The last forward message is still under way when the cool-down begins.
        after = carry._replace(inbox_f=self._send_forward(carry.outbox_f))
        # What was made before is under way now: the next messages need memory of their own.
        if forward:
            outbox_f = jnp.zeros_like(carry.outbox_f)
            outbox_f, after = self._forward_phase(carry.inbox_f, outbox_f, row, after)
            after = after._replace(outbox_f=outbox_f)
        if backward:
            after = after._replace(inbox_b=self._send_backward(carry.outbox_b))
            boxes = (carry.inbox_b, jnp.zeros_like(carry.outbox_b))
            outbox_b, after = self._backward_phase(
                boxes, carry.inbox_f, row, after, self.phases.backward
            )
            after = after._replace(outbox_b=outbox_b)
        return after

    def _forward_phase(self, inbox_f, outbox_f, row, carry: Carry):
        forward, _, _ = row
        outbox_f, stash, stats = self.phases.forward(
            inbox_f, outbox_f, self._entry(forward), carry.stash, carry.stats
        )
        return outbox_f, carry._replace(stash=stash, stats=stats)

    def _backward_phase(self, boxes, inbox_f, row, carry: Carry, run):
        """The backward unit and the loss, or only the loss when no gradients are wanted.

        boxes: what arrived, and memory for what is made; run: the phases' method for the unit.
        """
        _, backward, loss = row
        if carry.grads is None:
            stats = self.phases.loss_forward(inbox_f, loss, carry.stats)
            return carry.outbox_b, carry._replace(stats=stats)
        outbox_b, grads = run(*boxes, self._entry(backward), carry.stash, carry.grads)
        return self._loss(inbox_f, outbox_b, row, carry._replace(grads=grads))

    def _loss(self, inbox_f, outbox_b, row, carry: Carry):
        """Adds the loss that is due, of the last hidden states in `inbox_f`."""
        _, _, loss = row
        if self.phases.shared_loss.helpers:
            # Transfers end before the loss, whose own permutes would otherwise make XLA's scheduler
            # begin them only after it, under nothing. One without permutes hides them.
            in_flight = (carry.inbox_f, carry.inbox_b)
            outbox_b, in_flight = lax.optimization_barrier((outbox_b, in_flight))
            carry = carry._replace(inbox_f=in_flight[0], inbox_b=in_flight[1])
        outbox_b, grads, stats = self.phases.loss_backward(
            inbox_f, loss, outbox_b, carry.grads, carry.stats
        )
        return outbox_b, carry._replace(grads=grads, stats=stats)

    def _send_forward(self, words):
        with jax.named_scope("m2n_forward"):
            return self.transport.send_forward(words)

    def _send_backward(self, words):
        with jax.named_scope("m2n_backward"):
            return self.transport.send_backward(words)

    def _entry(self, table) -> Entry:
        """This worker's row of one period's table [p, role, 3]."""
        me = self.phases.me
        # Co-located roles have equal tables.
        role = jnp.where(me.plays[Role.ATTENTION], int(Role.ATTENTION), int(Role.EXPERT))
        return Entry(*table[me.stage, role])


def make_phases(geometry: Geometry, schedule: Schedule) -> Phases:
    """The phases of the placement, and of what the twin overlaps."""
    kind = ColocatedPhases if geometry.placement.colocated else DisaggregatedPhases
    if geometry.config.split.overlap is Overlap.INTERLEAVED:
        kind = InterleavedPhases
    return kind(geometry, schedule)


def gradient_program(geometry: Geometry, meshes: Meshes, schedule: Schedule):
    """The jitted training pipeline.

    Returns a function of
      rows: [W, v, P] (co-located, a dict of each role's), compute type;
      vocabulary: embedding, head [V', D], final_norm [D], compute type;
      router_bias: [L, E];
      batch: leaves int32 [W, K, B, S], sequences of each attention worker, zeros on the others;
      buffers: (row gradients, vocabulary gradients) of an earlier step, donated: this step's are
        made in their place, and gradients never move;
    that returns
      row gradients like rows, vocabulary gradients, next router bias, and the step's metrics, on
      every device alike (disag_jax/reduction.py). All are sums over the whole step.
    """
    model = geometry.config.model

    def training_pipeline(rows, vocabulary, router_bias, batch, buffers):
        del buffers  # their memory is the outputs'
        weights = gather_weights(geometry, rows, vocabulary, router_bias)
        phases, carry, metrics = _run(geometry, schedule, weights, batch, with_gradients=True)
        row_grads, vocabulary_grads, norms = reduce_grads(geometry, phases.layouts, carry.grads)
        bias = router_bias
        if model.bias_update_rate:
            bias = updated_bias(bias, metrics["expert_counts"], model.bias_update_rate)
        return row_grads, vocabulary_grads, bias, metrics | norms

    gradients = (PER_WORKER, VOCABULARY_SPECS)
    outputs = (*gradients, EVERYWHERE, EVERYWHERE)
    return _jit_on_union(training_pipeline, meshes, schedule, outputs, buffers=(gradients,))


def evaluation_program(geometry: Geometry, meshes: Meshes, schedule: Schedule):
    """The jitted forward-only pipeline: as `gradient_program`, but returns the metrics alone."""

    def evaluation_pipeline(rows, vocabulary, router_bias, batch):
        weights = gather_weights(geometry, rows, vocabulary, router_bias)
        return _run(geometry, schedule, weights, batch, with_gradients=False)[-1]

    return _jit_on_union(evaluation_pipeline, meshes, schedule, EVERYWHERE)


def _run(geometry: Geometry, schedule: Schedule, weights, batch: Batch, *, with_gradients: bool):
    """Runs the loop on this worker's shard of the batch: (Phases, Carry, the step's metrics)."""
    batch = jax.tree.map(lambda leaf: leaf[0], batch)
    num_labels, loss_scale, aux_scales = _scales(geometry, batch)
    phases = make_phases(geometry, schedule).bind(weights, batch, aux_scales, loss_scale)
    carry = Loop(phases, schedule).run(with_gradients=with_gradients)
    return phases, carry, reduce_stats(geometry, carry.stats, num_labels, aux_scales)


def _jit_on_union(pipeline, meshes: Meshes, schedule: Schedule, out_specs, buffers=()):
    """A pipeline as a jitted program of all workers, from its arguments' places to its outputs'.

    buffers: specs of donated arguments after the others.
    """
    in_specs = (PER_WORKER, VOCABULARY_SPECS, EVERYWHERE, PER_WORKER)
    return jax.jit(
        jax.shard_map(
            pipeline,
            mesh=meshes.union,
            in_specs=in_specs + buffers,
            out_specs=out_specs,
            check_vma=False,
        ),
        donate_argnums=range(len(in_specs), len(in_specs + buffers)),
        keep_unused=True,
        compiler_options=compiler_options(meshes, schedule.hop),
    )


def compiler_options(meshes: Meshes, hop: int) -> dict:
    """XLA's options for a pipeline on GPUs; what the environment sets stays.

    A transfer has all its rounds under way at once: XLA's scheduler keeps one collective under way,
    and would wait for each round but the last before the phase that hides it. With more than the
    rounds it begins some within the phase.

    Nothing is computed again: XLA counts what a loop changes in place several times, and would save
    memory that is there.
    """
    placement = meshes.placement
    if meshes.union.devices.flat[0].platform != "gpu":
        return {}
    options = {runtime.PASSES_LEFT_OUT: "rematerialization"}
    if not placement.colocated:
        # With hop 2 a forward transfer is under way together with each backward one.
        options[runtime.COLLECTIVES_AT_ONCE] = placement.rounds * hop
    return {name: value for name, value in options.items() if not runtime.is_set(f"--{name}")}


def _scales(geometry: Geometry, batch: Batch):
    """(labels in the whole step, factor of each one's nll, factors of the auxiliary sums)."""
    config = geometry.config
    me = Whoami.of(geometry.placement)
    counts_here = me.plays[Role.ATTENTION] & (me.stage == 0)
    labels = jnp.sum(batch.labels != NO_LABEL, dtype=jnp.int32)
    num_labels = lax.psum(jnp.where(counts_here, labels, 0), ALL_DEVICES)
    wide = geometry.wide_dtype
    aux_scales = jnp.array(
        [
            config.model.balance_loss_weight / config.sequences_per_step,
            config.model.z_loss_weight / config.tokens_per_step,
        ],
        wide,
    )
    return num_labels, 1 / num_labels.astype(wide), aux_scales
