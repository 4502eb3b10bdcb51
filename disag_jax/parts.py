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
START_SECONDS = 30


def run(parts: int, of: int, gpu: str, command: tuple[str, ...]):
    """Runs Python's `command` in a process for each of the first `parts` of `of` parts of a GPU.

    ConfigError if a process says so, or if the parts cannot be; RunError if one fails.
    """
    if not 1 <= parts <= of:
        raise ConfigError(f"--parts = {parts} must be from 1 to --of = {of}")
    joined = (f"--coordinator=127.0.0.1:{launch.free_port()}", f"--num_processes={parts}")
    with contextlib.ExitStack() as stack:
        directory = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
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

        try:
            codes = launch.run_together([started(part) for part in range(parts)])
        except RunError as error:
            where = (f"; part {part}{last_words(part)}" for part in said)
            raise RunError(f"{error}{''.join(where)}") from error
        failed = [part for part, code in enumerate(codes) if code]
        if failed:
            # The others were killed because one had failed, maybe by a signal of its own.
            part = min(failed, key=lambda part: (codes[part] == -signal.SIGKILL, part))
            kind = ConfigError if codes[part] == USER_ERROR else RunError
            raise kind(f"part {part} of {parts} ended with code {codes[part]}{last_words(part)}")


def environment(part: int, of: int, gpu: str) -> dict[str, str]:
    """The variables that make a process one of a GPU's parts."""
    return runtime.SOCKETS | {
        "CUDA_VISIBLE_DEVICES": gpu,
        runtime.MPS_PERCENT: f"{100 / of:g}",
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

    def tell(*arguments: str, **options) -> str:
        # A pipe would be read until the daemon ends.
        with tempfile.TemporaryFile("w+") as said:
            told = subprocess.run(
                [control, *arguments], env=os.environ | pipe, stdout=said, stderr=said, text=True,
                **options,
            )  # fmt: skip
            said.seek(0)
            answer = said.read()
        if told.returncode:
            line = launch.last_line(answer)
            raise RunError(f"{CONTROL} failed with code {told.returncode}: {line}")
        return answer

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
    finally:
        tell(input="quit\n")


def _has_server(tell) -> bool:
    """Whether the daemon has a server that takes clients."""
    servers = tell(input="get_server_list\n").split()
    status = tell(input=f"get_server_status {servers[0]}\n") if servers else "INITIALIZING"
    return "INITIALIZING" not in status


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli

    _PARTS = flags.DEFINE_integer("parts", 2, "processes, each with a part of the GPU")
    _OF = flags.DEFINE_integer("of", None, "cut the GPU into so many; by default --parts")
    _GPU = flags.DEFINE_string("gpu", "0", "which GPU, as in CUDA_VISIBLE_DEVICES")

    def _run(*command: str):
        run(_PARTS.value, _OF.value or _PARTS.value, _GPU.value, command)

    cli.run(_run, arguments="program")
