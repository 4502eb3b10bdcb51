"""What a step of a config will take on some hardware: time, where it goes, memory."""

import dataclasses
import itertools
import math

import numpy as np

from disag_jax.config import Config, Dtype, Overlap
from disag_jax.errors import ConfigError
from disag_jax.flops import flops_per_device
from disag_jax.geometry import expected_load, placement_of
from disag_jax.planner import twin
from disag_jax.planner.costs import Costs
from disag_jax.planner.hardware import Hardware
from disag_jax.planner.lower_bound import lower_bound
from disag_jax.planner.memory_model import Memory, missing_bytes, predict_memory
from disag_jax.planner.simulator import PhaseSeconds, Run, Timing, simulate
from disag_jax.planner.sizes import Sizes


@dataclasses.dataclass(frozen=True)
class WorkerTime:
    """What one kind of worker does in a step, in seconds that add up to the step's.

    Attributes:
      name: such as "stage 0 attention".
      busy: units, losses, and all outside the loop but what moves data.
      exposed: `Prediction.exposed_communication`, the same for all.
      idle: the rest, waiting for the work of others.
    """

    name: str
    busy: float
    exposed: float
    idle: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A predicted step.

    Attributes:
      config, hardware: of what, on what.
      load_factor: busiest expert worker's rows over the fullest one's expected, assumed.
      step_seconds: whole optimizer step.
      outside_loop: of it, seconds outside the schedule's periods, by name.
      exposed_communication: of it, seconds that transfers free of charge would save.
      unit_seconds: of each unit, by name.
      transfers: seconds of each transfer, by name; of an all-to-all, in one piece.
      workers: where the time goes, by class of workers.
      memory: bytes, by kind of worker.
      run: the simulated clocks.
    """

    config: Config
    hardware: Hardware
    load_factor: float
    step_seconds: float
    outside_loop: dict[str, float]
    exposed_communication: float
    unit_seconds: dict[str, float]
    transfers: dict[str, float]
    workers: list[WorkerTime]
    memory: dict[str, Memory]
    run: Run

    @property
    def tokens_per_second(self) -> float:
        return self.config.tokens_per_step / self.step_seconds

    @property
    def tflops_per_device(self) -> float:
        """Model TFLOP/s (disag_jax/flops.py)."""
        return flops_per_device(self.config, self.tokens_per_second) / 1e12

    @property
    def mfu(self) -> float:
        return self.tflops_per_device / self.hardware.peak_tflops

    @property
    def fits(self) -> bool:
        return not missing_bytes(self.memory, self.hardware)


def check_predictable(config: Config):
    """ConfigError unless the config computes in bfloat16: all rates are of it."""
    dtype = config.run.compute_dtype
    if dtype is not Dtype.BFLOAT16:
        raise ConfigError(f"run.compute_dtype = {dtype} must be bfloat16 for a prediction")


def predict(config: Config, hardware: Hardware, load_factor: float | None = None) -> Prediction:
    """The step of a config, simulated.

    ConfigError if the hardware has no link that it needs, or the config's type no rates.

    load_factor: rows of the busiest expert worker over those that the fullest one, with most
      experts, is expected to have; None is what to expect of tokens that choose their experts
      independently and evenly.
    """
    check_predictable(config)
    load = assumed_load_factor(config, load_factor)
    sizes = Sizes.of(config, load)
    costs = Costs(sizes, hardware)
    run = simulate_step(costs)
    outside = costs.outside_loop
    step = total_seconds(costs, run)
    exposed = run.seconds - simulate_step(costs, free_transfers=True).seconds
    exposed += costs.gather_weights + costs.reduce_gradients
    return Prediction(
        config=config,
        hardware=hardware,
        load_factor=load,
        step_seconds=step,
        outside_loop=outside,
        exposed_communication=exposed,
        unit_seconds=costs.unit_seconds,
        transfers=_transfers(costs),
        workers=_worker_times(costs, step, exposed),
        memory=predict_memory(sizes),
        run=run,
    )


def step_seconds(config: Config, hardware: Hardware, load_factor: float | None = None) -> float:
    """`Prediction.step_seconds` alone, which takes one simulation."""
    check_predictable(config)
    costs = Costs(Sizes.of(config, assumed_load_factor(config, load_factor)), hardware)
    return total_seconds(costs, simulate_step(costs))


def total_seconds(costs: Costs, run: Run) -> float:
    """A step's seconds: the loop's, and what is around it."""
    return run.seconds + sum(costs.outside_loop.values())


def least_seconds(costs: Costs) -> float:
    """Seconds that no step of these units can undercut, without a simulation."""
    config, split = costs.config, costs.config.split
    loop = lower_bound(
        timing_of(costs), config.model.num_layers, split.stages, config.batch.micro_batches,
        split.hop, split.colocated,
    )  # fmt: skip
    return loop + sum(costs.outside_loop.values())


def assumed_load_factor(config: Config, load_factor: float | None) -> float:
    """The factor given, at most one that puts all on one worker; None is what is expected."""
    if load_factor is None:
        return expected_load_factor(config)
    return min(load_factor, config.split.expert_workers)


def expected_load_factor(config: Config) -> float:
    """Rows of the busiest expert worker over the fullest one's expected, for independent tokens.

    The expected maximum of N about normal counts is at most mean + deviation * sqrt(2 ln N); the
    deviation of a binomial count is at most the root of its mean. Real routers are less even.
    """
    workers = config.split.expert_workers
    pairs = expected_load(config)[1]
    return 1 + math.sqrt(2 * math.log(workers) / pairs)


def simulate_step(costs: Costs, *, free_transfers: bool = False, shorten: bool = True) -> Run:
    """The loop's clocks; with `free_transfers` as if moving data took no time.

    shorten: whether repeated waves may be left out (disag_jax/planner/simulator.py).
    """
    config, split = costs.config, costs.config.split
    return simulate(
        timing_of(costs, free_transfers=free_transfers),
        config.model.num_layers,
        split.stages,
        config.batch.micro_batches,
        split.hop,
        colocated=split.colocated,
        shorten=shorten,
    )


def timing_of(costs: Costs, *, free_transfers: bool = False) -> Timing:
    """What the simulator needs, by class of workers."""
    placement, units = placement_of(costs.config), costs.unit_seconds
    losses, classes = _losses(costs), _classes(costs)
    share = 0.0 if free_transfers else 1.0
    shared = dict(
        forward_transfer=share * costs.forward_transfer,
        backward_transfer=share * costs.backward_transfer,
        rounds=1 if placement.colocated else placement.rounds,
        loss=np.array([losses[one] for one in classes]),
        loss_owner=classes.index(_owner(costs)) if costs.helper_loss else None,
        loss_transfer=share * costs.loss_transfer,
    )
    if not placement.colocated:
        forward, backward = (
            np.tile([units[f"attention_{phase}"], units[f"expert_{phase}"]], placement.stages)
            for phase in ("forward", "backward")
        )
        idle_forward, idle_backward = (np.full(len(forward), s) for s in costs.box_copies)
        forward, backward = forward + idle_forward, backward + idle_backward
        return Timing(forward, backward, idle_forward, idle_backward, **shared)

    def of_stages(phases: PhaseSeconds) -> PhaseSeconds:
        return PhaseSeconds(*(np.full(placement.stages, seconds) for seconds in phases))

    in_turns = costs.config.split.overlap is Overlap.INTERLEAVED
    return Timing(
        *of_stages(twin.alone(costs, share)),
        **shared,
        interleaved=of_stages(twin.interleaved(costs, share)) if in_turns else None,
        cool_down=of_stages(twin.cool_down(costs, share)),
    )


def _classes(costs: Costs) -> list[tuple[int, str]]:
    """(stage, kind) of the simulator's classes of workers, in its order."""
    split = costs.config.split
    kinds = ("worker",) if split.colocated else ("attention", "expert")
    return list(itertools.product(range(split.stages), kinds))


def _owner(costs: Costs) -> tuple[int, str]:
    """The class whose workers own the losses."""
    split = costs.config.split
    kind = "worker" if split.colocated else "attention"
    return costs.config.model.num_layers % split.stages, kind


def _losses(costs: Costs) -> dict[tuple[int, str], float]:
    """Seconds of the tokens of a micro-batch's loss that a worker of each class computes."""
    found = dict.fromkeys(_classes(costs), costs.helper_loss)
    return found | {_owner(costs): costs.unit_seconds["loss"]}


def _transfers(costs: Costs) -> dict[str, float]:
    if costs.config.split.colocated:
        forward, backward = (twin.exchange(costs, unit).of_chunk(1) for unit in twin.EXPERT_UNITS)
        found = {
            "all-to-all forward": forward,
            "all-to-all backward": backward,
            "to the next stage": costs.forward_transfer,
        }
    else:
        found = {
            "many-to-many forward": costs.forward_transfer,
            "many-to-many backward": costs.backward_transfer,
        }
    return found | {"loss tokens": 2 * costs.loss_transfer}


def _worker_times(costs: Costs, step: float, exposed: float) -> list[WorkerTime]:
    config, split, units = costs.config, costs.config.split, costs.unit_seconds
    layer = {
        role: units[f"{role}_forward"] + units[f"{role}_backward"]
        for role in ("attention", "expert")
    }
    if split.colocated:
        regroup = costs.regroup_seconds(split.forward_chunks, split.backward_chunks)
        layer = {"worker": sum(layer.values()) + regroup}
    outside = costs.gradient_passes + costs.update + 1e-3 * costs.hardware.host_milliseconds
    times, losses = [], _losses(costs)
    for stage in range(split.stages):
        num_layers = len(range(stage, config.model.num_layers, split.stages))
        for kind, seconds in layer.items():
            work = config.batch.micro_batches * (num_layers * seconds + losses[stage, kind])
            busy = work + outside
            times.append(WorkerTime(f"stage {stage} {kind}", busy, exposed, step - busy - exposed))
    return times
