"""A `train.py` of its own for a config, and what it measured of its steps."""

import copy
import dataclasses
import os
import pathlib
import statistics

from disag_jax import launch, memory
from disag_jax.config import Config, ConfigError, Overlap
from disag_jax.errors import USER_ERROR, RunError
from disag_jax.flops import flops_per_device
from disag_jax.nccl_log import check_sockets
from disag_jax.report import read_records
from disag_jax.workdir import Workdir
from mesh import runtime

# Steps that compile, and the last ones, which are traced on GPUs; of those between so many must
# count.
WARM_UP_STEPS, TRACED_STEPS, LEAST_STEPS = 2, 2, 2


class DoesNotFit(ConfigError):
    """A config that lacks memory, which another micro-batch size may not."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a run of one placement did, from the steps after the warm-up that did not compile.

    Attributes:
      placement: "disaggregated" or "colocated".
      split: the split in words.
      tokens_per_worker, micro_batches: T and K.
      losses: of every step.
      step_seconds: the median step, optimizer included.
      tokens_per_second, tflops_per_device: of a step that takes so long.
      peak_memory_gib: by worker; empty where the backend keeps no count.
      exposed_share: share of a step that a device spends with communication and no compute, waiting
        for its partner included, by device; empty without a trace of GPUs, and where a traced step
        compiled.
      hidden_share: share of the communication that ran under compute, by device.
    """

    placement: str
    split: str
    tokens_per_worker: int
    micro_batches: int
    losses: list[float]
    step_seconds: float
    tokens_per_second: float
    tflops_per_device: float
    peak_memory_gib: dict[str, float]
    exposed_share: dict[str, float]
    hidden_share: dict[str, float]


class Runner:
    """Starts `train.py` for a config, in a directory of its own, and reads what it measured."""

    def __init__(self, directory: pathlib.Path, cpu_devices: int, network: str):
        self._directory = directory
        self._cpu_devices, self._network = cpu_devices, network

    def run(self, config: Config, name: str, num_steps: int) -> Measurement:
        """Trains `num_steps`, on GPUs the last of them traced.

        DoesNotFit if there is too little memory; ConfigError or RunError if the run fails.
        """
        workdir = self._directory / name
        output = self._directory / f"{name}.output.txt"
        with output.open("w") as file:
            code = launch.run(
                self._command(config, workdir, num_steps),
                env=self._environment(workdir),
                stdout=file,
                stderr=file,
            )
        if code:
            said = launch.last_line(output.read_text()).removeprefix("error: ")
            # As train.py tells its user's mistakes from what went wrong.
            kind = ConfigError if code == USER_ERROR else RunError
            if kind is ConfigError and said.startswith(memory.TOO_LITTLE):
                kind = DoesNotFit
            raise kind(f"{name}: {said} (all of it: {output})")
        if self._network == "sockets":
            check_sockets(f"{workdir}.nccl.*.txt", workdir.name)
        return measure(config, workdir, num_steps, has_trace=not self._cpu_devices)

    def _command(self, config: Config, workdir, num_steps: int) -> list[str]:
        config = copy.deepcopy(config)
        config.run = dataclasses.replace(
            config.run, num_steps=num_steps, log_every=1, eval_batches=0, checkpoint_every=0,
        )  # fmt: skip
        flags = [f"--cpu_devices={self._cpu_devices}"]
        if not self._cpu_devices:
            flags.append(f"--profile_steps={num_steps - TRACED_STEPS}:{num_steps}")
        return launch.train_command(config, workdir, *flags)

    def _environment(self, workdir) -> dict[str, str]:
        environment = dict(os.environ)
        if self._network == "sockets":
            log = runtime.NETWORK_LOG | {"NCCL_DEBUG_FILE": f"{workdir}.nccl.%p.txt"}
            environment |= runtime.SOCKETS | log
        return environment


def measure(config: Config, workdir, num_steps: int, *, has_trace: bool) -> Measurement:
    """Reads what a run of `num_steps` logged, one record a step, and its trace if it has one."""
    steps, _ = read_records(Workdir(str(workdir)).metrics)
    if len(steps) != num_steps:
        raise RunError(f"{workdir}: {len(steps)} of {num_steps} steps were trained")
    # Tracing slows its steps down.
    split_at = num_steps - TRACED_STEPS if has_trace else num_steps
    timed = [step for step in steps[WARM_UP_STEPS:split_at] if not _compiled(step)]
    if len(timed) < LEAST_STEPS:
        raise RunError(
            f"{workdir}: {len(timed)} of the steps {WARM_UP_STEPS + 1} to {split_at} compiled "
            f"nothing, and {LEAST_STEPS} at least are needed: more --steps would help"
        )
    times = {}
    if has_trace and not any(map(_compiled, steps[split_at:])):
        from disag_jax import trace  # JAX starts only where there is something to read

        times = trace.device_times(workdir)
    split = config.split
    seconds = statistics.median(step["step_seconds"] for step in timed)
    rate = config.tokens_per_step / seconds
    return Measurement(
        placement=split.placement.value,
        split=f"{split.replicas} x {split.stages} x "
        + (f"{split.attention_workers}/{split.expert_workers}" if split.colocated
           else f"({split.attention_workers}+{split.expert_workers})")
        + ("" if split.overlap is Overlap.NONE else f" {split.overlap_in_words}"),
        tokens_per_worker=config.batch.tokens_per_worker,
        micro_batches=config.batch.micro_batches,
        losses=[step["loss"] for step in steps],
        step_seconds=seconds,
        tokens_per_second=rate,
        tflops_per_device=flops_per_device(config, rate) / 1e12,
        peak_memory_gib=steps[-1].get("peak_memory_gib", {}),
        exposed_share={name: t.exposed / t.span for name, t in times.items()},
        hidden_share={name: t.hidden_share for name, t in times.items()},
    )  # fmt: skip


def _compiled(record: dict) -> bool:
    """Whether the one step of a record compiled a program, so that it took longer than others."""
    return "compile_seconds" in record
