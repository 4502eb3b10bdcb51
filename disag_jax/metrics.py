"""Metrics of a run: means over the steps between two log records."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from disag_jax.config import Config
from disag_jax.flops import flops_per_device, peak_flops
from mesh.placement import ExpertPlaces, Meshes

MEANS = (
    "loss", "total_loss", "balance_loss", "z_loss", "gradient_norm", "gradient_norm_attention",
    "gradient_norm_expert", "gradient_norm_vocabulary", "learning_rate",
)  # fmt: skip

# Parts of a step's time that are measured; the rest is the host's.
PARTS = ("input_wait_seconds", "pipeline_seconds", "update_seconds")


class StepMeter:
    """Collects the metrics of steps and makes a log record of them."""

    def __init__(self, config: Config, meshes: Meshes):
        self._config, self._meshes = config, meshes
        self._places = ExpertPlaces(config.model.num_experts, config.split.expert_workers)
        self._peak_flops = peak_flops(config, meshes.union.devices.flat[0].device_kind)
        self._steps = []

    def add(self, metrics: dict):
        """Takes one step's metrics: those of `Stepper.train_step`, step and input wait seconds."""
        self._steps.append(metrics)

    @property
    def is_empty(self) -> bool:
        """Whether there was no step since the last record."""
        return not self._steps

    def record(self, step: int) -> dict:
        """What the steps since the last record did, after which a new one begins.

        A skipped step, which has bad numbers, is not among them.

        Means over the steps:
          loss, balance_loss, z_loss, total_loss, learning_rate, gradient_norm and
          gradient_norm_<role>, the last before clipping.

        Speed, of the steps that did not compile a program (of all if there is no other):
          step_seconds: from the end of a step to the end of the next, without the time spent on
            checkpoints and evaluations. It is the sum of
          input_wait_seconds: for the batch.
          pipeline_seconds: for the pipeline program, from its call to its metrics on the host.
          update_seconds: what the update programs add: their calls, and what was still running of
            the last step's after the next pipeline program had been queued behind it. The part
            of an update that hides under the host's work is in that work's time.
          host_seconds: the rest, such as writing these records.
          tokens_per_second, tflops_per_device (model FLOPs, disag_jax/flops.py), and mfu, their
            share of the peak, if that is known.
          compile_seconds: the whole time of the steps that did compile, if there were any.

        Load, per layer:
          expert_load, expert_load_p95: tokens of the largest and of the 95th-percentile expert
            over the mean expert's, in a step.
          imbalance_cost: see `imbalance_cost`.
          dead_experts: experts without a token in all of the steps.
          dropped_pairs: (token, expert) pairs that capacity_factor dropped, summed.

        bucket_reruns: runs repeated because a message overflowed its transport bucket; bucket_rows:
        rows per slot of the last step's bucket. peak_memory_gib: of each worker, the most that it
        has held since the start, if the backend says so.

        All processes make their records together: they tell each other what their workers hold.
        """
        steps, self._steps = self._steps, []
        record = {
            "step": step,
            **{name: _mean(steps, name) for name in MEANS},
            **self._speed(steps),
            **self._load(np.stack([m["expert_counts"] for m in steps])),
            "dropped_pairs": np.sum([m["dropped_pairs"] for m in steps], axis=0).tolist(),
            "bucket_reruns": sum(m["bucket_reruns"] for m in steps),
            "bucket_rows": steps[-1]["bucket"].rows,
        }
        memory = peak_memory(self._meshes)
        return record | ({"peak_memory_gib": memory} if memory else {})

    def _speed(self, steps: list[dict]) -> dict:
        compiling = [m for m in steps if m["compiled"]]
        timed = [m for m in steps if not m["compiled"]] or compiling
        seconds = {name: _mean(timed, name) for name in ("step_seconds", *PARTS)}
        tokens_per_second = self._config.tokens_per_step / seconds["step_seconds"]
        flops = flops_per_device(self._config, tokens_per_second)
        speed = {
            **seconds,
            "host_seconds": seconds["step_seconds"] - sum(seconds[name] for name in PARTS),
            "tokens_per_second": tokens_per_second,
            "tflops_per_device": flops / 1e12,
        }
        if self._peak_flops is not None:
            speed["mfu"] = flops / self._peak_flops
        if compiling:
            speed["compile_seconds"] = sum(m["step_seconds"] for m in compiling)
        return speed

    def _load(self, counts_NLE) -> dict:
        """Expert load of N steps."""
        load_NLE = counts_NLE / counts_NLE.mean(axis=2, keepdims=True)
        costs_NL = [imbalance_cost(counts_LE, self._places) for counts_LE in counts_NLE]
        return {
            "expert_load": load_NLE.max(axis=2).mean(axis=0).tolist(),
            "expert_load_p95": np.percentile(load_NLE, 95, axis=2).mean(axis=0).tolist(),
            "imbalance_cost": np.mean(costs_NL, axis=0).tolist(),
            "dead_experts": (counts_NLE.sum(axis=0) == 0).sum(axis=1).tolist(),
        }


def imbalance_cost(counts_LE, places: ExpertPlaces):
    """Extra expert-worker time of each layer because some workers have more to do than others, [L].

    0.25 means that the layer's experts take a quarter longer than with an even load: the chosen
    (token, expert) pairs of the busiest worker over the mean worker's, minus 1. It takes time to be
    proportional to pairs, and all workers to wait for the busiest. It sees sums over a step only:
    loads that are uneven in a micro-batch and even out over the step cost more than it says. Shared
    experts do not count; pairs that capacity_factor dropped do.
    """
    worker_E = places.expert_places() // places.per_worker
    is_held_EN = worker_E[:, None] == np.arange(places.num_workers)
    pairs_LN = counts_LE @ is_held_EN
    return pairs_LN.max(axis=1) / pairs_LN.mean(axis=1) - 1


def peak_memory(meshes: Meshes) -> dict[str, float]:
    """The most GiB held so far by each worker; empty if the backend keeps no count.

    Workers are called "replica0_stage1_expert2", co-located "replica0_stage1_worker2". Every
    process must call it at the same time, and each knows its own devices only.
    """
    devices = meshes.union.devices
    peaks = np.full(devices.shape, -1.0)
    for index, device in np.ndenumerate(devices):
        is_here = device.process_index == jax.process_index()
        stats = device.memory_stats() if is_here else None
        if stats and "peak_bytes_in_use" in stats:
            peaks[index] = stats["peak_bytes_in_use"] / 2**30
    if jax.process_count() > 1:
        peaks = np.max(multihost_utils.process_allgather(peaks), axis=0)
    return {
        f"replica{replica}_{meshes.placement.name_of(worker)}": float(peak)
        for (replica, worker), peak in np.ndenumerate(peaks)
        if peak >= 0
    }


def _mean(steps: list[dict], name: str) -> float:
    return float(np.mean([m[name] for m in steps]))
