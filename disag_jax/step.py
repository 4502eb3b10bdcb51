"""One optimizer step: pipeline, another run if a message overflowed, update."""

import collections
import math

import jax
import numpy as np
from jax.sharding import NamedSharding

from disag_jax import optimizer as optimizer_lib
from disag_jax.config import Config
from disag_jax.geometry import Bucket, buckets, make_geometry
from disag_jax.pipeline import PER_WORKER, evaluation_program, gradient_program
from disag_jax.profiling import Stopwatch
from disag_jax.schedule import make_forward_schedule, make_schedule
from disag_jax.state import StateManager, TrainState
from mesh.placement import Meshes
from mesh.roles import Role

# Steps whose loads decide whether a smaller bucket would do again.
BUCKET_MEMORY = 20


class NonFiniteLossError(ArithmeticError):
    """The loss or the gradient norm of a step is not a finite number; the state is unchanged."""


class BucketChooser:
    """Which transport bucket to run a step in.

    It starts with the smallest, moves up when one overflows, and down again when the last steps
    would all have fit.
    """

    def __init__(self, options: list[Bucket]):
        self.options = options
        self.current = options[0]
        self._recent = collections.deque(maxlen=BUCKET_MEMORY)

    def overflowed(self, needed: Bucket) -> bool:
        """Whether a run in the current bucket that needed this much must be repeated.

        If so the smallest bucket that is known to be large enough becomes the current one; after
        an overflow later layers saw wrong messages, so what they needed is a guess.
        """
        self._recent.append(needed)
        if _fits(needed, self.current):
            return False
        larger = self.options[self.options.index(self.current) + 1 :]
        self.current = next((o for o in larger if _fits(needed, o)), self.options[-1])
        return True

    def step_done(self):
        """Moves down to the smallest bucket that all of the last steps would have fit."""
        if len(self._recent) == BUCKET_MEMORY:
            enough = next(o for o in self.options if all(_fits(n, o) for n in self._recent))
            self.current = min(enough, self.current)


def _fits(needed: Bucket, bucket: Bucket) -> bool:
    return needed.rows <= bucket.rows and needed.sorted_rows <= bucket.sorted_rows


class Stepper:
    """Runs optimizer steps and evaluations of one config on one set of meshes."""

    def __init__(self, config: Config, meshes: Meshes):
        self.config, self.meshes = config, meshes
        self.manager = StateManager(config, meshes)
        self.learning_rate = optimizer_lib.learning_rate(config)
        sizes = (config.model.num_layers, config.split.stages, config.batch.micro_batches)
        self.schedule = make_schedule(*sizes, config.split.hop)
        self._forward_schedule = make_forward_schedule(*sizes, config.split.hop)
        self.chooser = BucketChooser(buckets(config))
        self._gradient_programs, self._evaluation_programs = {}, {}

    def init(self, seed: int) -> TrainState:
        return self.manager.init(seed)

    def train_step(self, state: TrainState, sequences) -> tuple[TrainState, dict]:
        """Trains on one global batch of sequences, int32 [G, S + 1].

        Returns the next state (the old one is donated) and the step's metrics as numpy values, with
        `pipeline_seconds` and `update_seconds` (disag_jax/metrics.py) and `compiled`, whether a new
        program was. Raises NonFiniteLossError, with the state untouched.
        """
        watch, num_programs = Stopwatch(), len(self._gradient_programs)
        outputs, metrics = self._run_until_it_fits(
            state,
            watch,
            lambda bucket: self.gradient_program(bucket)(
                state.rows, state.vocabulary, state.router_bias, self.place_batch(sequences)
            ),
            read_metrics=lambda outputs: outputs[-1],
        )
        row_grads, vocabulary_grads, router_bias, _ = outputs
        norm = float(metrics["gradient_norm"])
        if not (math.isfinite(metrics["total_loss"]) and math.isfinite(norm)):
            raise NonFiniteLossError(
                f"step {state.step}: loss = {metrics['total_loss']}, gradient norm = {norm}"
            )
        rate = float(self.learning_rate(state.step))
        factor = optimizer_lib.clip_factor(self.config, norm)
        del outputs  # the update donates the gradients' buffers under these names
        with watch("update"):
            state = self.manager.update(
                state, row_grads, vocabulary_grads, router_bias, factor, rate
            )
        compiled = len(self._gradient_programs) > num_programs
        return state, metrics | watch.seconds | {"learning_rate": rate, "compiled": compiled}

    def evaluate(self, state: TrainState, sequences) -> dict:
        """The metrics of one global batch without training on it."""
        _, metrics = self._run_until_it_fits(
            state,
            Stopwatch(),
            lambda bucket: self._evaluation_program(bucket)(
                state.rows, state.vocabulary, state.router_bias, self.place_batch(sequences)
            ),
            read_metrics=lambda outputs: outputs,
        )
        return metrics

    def place_batch(self, sequences) -> jax.Array:
        """Gives sequences [G, S + 1] to the attention workers: int32 [W, K, B, S + 1].

        Sequence ((k * D + replica) * M + rank) * B + b is number b of micro-batch k on the
        attention workers of that rank, in every stage; expert workers get zeros.
        """
        placement, batch = self.meshes.placement, self.config.batch
        per_worker = (batch.micro_batches, batch.sequences_per_worker, batch.sequence_length + 1)
        grid = np.asarray(sequences, np.int32).reshape(
            batch.micro_batches, placement.replicas, placement.attention_workers, *per_worker[1:]
        )

        def shard(index):
            replica, worker = divmod(index[0].start or 0, placement.workers)
            _, role, rank = placement.describe(worker)
            if role is Role.EXPERT:
                return np.zeros((1, *per_worker), np.int32)
            return grid[None, :, replica, rank]

        return jax.make_array_from_callback(
            (placement.num_devices, *per_worker),
            NamedSharding(self.meshes.union, PER_WORKER),
            shard,
        )

    def abstract_arguments(self) -> tuple:
        """Arguments of `gradient_program` as ShapeDtypeStructs with shardings.

        `stepper.gradient_program(bucket).lower(*stepper.abstract_arguments())` traces the training
        step of a model that no machine here could hold.
        """
        state, batch = self.manager.abstract_state(), self.config.batch
        batch = jax.ShapeDtypeStruct(
            (
                self.meshes.placement.num_devices,
                batch.micro_batches,
                batch.sequences_per_worker,
                batch.sequence_length + 1,
            ),
            np.int32,
            sharding=NamedSharding(self.meshes.union, PER_WORKER),
        )
        return state.rows, state.vocabulary, state.router_bias, batch

    def gradient_program(self, bucket: Bucket):
        """The jitted training pipeline for a bucket, compiled at its first call."""
        if bucket not in self._gradient_programs:
            geometry = make_geometry(self.config, bucket)
            self._gradient_programs[bucket] = gradient_program(geometry, self.meshes, self.schedule)
        return self._gradient_programs[bucket]

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
