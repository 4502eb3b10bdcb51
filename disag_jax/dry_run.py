"""Compiles a run's real program for devices that are not there, and says whether it would fit.

  python train.py --config configs/deepseek_moe_16b.py --dry_run --hardware h100

With JAX's CUDA plugin installed, the training pipeline is compiled by the GPU's compiler, which
needs no GPU. Without it, or for other hardware, it is compiled for as many simulated CPU devices as
the split names: arguments and outputs are those of any backend, but temporaries are the CPU's,
which has no fused attention and holds all scores of a layer. Whether a step fits is decided by the
planner's count.
"""

import dataclasses
import time

import jax

from disag_jax.config import Config
from disag_jax.errors import ConfigError
from disag_jax.geometry import buckets, make_geometry, placement_of
from disag_jax.memory import in_words, needed_bytes
from disag_jax.planner.hardware import Hardware
from disag_jax.planner.memory_model import missing_bytes, missing_in_words
from disag_jax.planner.prediction import Prediction, predict
from disag_jax.planner.sizes import Sizes
from disag_jax.schedule import Schedule
from disag_jax.shared_loss import SharedLoss
from disag_jax.step import Stepper
from layers import target
from mesh import absent
from mesh.placement import Meshes

# Compiled to be counted, never run.
QUICKLY = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What was found out.

    Attributes:
      prediction: the planner's, for the hardware.
      compiler: whose, "GPU" or "CPU".
      compile_seconds: of lowering and compiling the pipeline here, kernels not tuned.
      needed: bytes of each kind of worker by the compiler's count.
      arguments_and_outputs: bytes of the program's on one device, by the compiler's count; outputs
        that take the memory of an argument count once.
      pair_bytes: bytes that one worker sends to one other in a step, by kind of transfer.
    """

    prediction: Prediction
    compiler: str
    compile_seconds: float
    needed: dict[str, int]
    arguments_and_outputs: int
    pair_bytes: dict[str, int]


def dry_run(config: Config, hardware: Hardware) -> DryRun:
    """Checks the schedule, compiles the pipeline and counts; the devices must be simulated."""
    config.validate()
    prediction = predict(config, hardware)
    gpu = absent.gpu_of(hardware.name) if absent.cuda_plugin() else None
    began = time.perf_counter()
    if gpu:
        compiled, stepper = compile_for_gpus(config, gpu)
    else:
        stepper = _stepper(config, jax.devices())
        compiled = _lowered(stepper).compile(compiler_options=QUICKLY)
    compile_seconds = time.perf_counter() - began
    analysis = compiled.memory_analysis()
    return DryRun(
        prediction=prediction,
        compiler="GPU" if gpu else "CPU",
        compile_seconds=compile_seconds,
        needed=needed_bytes(stepper.manager, compiled),
        arguments_and_outputs=analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes,
        pair_bytes=pair_bytes(config, stepper.schedule),
    )


def compile_for_gpus(config: Config, gpu: absent.Gpu) -> tuple[jax.stages.Compiled, Stepper]:
    """The training pipeline for GPUs that are not here, and what it is the program of."""
    devices = absent.devices(gpu, config.split.num_devices)
    with target.made_for(devices[0]):
        stepper = _stepper(config, devices)
        return _lowered(stepper).compile(compiler_options=absent.UNTUNED), stepper


def _stepper(config: Config, devices) -> Stepper:
    # Its schedule is checked by disag_jax/schedule_check.py as that of a run.
    return Stepper(config, Meshes.make(placement_of(config), devices))


def _lowered(stepper: Stepper) -> jax.stages.Lowered:
    program = stepper.gradient_program(stepper.chooser.options[0])
    return program.lower(*stepper.abstract_arguments())


def pair_bytes(config: Config, schedule: Schedule) -> dict[str, int]:
    """Bytes that one worker sends to one partner in a step, by kind of transfer.

    Messages travel in every period of a segment, whether or not a unit made them.
    """
    sizes = Sizes.of(config)
    forwards, backwards = (
        sum(s.num_periods for s in schedule.segments if getattr(s, f"has_{direction}"))
        for direction in ("forward", "backward")
    )
    loss = _loss_bytes(config)
    if not config.split.colocated:
        # With hop 2 the last forward message is on its way in every period.
        sent = schedule.num_periods if schedule.hop == 2 else forwards
        return {
            "many-to-many forward": sent * sizes.message_bytes,
            "many-to-many backward": backwards * sizes.cotangent_bytes,
        } | loss
    hidden = config.batch.tokens_per_worker * config.model.d_model * sizes.item_bytes
    exchanges = 2 if config.split.expert_workers > 1 else 0
    return {
        "all-to-all forward": exchanges * forwards * sizes.message_bytes,
        "all-to-all backward": exchanges * backwards * sizes.cotangent_bytes,
        "to the next stage": (forwards + backwards) * hidden if schedule.stages > 1 else 0,
    } | loss


def _loss_bytes(config: Config) -> dict[str, int]:
    """Bytes of a step between an owner of losses and a worker that it gives a share of each."""
    geometry = make_geometry(config, buckets(config)[0])
    shared, losses = SharedLoss(geometry), config.batch.micro_batches
    if not shared.helpers:
        return {}
    gradient = shared.share_tokens * geometry.D * geometry.compute_dtype.itemsize
    return {
        "loss tokens": losses * shared.codec.num_words * shared.codec.word_bytes,
        "loss gradients": losses * gradient,
    }


def report(found: DryRun) -> str:
    """What was found out, as text."""
    prediction = found.prediction
    config, hardware = prediction.config, prediction.hardware
    lines = [
        f"{config.name} on {config.split.num_devices} x {hardware.name}: schedule valid, program "
        f"compiled for the {found.compiler} in {found.compile_seconds:.0f} s",
        f"step      {prediction.step_seconds:.3f} s predicted, MFU {prediction.mfu:.1%}",
    ]
    for kind, memory in prediction.memory.items():
        lines.append(
            f"memory    {kind}: planner {in_words(memory.total)}, "
            f"{found.compiler} compiler {in_words(found.needed[kind])}, "
            f"usable {in_words(hardware.usable_bytes)}"
        )
    for name, size in found.pair_bytes.items():
        lines.append(f"sent      {name}: {in_words(size)} from a worker to each partner in a step")
    return "\n".join(lines)


def main(config: Config, hardware: Hardware):
    """Prints the report; ConfigError with the bytes over if a step would not fit."""
    found = dry_run(config, hardware)
    print(report(found))
    missing = missing_bytes(found.prediction.memory, hardware)
    if missing:
        raise ConfigError(
            f"memory of each {hardware.name} must hold a step: {missing_in_words(missing)} "
            f"{in_words(hardware.usable_bytes)}"
        )
