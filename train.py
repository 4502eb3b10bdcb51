"""Trains a Mixture-of-Experts language model with attention and experts on different devices.

  python train.py --config configs/tiny.py --cpu_devices 8 --workdir runs/tiny

Flags choose how to run; the config says what to train: `--config.model.num_layers=8`.
"""

from absl import flags

from disag_jax import cli
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
CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    0,
    "simulate this many devices on the CPU; 0 takes the accelerators",
    lower_bound=0,
)
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic", False, "bitwise equal results of equal runs on GPUs too, at some speed"
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, for several processes without SLURM or MPI"
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes of the run")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")


def main():
    runtime.start(CPU_DEVICES.value, deterministic=DETERMINISTIC.value)
    # JAX reads its environment when it starts: import what uses it only now.
    from disag_jax import processes, profiling, training

    processes.join(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, CONFIG.value)

    step = RESUME_STEP.value
    resume = RESUME.value or step is not None
    training.train(
        CONFIG.value,
        WORKDIR.value,
        resume=resume,
        step=step,
        stop_after=STOP_AFTER.value,
        profile_steps=profiling.parse_steps(PROFILE_STEPS.value, CONFIG.value.run.num_steps),
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
