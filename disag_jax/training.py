"""The training run, act by act: devices, input, state, report, loop, held-out evaluation."""

import functools
import math
import pathlib
import time

import jax
import numpy as np

from disag_jax import auto_placement, measured_timeline, processes, startup_report
from disag_jax.bad_numbers import SkippedSteps
from disag_jax.checkpoint import Checkpoints
from disag_jax.config import Config, ConfigError, Dtype
from disag_jax.display import make_display
from disag_jax.geometry import enable_float64, placement_of
from disag_jax.inputs import Inputs, Prefetch, load_inputs
from disag_jax.metrics import StepMeter
from disag_jax.metrics_log import MetricsLog
from disag_jax.outputs import Outputs
from disag_jax.planner.hardware import load
from disag_jax.planner.prediction import Prediction, predict
from disag_jax.preemption import StopRequest
from disag_jax.profiling import Profiler, Stopwatch
from disag_jax.saved_checkpoint import saved_steps
from disag_jax.state import TrainState
from disag_jax.step import Stepper
from disag_jax.stragglers import Stragglers
from disag_jax.watchdog import Watchdog
from disag_jax.workdir import Workdir
from mesh.placement import Meshes

NO_ACCELERATOR = "no accelerator was found, and --cpu_devices simulates devices"


def train(
    config: Config,
    workdir: str,
    *,
    resume: bool = False,
    step: int | None = None,
    stop_after: int | None = None,
    profile_steps: range | None = None,
    hardware: str | None = None,
) -> dict | None:
    """Runs the experiment and returns the last evaluation's results.

    Results go to `workdir`: config.json, metrics.jsonl, checkpoints/. With `resume` it goes on from
    the checkpoint there of `step`, or from the last, or begins again if there is none yet. On
    SIGTERM, or after the step `stop_after`, it saves and returns None.

    Raises ConfigError for the user's mistakes, before anything is compiled, and RunError when it
    cannot go on, such as NonFiniteLossError when training diverges. When another process is lost
    or stuck it ends this one (disag_jax/watchdog.py).

    hardware: what the planner plans for where split.placement is auto, and whose prediction steps
      and timelines are compared with; None is the devices here, and the run's own steps.
    """
    config = auto_placement.resolve(config, hardware)
    config.validate()
    # Not a rule of configs: those of older runs are still read.
    if config.run.checkpoint_every and config.run.keep_checkpoints < 2:
        raise ConfigError(
            f"run.keep_checkpoints = {config.run.keep_checkpoints} must be 2 or more: whether the "
            "update before a checkpoint overflowed, only the steps after it tell"
        )
    prediction = predict(config, load(hardware)) if hardware else None
    with Watchdog(config) as watchdog, Workdir(workdir) as directory:
        return _train(
            config, directory, watchdog, resume, step, stop_after, profile_steps, prediction
        )


def _train(
    config: Config,
    directory: Workdir,
    watchdog: Watchdog,
    resume: bool,
    step: int | None,
    stop_after: int | None,
    profile_steps: range | None,
    prediction: Prediction | None,
) -> dict | None:
    enable_float64(config)
    processes.check_same_config(config)
    meshes = make_meshes(config)
    processes.check_same_flags(
        resume=resume, resume_step=step, stop_after=stop_after, profile_steps=profile_steps
    )
    watchdog.at("reading the data")
    inputs = processes.on_each(lambda: load_inputs(config))
    digest, held_out = processes.on_each(lambda: (inputs.train.digest(), inputs.held_out.digest()))
    processes.check_same_data(training=digest, held_out=held_out)
    processes.on_first(lambda: directory.open(config, resume=resume, data_digest=digest))
    processes.check_same_workdir(directory)
    before = saved_steps(directory.checkpoints) if resume else []
    if before:
        watchdog.last_good(
            f"the newest checkpoint in {directory.checkpoints} is of step {before[-1]}"
        )
    watchdog.at("compiling")
    stepper = Stepper(config, meshes)
    stepper.check_memory()
    watchdog.at("restoring or initialising the state")
    checkpoints = Checkpoints(
        directory.checkpoints,
        stepper.manager,
        keep_last=config.run.keep_checkpoints,
        keep_every=config.run.keep_checkpoint_every,
    )
    if resume and (step is not None or checkpoints.steps()):
        state, extra = checkpoints.restore(step)
        # A step in another bucket sums in another order. Older checkpoints have no such entry.
        if "buckets" in extra:
            stepper.chooser.remember(extra["buckets"])
    else:
        state = stepper.init(config.run.seed)
    if state.step > config.run.num_steps:
        raise ConfigError(
            f"run.num_steps = {config.run.num_steps} must be at least {state.step}, the step of "
            "the checkpoint that the run goes on from"
        )
    if stop_after is not None and stop_after <= state.step:
        raise ConfigError(f"--stop_after = {stop_after} must be after the start, step {state.step}")
    processes.on_first(lambda: directory.write_config(config, digest))
    steps = range(state.step, config.run.num_steps)
    display = make_display(config)

    def draw_trace(traced: pathlib.Path):
        watchdog.at("the timeline of the trace")
        display.say(_timeline(traced, stepper, prediction))

    outputs = Outputs(
        config,
        display,
        MetricsLog(directory.metrics, directory.tensorboard, next_step=state.step + 1),
        checkpoints,
        watchdog,
        Profiler(directory.profile, profile_steps, draw_trace, display.say),
    )
    try:
        outputs.display.say(startup_report.start_up(stepper, inputs.description))
        if resume:
            outputs.display.say(startup_report.resumed(state.step, directory.changed))
        read = functools.partial(stepper.read_batch, inputs.train)
        with (
            StopRequest(stop_after) as stop,
            Prefetch(read, steps, config.data.prefetch_steps) as batches,
        ):
            stragglers = Stragglers(config, meshes, prediction and prediction.step_seconds)
            state = _loop(stepper, state, batches, inputs, outputs, stragglers, stop, watchdog)
            result, is_complete = None, state.step == config.run.num_steps
            if is_complete and config.run.eval_batches:
                watchdog.at("the last evaluation")
                result = _evaluate(stepper, state, inputs, outputs)
            watchdog.at("the last checkpoint")
            outputs.finish(state.step)
        if not is_complete:
            outputs.display.say(startup_report.stopped(state.step))
        return result
    finally:
        outputs.close()


def _timeline(traced: pathlib.Path, stepper: Stepper, prediction: Prediction | None) -> str:
    """Draws the steps of a trace; says where, or why not: the run goes on all the same."""
    try:
        paths = measured_timeline.write(traced, stepper, prediction)
    except Exception as error:  # whatever a trace holds, it is no reason to lose a run
        return f"warning: no timeline of the trace in {traced}: {error}"
    return f"timeline  of the last step traced: {', '.join(paths)}"


def make_meshes(config: Config) -> Meshes:
    """The meshes over all devices; ConfigError if they are not those that the config needs."""
    placement, devices = placement_of(config), jax.devices()
    if len(devices) != placement.num_devices:
        hint = f": {NO_ACCELERATOR}" if _has_fallen_back(devices) else ""
        raise ConfigError(
            f"split = {placement.num_devices} devices ({_product(config)}) must equal the "
            f"{len(devices)} {devices[0].platform} devices here{hint}"
        )
    kinds = sorted({device.device_kind for device in devices})
    if len(kinds) > 1:
        raise ConfigError(
            f"split = {placement.num_devices} devices must be of one kind, not {', '.join(kinds)}: "
            "the schedule waits for the slowest"
        )
    if devices[0].platform == "gpu":
        _check_gpus(config)
    return Meshes.make(placement, devices)


def _check_gpus(config: Config):
    """ConfigError where cuDNN's attention has no kernel for the config's heads."""
    if config.run.compute_dtype is Dtype.BFLOAT16 and config.model.head_dim % 8:
        raise ConfigError(
            f"model.head_dim = {config.model.head_dim} must be a multiple of 8 on GPUs in "
            "bfloat16, for cuDNN's attention"
        )


def check_accelerator():
    """ConfigError if JAX has fallen back on the CPU; for what was told to simulate no devices."""
    if _has_fallen_back(jax.devices()):
        raise ConfigError(f"--cpu_devices = 0 must be 1 or more here: {NO_ACCELERATOR}")


def _has_fallen_back(devices: list[jax.Device]) -> bool:
    return len(devices) == 1 and devices[0].platform == "cpu"


def _product(config: Config) -> str:
    if config.split.colocated:
        return "replicas * stages * attention_workers, all of them expert workers too"
    return "replicas * stages * (attention_workers + expert_workers)"


def _loop(
    stepper: Stepper,
    state: TrainState,
    batches: Prefetch,
    inputs: Inputs,
    outputs: Outputs,
    stragglers: Stragglers,
    stop: StopRequest,
    watchdog: Watchdog,
) -> TrainState:
    """Trains until the last step, or until told to stop; returns the state then."""
    run = stepper.config.run
    skipped, checkpoint_is_due = SkippedSteps(run.max_skipped_steps), False
    meter, began = StepMeter(stepper.config, stepper.meshes), time.perf_counter()
    while state.step < run.num_steps:
        if outputs.profiler.before_step(state):
            began = time.perf_counter()
        with jax.profiler.StepTraceAnnotation("step", step_num=state.step):
            watch = Stopwatch()
            watchdog.at(f"the input of step {state.step + 1}")
            with watch("input_wait"):
                batch = batches.take()
            watchdog.at(f"step {state.step + 1}")
            state, metrics = stepper.train_step(state, batch)
        ended = time.perf_counter()
        if metrics["skipped"]:
            outputs.write(skipped.bad(state.step, metrics))
            outputs.display.say(skipped.warning(state.step, metrics))
        else:
            skipped.good()
            meter.add(metrics | watch.seconds | {"step_seconds": ended - began})
            outputs.display.step(state.step, metrics["loss"])
        began = ended
        # After a skipped step a run that is told to stop goes on to the next good one: what it
        # saved would take the place of older checkpoints, of which a diverged run may need one.
        stopping = stop.reached(state.step) and not metrics["skipped"]
        last = stopping or state.step == run.num_steps
        if (_due(state.step, run.log_every) or last) and not meter.is_empty:
            record, warnings = meter.record(state.step), []
            if stragglers.is_due() or last:
                state.wait()  # the samples need idle devices
                record, warnings = stragglers.sample(record)
            outputs.record(record, warnings)
            outputs.settle(state.step)
        checkpoint_is_due |= _due(state.step, run.checkpoint_every)
        checkpoint_is_due |= last and (stopping or run.checkpoint_every > 0)
        if checkpoint_is_due and not metrics["skipped"]:
            outputs.save(state, stepper.chooser.memory)
            checkpoint_is_due, began = False, time.perf_counter()
        elif checkpoint_is_due and last:
            outputs.display.say("warning: the last step was skipped, so that no checkpoint is made")
        if stopping:
            break
        if run.eval_batches and _due(state.step, run.eval_every) and not last:
            watchdog.at(f"the evaluation after step {state.step}")
            _evaluate(stepper, state, inputs, outputs)
            began = time.perf_counter()
    return state


def _evaluate(stepper: Stepper, state: TrainState, inputs: Inputs, outputs: Outputs) -> dict:
    """Loss of the model and of the bigram baseline on the same held-out tokens, in nats."""
    batches = [
        stepper.read_batch(inputs.held_out, i) for i in range(stepper.config.run.eval_batches)
    ]
    losses = [stepper.evaluate(state, batch)["loss"] for batch in batches]
    loss = float(np.mean(losses))
    result = {
        "step": state.step,
        "held_out_loss": loss,
        "perplexity": float(np.exp(loss)),
        "bigram_loss": inputs.bigram_loss,
    }
    if inputs.tokens_per_byte is not None:
        result["bits_per_byte"] = loss / math.log(2) * inputs.tokens_per_byte
    outputs.write(result)
    outputs.display.say(startup_report.evaluation(result))
    return result


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
