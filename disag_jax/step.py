"""One optimizer step: pipeline, another run if a message overflowed, update."""

import collections
import dataclasses
import functools
import math

import jax
import numpy as np
from jax.sharding import NamedSharding

from disag_jax import memory
from disag_jax import optimizer as optimizer_lib
from disag_jax.bad_numbers import count_non_finite
from disag_jax.batches import Batch, Batches
from disag_jax.config import Config, ConfigError
from disag_jax.geometry import Bucket, buckets, make_geometry
from disag_jax.pipeline import PER_WORKER, evaluation_program, gradient_program
from disag_jax.profiling import Stopwatch
from disag_jax.schedule import make_forward_schedule, schedule_of
from disag_jax.schedule_check import check
from disag_jax.state import StateManager, TrainState
from mesh.placement import Meshes
from mesh.roles import Role

# Steps whose loads decide whether a smaller bucket would do again.
BUCKET_MEMORY = 20


class BucketChooser:
    """Which transport bucket to run a step in.

    It starts with the smallest, moves up when one overflows, and down again when the last steps
    would all have fit.
    """

    def __init__(self, options: list[Bucket]):
        self.options = options
        self.current = options[0]
        self._recent = collections.deque(maxlen=BUCKET_MEMORY)

    @property
    def memory(self) -> dict:
        """What decides about the next steps, as JSON."""
        recent = [dataclasses.astuple(needed) for needed in self._recent]
        return {"current": dataclasses.astuple(self.current), "recent": recent}

    def remember(self, memory: dict):
        """Goes on as the chooser that had this `memory`; under another split it begins anew.

        ConfigError if it is the memory of no chooser.
        """
        try:
            current, recent = Bucket(*memory["current"]), [Bucket(*n) for n in memory["recent"]]
            current.holds(max(recent, default=current))  # TypeError unless these are numbers
        except (KeyError, TypeError) as error:
            raise ConfigError(f"buckets = {memory!r} of a checkpoint must be buckets") from error
        if current in self.options:
            self.current = current
            self._recent.extend(recent)

    def overflowed(self, needed: Bucket) -> bool:
        """Whether a run in the current bucket that needed this much must be repeated.

        If so the smallest bucket that is known to be large enough becomes the current one; after
        an overflow later layers saw wrong messages, so what they needed is a guess.
        """
        self._recent.append(needed)
        if self.current.holds(needed):
            return False
        larger = self.options[self.options.index(self.current) + 1 :]
        self.current = next((o for o in larger if o.holds(needed)), self.options[-1])
        return True

    def step_done(self):
        """Moves down to the smallest bucket that all of the last steps would have fit."""
        if len(self._recent) == BUCKET_MEMORY:
            enough = next(o for o in self.options if all(o.holds(n) for n in self._recent))
            self.current = min(enough, self.current)


class Stepper:
    """Runs optimizer steps and evaluations of one config on one set of meshes."""

    def __init__(self, config: Config, meshes: Meshes):
        self.config, self.meshes = config, meshes
        self.manager = StateManager(config, meshes)
        self.learning_rates = optimizer_lib.learning_rates(config)
        self.schedule = schedule_of(config)
        check(self.schedule)
        self._forward_schedule = schedule_of(config, make_forward_schedule)
        self.chooser = BucketChooser(buckets(config))
        self._compiled_programs, self._evaluation_programs = {}, {}
        self._gradients = None  # of the last step: buffers of the next one's
        self._has_updated = False

    def init(self, seed: int) -> TrainState:
        return self.manager.init(seed)

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        """Trains on one global batch, [G, S] or placed on the devices.

        Returns the next state (the old one is donated) and the step's metrics as numpy values, with
        `pipeline_seconds` and `update_seconds` (disag_jax/metrics.py), `compiled`, whether a new
        program was, and `skipped`. A step whose loss or gradient norm is not finite is skipped: the
        next state is the old one but for its step, so that the next batch is another, and
        `non_finite` says where (disag_jax/bad_numbers.py).
        """
        batch = self._placed(batch)
        watch, num_programs = Stopwatch(), len(self._compiled_programs)
        (router_bias, _), metrics = self._run_until_it_fits(
            state,
            watch,
            lambda bucket: self._run_pipeline(bucket, state, batch),
            read_metrics=lambda outputs: outputs[-1],
        )
        norm = float(metrics["gradient_norm"])
        # The norm is over all gradients: if it is finite, so are they. It is on the host, and the
        # same on all processes, so no update program ever sees a bad number.
        if not (math.isfinite(metrics["total_loss"]) and math.isfinite(norm)):
            counts = count_non_finite(self.config, self.meshes, *self._gradients)
            state = dataclasses.replace(state, step=state.step + 1)
            return state, metrics | {"skipped": True, "non_finite": counts}
        rate = float(self.learning_rates[min(state.step, len(self.learning_rates) - 1)])
        factor = optimizer_lib.clip_factor(self.config, norm)
        with watch("update"):
            state = self.manager.update(state, *self._gradients, router_bias, factor, rate)
        # The update programs compile at their first call.
        compiled = len(self._compiled_programs) > num_programs or not self._has_updated
        self._has_updated = True
        done = {"learning_rate": rate, "compiled": compiled, "skipped": False}
        return state, metrics | watch.seconds | done

    def evaluate(self, state: TrainState, batch: Batch) -> dict:
        """The metrics of one global batch, as `train_step` takes it, without training on it."""
        batch = self._placed(batch)
        _, metrics = self._run_until_it_fits(
            state,
            Stopwatch(),
            lambda bucket: self._evaluation_program(bucket)(
                state.rows, state.vocabulary, state.router_bias, batch
            ),
            read_metrics=lambda outputs: outputs,
        )
        return metrics

    def place_batch(self, batch: Batch) -> Batch:
        """Gives a global batch [G, S] to the attention workers, as `place_rows` does."""
        return self.place_rows(lambda rows: jax.tree.map(lambda leaf: leaf[rows], batch))

    def read_batch(self, batches: Batches, step: int) -> Batch:
        """Reads the batch of a step onto the devices."""
        return self.place_rows(functools.partial(batches.rows, step))

    def place_rows(self, read_rows) -> Batch:
        """A global batch on the devices, read row by row: leaves int32 [W, K, B, S].

        Row ((k * D + replica) * M + rank) * B + b is sequence b of micro-batch k on the attention
        workers of that rank, in every stage; expert workers get zeros. A process reads the rows of
        its own workers, once for all stages.

        Args:
          read_rows: function of row numbers [n] that returns the Batch [n, S] of these rows.
        """
        placement, sizes = self.meshes.placement, self.config.batch
        per_worker = (sizes.micro_batches, sizes.sequences_per_worker, sizes.sequence_length)
        numbers = np.arange(self.config.sequences_per_step).reshape(
            sizes.micro_batches, placement.replicas, placement.attention_workers, -1
        )

        @functools.cache
        def rows_of(replica, rank):
            return read_rows(numbers[:, replica, rank].reshape(-1))

        def place(field):
            def shard(index):
                replica, worker = divmod(index[0].start or 0, placement.workers)
                rank = placement.rank_of(worker, Role.ATTENTION)
                if rank is None:
                    return np.zeros((1, *per_worker), np.int32)
                return getattr(rows_of(replica, rank), field).reshape(1, *per_worker)

            return jax.make_array_from_callback(
                (placement.num_devices, *per_worker),
                NamedSharding(self.meshes.union, PER_WORKER),
                shard,
            )

        has_segments = not self.config.data.attend_across_documents
        return Batch(place("tokens"), place("labels"), place("segments") if has_segments else None)

    def _placed(self, batch: Batch) -> Batch:
        return batch if isinstance(batch.tokens, jax.Array) else self.place_batch(batch)

    def abstract_arguments(self) -> tuple:
        """Arguments of `gradient_program` as ShapeDtypeStructs with shardings.

        `stepper.gradient_program(bucket).lower(*stepper.abstract_arguments())` traces the training
        step of a model that no machine here could hold.
        """
        state, sizes = self.manager.abstract_state(), self.config.batch
        leaf = jax.ShapeDtypeStruct(
            (
                self.meshes.placement.num_devices,
                sizes.micro_batches,
                sizes.sequences_per_worker,
                sizes.sequence_length,
            ),
            np.int32,
            sharding=NamedSharding(self.meshes.union, PER_WORKER),
        )
        batch = Batch(leaf, leaf, None if self.config.data.attend_across_documents else leaf)
        return (
            state.rows, state.vocabulary, state.router_bias, batch,
            self.manager.abstract_gradients(),
        )  # fmt: skip

    def gradient_program(self, bucket: Bucket):
        """The jitted training pipeline for a bucket."""
        geometry = make_geometry(self.config, bucket)
        return gradient_program(geometry, self.meshes, self.schedule)

    def compiled_program(self, bucket: Bucket) -> jax.stages.Compiled:
        """The training pipeline for a bucket, compiled when it is first asked for."""
        if bucket not in self._compiled_programs:
            lowered = self.gradient_program(bucket).lower(*self.abstract_arguments())
            self._compiled_programs[bucket] = lowered.compile()
        return self._compiled_programs[bucket]

    def _run_pipeline(self, bucket: Bucket, state: TrainState, batch: Batch) -> tuple:
        """Leaves the step's gradients in `_gradients`; returns (next router bias, metrics)."""
        program, buffers = self.compiled_program(bucket), self._gradients
        if buffers is None:
            buffers = self.manager.zero_gradients()
        self._gradients = None  # donated
        row_grads, vocabulary_grads, router_bias, metrics = program(
            state.rows, state.vocabulary, state.router_bias, batch, buffers
        )
        self._gradients = (row_grads, vocabulary_grads)
        return router_bias, metrics

    def check_memory(self):
        """ConfigError with the bytes missing if the smallest bucket's program does not fit."""
        program = self.compiled_program(self.chooser.options[0])
        memory.check(
            memory.needed_bytes(self.manager, program), memory.available_bytes(self.meshes)
        )

    def _evaluation_program(self, bucket: Bucket):
        if bucket not in self._evaluation_programs:
            geometry = make_geometry(self.config, bucket)
            self._evaluation_programs[bucket] = evaluation_program(
                geometry, self.meshes, self._forward_schedule
            )
        return self._evaluation_programs[bucket]

    def _run_until_it_fits(self, state: TrainState, watch: Stopwatch, run, read_metrics):
        """Runs in growing buckets until no message overflows: (outputs, metrics on the host)."""
        reruns = 0
        while True:
            bucket = self.chooser.current
            with watch("pipeline"):
                outputs = run(bucket)
            with watch("update"):
                # The program is queued behind the last update: watching that end costs no time.
                state.wait()
            with watch("pipeline"):
                metrics = jax.device_get(read_metrics(outputs))
            needed = Bucket(int(metrics["rows_needed"]), int(metrics["sorted_rows_needed"]))
            if not self.chooser.overflowed(needed):
                self.chooser.step_done()
                return outputs, metrics | {"bucket_reruns": reruns, "bucket": bucket}
            reruns += 1
