"""Trains a Mixture-of-Experts language model with attention and experts on different devices.

  python train.py --config configs/tiny.py --cpu_devices 8 --workdir runs/tiny

Flags choose how to run; the config says what to train: `--config.model.num_layers=8`.
"""

from absl import flags

from disag_jax import cli
from disag_jax.config import PlacementKind
from disag_jax.errors import ConfigError
from disag_jax.planner.hardware import load
from mesh import runtime

CONFIG = cli.define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "directory for metrics and checkpoints")
RESUME = flags.DEFINE_bool("resume", False, "go on from the last checkpoint in workdir")
RESUME_STEP = flags.DEFINE_integer(
    "resume_step",
    None,
    "go on from the checkpoint of this step instead; later ones are deleted at the next save",
    lower_bound=0,
)
STOP_AFTER = flags.DEFINE_integer(
    "stop_after", None, "save and end after this step, as on SIGTERM", lower_bound=1
)
PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "begin:end, the steps (from 0) to trace into workdir/profile"
)
CPU_DEVICES = cli.define_cpu_devices_flag()
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic", False, "bitwise equal results of equal runs on GPUs too, in more time"
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "compile the program for simulated devices and say whether it would fit"
)
HARDWARE = flags.DEFINE_string(
    "hardware",
    None,
    "what --dry_run plans for (its split must be named), split.placement=auto chooses for, and "
    "steps are compared with, in bfloat16: a name, or a file of disag_jax.profile; default: the "
    "devices here, and the run's own steps",
)
PROCESSES = cli.define_process_flags()


def main():
    if DRY_RUN.value:
        _dry_run()
        return
    if WORKDIR.value is None:
        raise ConfigError("--workdir = None must be a directory for metrics and checkpoints")
    runtime.start(CPU_DEVICES.value, deterministic=DETERMINISTIC.value)
    # JAX reads its environment when it starts: import what uses it only now.
    from disag_jax import processes, profiling, training

    processes.join(*(flag.value for flag in PROCESSES), CONFIG.value, ends_in_order=True)

    step = RESUME_STEP.value
    resume = RESUME.value or step is not None
    training.train(
        CONFIG.value,
        WORKDIR.value,
        resume=resume,
        step=step,
        stop_after=STOP_AFTER.value,
        profile_steps=profiling.parse_steps(PROFILE_STEPS.value, CONFIG.value.run.num_steps),
        hardware=HARDWARE.value,
    )


def _dry_run():
    if HARDWARE.value is None:
        raise ConfigError("--hardware = None must be given with --dry_run")
    hardware = load(HARDWARE.value)
    if CONFIG.value.split.placement is PlacementKind.AUTO:
        raise ConfigError(
            "split.placement = 'auto' must be disaggregated or colocated for --dry_run, which "
            "compiles one split: `python -m disag_jax.plan` finds one"
        )
    runtime.start(CONFIG.value.validate().split.num_devices)
    from disag_jax import dry_run

    dry_run.main(CONFIG.value, hardware)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
