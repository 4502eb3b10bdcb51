"""Several workers on one GPU: cuts it into equal parts, by NVIDIA's MPS, with a process for each.

  python -m disag_jax.parts --parts=4 -- train.py --config C --workdir W
  python -m disag_jax.parts --parts=2 -- -m benchmarks.sweep --network=sockets --config C ...

A process sees its part as a GPU with fewer processors and less memory, and reaches the others
through loopback sockets, so that a split of more workers than there are GPUs can be tried, with the
programs, kernels and transfers that it will have. The parts share the GPU's memory bandwidth, its
cache and its power: times are not those of GPUs of their own. What follows `--` is for Python, and
takes the flags coordinator, num_processes and process_id, which are added. What the first process
says is printed.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from disag_jax import launch
from disag_jax.errors import USER_ERROR, ConfigError, RunError
from mesh import runtime

CONTROL = "nvidia-cuda-mps-control"
# Of the GPU's memory; the rest is for what each process has outside of JAX's.
MEMORY_SHARE = 0.88
# MPS has 120 hardware queues for all its clients; one that asks for more than are left is told that
# memory is lacking.
QUEUES = 64
START_SECONDS = 30
# Clients that are still there have so long to end, and the daemon to answer anything.
QUIT_SECONDS, ANSWER_SECONDS = 10, 30


def run(parts: int, of: int, gpu: str | None, command: tuple[str, ...]):
    """Runs Python's `command` in a process for each of the first `parts` of `of` parts of a GPU.

    gpu: as CUDA_VISIBLE_DEVICES names it; None takes the first that this names, or the first.

    ConfigError if a process says so, or if the parts cannot be; RunError if one fails. A signal to
    stop is passed on, and is no error where all processes then end in order.
    """
    if not 1 <= parts <= of:
        raise ConfigError(f"--parts = {parts} must be from 1 to --of = {of}")
    gpu = which_gpu(gpu)

    def stop(signum, _):
        raise launch.Stopped(signum)

    with launch.on_stop(stop):
        _run(parts, of, gpu, command)


def which_gpu(wanted: str | None) -> str:
    """The one GPU that is meant; ConfigError if it is not one, or none that may be seen."""
    shown = runtime.visible_gpus()
    if wanted is None:
        return shown[0] if shown else "0"
    if not wanted or "," in wanted:
        raise ConfigError(f"--gpu = {wanted!r} must name one GPU, such as 0")
    if shown and wanted not in shown:
        named = f"{runtime.VISIBLE_GPUS} = {','.join(shown)}"
        raise ConfigError(f"--gpu = {wanted!r} must be one of {named}")
    return wanted


def _run(parts: int, of: int, gpu: str, command: tuple[str, ...]):
    joined = (f"--coordinator=127.0.0.1:{launch.free_port()}", f"--num_processes={parts}")
    with contextlib.ExitStack() as stack:
        directory = pathlib.Path(
            stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        )
        pipe = stack.enter_context(served(directory))
        # What the first process says goes where this one's words go.
        said = {
            part: stack.enter_context(open(directory / f"{part}", "w+")) for part in range(1, parts)
        }

        def started(part: int) -> tuple[list[str], dict]:
            options = {"env": os.environ | pipe | environment(part, of, gpu)}
            if part in said:
                options |= {"stdout": said[part], "stderr": subprocess.STDOUT}
            return [sys.executable, *command, *joined, f"--process_id={part}"], options

        def last_words(part: int) -> str:
            if part not in said:
                return ""
            said[part].seek(0)
            return f": {launch.last_line(said[part].read())}"

        def words_of_others(part: int | None) -> str:
            return "".join(f"; part {other}{last_words(other)}" for other in said if other != part)

        try:
            codes = launch.run_together([started(part) for part in range(parts)])
        except launch.Stopped as error:
            if error.codes is not None and not any(error.codes):
                return
            raise RunError(f"{error}{words_of_others(None)}") from error
        failed = [part for part, code in enumerate(codes) if code]
        if failed:
            # The others were killed because one had failed, maybe by a signal of its own; or it did
            # because it lost one that failed before and waits for it at its end.
            part = min(failed, key=lambda part: (codes[part] == -signal.SIGKILL, part))
            kind = ConfigError if codes[part] == USER_ERROR else RunError
            ended = f"part {part} of {parts} ended with code {codes[part]}{last_words(part)}"
            raise kind(f"{ended}{words_of_others(part)}")


def environment(part: int, of: int, gpu: str) -> dict[str, str]:
    """The variables that make a process one of a GPU's parts."""
    return runtime.SOCKETS | {
        runtime.VISIBLE_GPUS: gpu,
        runtime.MPS_PERCENT: f"{100 / of:g}",
        runtime.QUEUES: f"{min(int(runtime.GPU_ENVIRONMENT[runtime.QUEUES]), QUEUES // of)}",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{MEMORY_SHARE / of:.3f}",
        # NCCL takes no GPU twice on one host.
        "NCCL_HOSTID": f"part-{part}",
    }


@contextlib.contextmanager
def served(directory: pathlib.Path):
    """Within it MPS serves the processes that have the variables it gives.

    Its logs are in the directory, unless CUDA_MPS_LOG_DIRECTORY names another.
    """
    control = shutil.which(CONTROL)
    if control is None:
        raise ConfigError(f"{CONTROL} must be on the PATH: it comes with NVIDIA's driver")
    pipe = {
        "CUDA_MPS_PIPE_DIRECTORY": str(directory),
        "CUDA_MPS_LOG_DIRECTORY": os.environ.get("CUDA_MPS_LOG_DIRECTORY", str(directory)),
    }

    # The daemon serves all GPUs, so that a number means the same GPU to it and to its clients.
    environment = {k: v for k, v in os.environ.items() if k != runtime.VISIBLE_GPUS} | pipe

    def tell(*arguments: str, **options) -> str:
        # A pipe would be read until the daemon ends.
        with tempfile.TemporaryFile("w+") as said:
            try:
                told = subprocess.run(
                    [control, *arguments], env=environment, stdout=said, stderr=said, text=True,
                    timeout=ANSWER_SECONDS, **options,
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise RunError(f"{CONTROL} did not answer in {ANSWER_SECONDS} s") from error
            said.seek(0)
            answer = said.read()
        if told.returncode:
            line = launch.last_line(answer)
            raise RunError(f"{CONTROL} failed with code {told.returncode}: {line}")
        return answer

    def quit_it():
        tell(input=f"quit -t {QUIT_SECONDS}\n")

    tell("-d")
    try:
        # Of four processes that found no server yet, one waited for ever.
        tell(input=f"start_server -uid {os.getuid()}\n")
        deadline = time.monotonic() + START_SECONDS
        while not _has_server(tell):
            if time.monotonic() > deadline:
                raise RunError(f"{CONTROL} has no server after {START_SECONDS} s")
            time.sleep(launch.POLL_SECONDS)
        yield pipe
    except BaseException:
        # What ended it says more than a daemon that does not end.
        with contextlib.suppress(RunError):
            quit_it()
        raise
    quit_it()


def _has_server(tell) -> bool:
    """Whether the daemon has a server that takes clients."""
    servers = tell(input="get_server_list\n").split()
    status = tell(input=f"get_server_status {servers[0]}\n") if servers else "INITIALIZING"
    return "INITIALIZING" not in status


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli

    _PARTS = flags.DEFINE_integer(
        "parts", 2, "processes, each with a part of the GPU", lower_bound=1
    )
    _OF = flags.DEFINE_integer(
        "of", None, "cut the GPU into so many; by default --parts", lower_bound=1
    )
    _GPU = flags.DEFINE_string(
        "gpu", None, "which GPU, as in CUDA_VISIBLE_DEVICES; by default its first"
    )

    def _main(*command: str):
        run(_PARTS.value, _OF.value or _PARTS.value, _GPU.value, command)

    cli.run(_main, arguments="program")
