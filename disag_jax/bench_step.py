"""Time of an optimizer step against its work bound.

The work bound is what the slower role computes, and nothing else: the larger over the roles of
K * v * (forward + backward) + its part of the losses, over 1 - idle share, from the units' times
on one device of the same machine. Transfers, reductions, the optimizer and imbalance are not in it.
A GPU that computes all the time is slower than one that is timed for a moment, by what its power
allows: of GPUs there is a bound of units under load too. That one is an estimate: a unit has the
clock that its own work leaves, and in a step that of all of them.
"""

import dataclasses
import time

import jax

from disag_jax.bench_units import measure_rates, measure_units
from disag_jax.config import Config
from disag_jax.errors import RunError
from disag_jax.flops import flops_per_device
from disag_jax.geometry import placement_of
from disag_jax.inputs import load_inputs
from disag_jax.metrics import peak_memory
from disag_jax.shared_loss import tokens_of_workers
from disag_jax.step import Stepper
from disag_jax.timing import Figure, figure_of
from disag_jax.training import make_meshes

WARM_UP, STEPS = 2, 8


class NothingTimed(RunError):
    """A run none of whose steps tells how long steps take."""


def measure(config: Config) -> list[Figure]:
    """The rates and the units, then steps on the config's text with the optimizer included."""
    meshes = make_meshes(config)  # refuses wrong devices before anything is timed
    rates, rate_figures = measure_rates(config)
    units = measure_units(config, rates)
    stepper = Stepper(config, meshes)
    stepper.check_memory()
    as_in_training, alone = WARM_UP + STEPS, WARM_UP + 2 * STEPS
    times, metrics = run_steps(stepper, alone, waits=lambda step: step >= as_in_training)
    whole, waiting = slice(WARM_UP, as_in_training), slice(as_in_training, alone)
    updates = [t - of_step["pipeline_seconds"] for t, of_step in zip(times, metrics, strict=True)]
    idle_share = stepper.schedule.idle_share
    bound, loaded = (
        work_bound(config, idle_share, found) for found in (units, [under_load(u) for u in units])
    )
    timed = without_compiling(times[whole], metrics[whole])
    step = figure_of("step", timed, floor_milliseconds=bound)
    rate = config.tokens_per_step / (step.milliseconds / 1e3)
    flops = flops_per_device(config, rate)
    speed = {"tokens/s": f"{rate:,.0f}", "rate": f"{flops / 1e12:.3g} TFLOP/s a device"}
    if loaded != bound:
        share = f"{loaded / step.milliseconds:.0%}"
        speed["bound of units under load"] = f"{loaded:.1f} ms, {share}"
    peaks = peak_memory(stepper.meshes).items()
    memory = {f"peak of {worker}": f"{peak:.1f} GiB" for worker, peak in peaks}
    return [
        *rate_figures,
        *units,
        dataclasses.replace(step, extra=speed | memory),
        figure_of("update alone", without_compiling(updates[waiting], metrics[waiting])),
    ]


def under_load(unit: Figure) -> Figure:
    """The unit with its time under load for its time, where there is one that is longer."""
    longest = max(unit.milliseconds, unit.loaded_milliseconds or 0.0)
    return dataclasses.replace(unit, milliseconds=longest)


def run_steps(
    stepper: Stepper, num_steps: int, *, waits=lambda step: False
) -> tuple[list[float], list[dict]]:
    """Trains from a fresh state on the config's text: (seconds, metrics) of each step.

    As in training a step begins when the last one's update is queued, and that is in its seconds;
    all input is there before.

    waits: function of a step's number; where it is true, the step ends with its update.
    """
    config, seconds, metrics = stepper.config, [], []
    source, state = load_inputs(config).train, stepper.init(config.run.seed)
    batches = jax.block_until_ready([stepper.read_batch(source, i) for i in range(num_steps)])
    for step, batch in enumerate(batches):
        began = time.perf_counter()
        state, of_step = stepper.train_step(state, batch)
        if waits(step):
            state.wait()
        seconds.append(time.perf_counter() - began)
        metrics.append(of_step)
    return seconds, metrics


def without_compiling(values: list[float], metrics: list[dict]) -> list[float]:
    """The values of those steps that compiled no program; NothingTimed if each did."""
    kept = [v for v, of_step in zip(values, metrics, strict=True) if not of_step["compiled"]]
    if not kept:
        raise NothingTimed(
            f"each of the {len(values)} steps to be timed compiled a program for another bucket: "
            "split.bucket_factors = () has one"
        )
    return kept


def work_bound(config: Config, idle_share: float, units: list[Figure]) -> float:
    """Milliseconds of a step that nothing but the slower role's units take."""
    ms = {figure.name: figure.milliseconds for figure in units}
    attention, expert = (
        config.layers_per_stage * (ms[f"{role} forward"] + ms[f"{role} backward"])
        for role in ("attention", "expert")
    )
    own, _, tokens = tokens_of_workers(
        config.batch.tokens_per_worker, config.split.loss_share, placement_of(config)
    )
    loss = ms["loss, share of a worker"]  # of an owner, which is an attention worker
    helping = loss * tokens / own
    if config.split.colocated:
        work = attention + expert + max(loss, helping)
    else:
        work = max(attention + loss, expert + helping)
    return config.batch.micro_batches * work / (1 - idle_share)
