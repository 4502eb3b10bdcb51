"""Several processes running one program: joining, agreeing, and letting one speak for all."""

import asyncio
import contextlib
import os
import pathlib
import secrets
import socket
import sys
import time
import zlib

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from disag_jax.config import Config
from disag_jax.errors import RUN_ERROR, ConfigError, RunError
from disag_jax.last_words import LastWords
from disag_jax.workdir import Workdir, named_fields
from mesh import runtime

# A sentence for the other processes, in bytes; longer ones are cut.
SENTENCE_BYTES = 1024
SLOWEST_WRITE_SECONDS = 1200
# Of a process that failed alone: so long it waits for the others at its exit.
ALONE_SECONDS = 10
UNFORESEEN = "another process failed; its own message says why"


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    config: Config,
    *,
    ends_in_order: bool = False,
):
    """Connects the processes of a run; call before anything else uses JAX.

    Without a coordinator, a SLURM or MPI launch of several processes is detected by JAX; a single
    process connects to nobody. Raises ConfigError if the coordinator does not answer in time.

    ends_in_order: whether SIGTERM is the run's to act on (disag_jax/preemption.py); otherwise it
      ends the process.
    """
    jax.config.update("jax_enable_preemption_service", ends_in_order)
    if coordinator is None:
        for name, value in (("num_processes", num_processes), ("process_id", process_id)):
            if value is not None:
                raise ConfigError(f"--{name} = {value} must come with --coordinator")
        if not _launched_with_others():
            return
    if coordinator is not None:
        _check_numbers(num_processes, process_id)
        address = _host_and_port(coordinator)
        if process_id > 0:
            _wait_until_reachable(coordinator, address, config.run.start_timeout_seconds)
    in_time = (
        f"all must start within run.start_timeout_seconds = {config.run.start_timeout_seconds}"
    )
    sentence = (
        f"process {process_id} could not join {num_processes} processes at {coordinator}: every "
        f"--process_id must be used once, and {in_time}"
        if coordinator is not None
        else "this process could not join the others of its SLURM or MPI launch: the coordinator "
        "that the launch names must be reachable (or be named by --coordinator, --num_processes "
        f"and --process_id), and {in_time}"
    )
    with _told(sentence):
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids=_only_device(),
            initialization_timeout=config.run.start_timeout_seconds,
            # A run looks after its processes itself (disag_jax/watchdog.py); nothing else does.
            shutdown_timeout_seconds=300 if ends_in_order else ALONE_SECONDS,
            # Ours comes first: it names the process (disag_jax/watchdog.py).
            heartbeat_timeout_seconds=3 * config.run.heartbeat_timeout_seconds + 30,
        )
    _start_devices()


def is_first() -> bool:
    """Whether this process prints and writes for all."""
    return jax.process_index() == 0


def say(*lines: str):
    """Prints in the first process, at once."""
    if lines and is_first():
        print(*lines, sep="\n", flush=True)


def gathered(value) -> np.ndarray:
    """An array with the parts that other processes' devices hold; all must ask together."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


def largest(values: list[float]) -> list[float]:
    """Of each of the values the largest that any process has; all must ask together."""
    if jax.process_count() == 1:
        return values
    # Of the bits: JAX would round float64.
    mine = np.asarray(values, np.float64).view(np.uint32)
    everyone = np.asarray(multihost_utils.process_allgather(mine))
    return everyone.view(np.float64).max(axis=0).tolist()


def on_first(action):
    """Runs `action()` on the first process; its ConfigError is raised on all of them alike.

    Any other exception goes on where it was raised, and the other processes end with a RunError.
    """
    _agree(action if is_first() else None)


def on_each(action):
    """Runs `action()` on every process and returns its result; exceptions are as in `on_first`."""
    return _agree(action)


def _agree(action):
    result, sentence, failure = None, "", None
    if action is not None:
        try:
            result = action()
        except ConfigError as error:
            sentence = str(error)
        except Exception as error:
            sentence, failure = UNFORESEEN, error
    sentence = first_sentence(sentence)
    if failure is not None:
        raise failure
    if sentence == UNFORESEEN:
        raise RunError(sentence)
    if sentence:
        raise ConfigError(sentence)
    return result


def first_sentence(sentence: str) -> str:
    """The sentence of the first process that has one, on all of them; empty if none has."""
    if jax.process_count() == 1:
        return sentence
    encoded = np.zeros(SENTENCE_BYTES, np.uint8)
    text = sentence.encode()[:SENTENCE_BYTES]
    encoded[: len(text)] = np.frombuffer(text, np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(encoded))
    said = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in everyone]
    return next((s for s in said if s), "")


def any_of(flag: bool) -> bool:
    """Whether the flag is True in any process; all must ask together."""
    return bool(first_sentence("yes" if flag else ""))


def first_failure(action) -> str:
    """Runs `action()`, or nothing for None, and tells all processes what went wrong in one.

    Returns the sentence of the first process whose action failed; empty if none did.
    """
    try:
        if action is not None:
            action()
        sentence = ""
    except Exception as error:
        sentence = describe(error)
    return first_sentence(sentence)


async def share_failure(name: str, work) -> str:
    """Awaits `work` and tells all processes what went wrong in one, as `first_failure` does.

    For threads in the background: no program runs on the devices. `name` must be new.
    """
    try:
        await work
        sentence = ""
    except Exception as error:
        sentence = describe(error)
    if jax.process_count() == 1:
        return sentence
    return await asyncio.to_thread(_first_by_name, name, sentence)


def _first_by_name(name: str, sentence: str) -> str:
    store = key_value_store()
    store.key_value_set(f"{name}/{jax.process_index()}", sentence)
    keys = (f"{name}/{process}" for process in range(jax.process_count()))
    # A lost process ends the run (disag_jax/watchdog.py); a slow disk is waited for.
    said = [store.blocking_key_value_get(key, SLOWEST_WRITE_SECONDS * 1000) for key in keys]
    return next((s for s in said if s), "")


def coordinator_address() -> tuple[str, int]:
    """Host and port at which process 0 answers the others."""
    host, _, port = distributed.global_state.coordinator_address.rpartition(":")
    return host.strip("[]"), int(port)


def key_value_store():
    """The strings that the processes of a run share; they are with process 0."""
    # JAX has no public name for it.
    return distributed.global_state.client


def describe(error: BaseException) -> str:
    """An exception in one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_same_config(config: Config):
    """Raises ConfigError on every process if their configs differ, naming the first field.

    So it does if their versions of this code or of JAX differ.
    """
    if jax.process_count() == 1:
        return
    # By itself: configs of other code may have another number of fields, and what all exchange must
    # be of one size.
    _check_same([("the code", _code())])
    _check_same((f"config.{name}", value) for name, value in named_fields(config))


def check_same_data(**digests: str):
    """Raises ConfigError on every process if a `Batches.digest` of their data differs."""
    if jax.process_count() > 1:
        _check_same((f"data: the checksum of {name}", value) for name, value in digests.items())


def check_same_workdir(directory: Workdir):
    """Raises ConfigError on every process unless all write to the same directory."""
    if jax.process_count() > 1:
        on_first(lambda: directory.mark(secrets.token_hex(8)))
        _check_same([("the file that process 0 left in --workdir", directory.read_mark())])


def check_same_flags(**values):
    """Raises ConfigError on every process if flags that all must share differ."""
    if jax.process_count() > 1:
        _check_same((f"--{name}", value) for name, value in values.items())


def _check_same(named):
    """Raises ConfigError on every process if one of the (name, value) pairs differs."""
    named = list(named)
    digests = np.array([zlib.crc32(repr(value).encode()) for _, value in named], np.uint32)
    everyone = np.asarray(multihost_utils.process_allgather(digests))
    differs = np.argwhere(everyone != everyone[0])
    if differs.size:
        process, number = differs[0]
        name, value = named[number]
        raise ConfigError(
            f"{name} = {value!r} (in process {jax.process_index()}) must be the same in all "
            f"processes: process {process} has another value than process 0"
        )


def _code() -> str:
    """The versions of JAX and of this repository's own files, which git may not know."""
    root, digest = pathlib.Path(__file__).parent.parent, 0
    for package in ("disag_jax", "layers", "mesh"):
        for path in sorted((root / package).rglob("*.py")):
            digest = zlib.crc32(path.read_bytes(), zlib.crc32(path.name.encode(), digest))
    return f"jax {jax.__version__}, files {digest:08x}"


def _check_numbers(num_processes: int | None, process_id: int | None):
    if num_processes is None or num_processes < 1:
        raise ConfigError(f"--num_processes = {num_processes} must be 1 or more with --coordinator")
    if process_id is None or not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process_id = {process_id} must be at least 0 and below --num_processes = "
            f"{num_processes}"
        )


def _host_and_port(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"--coordinator = {coordinator!r} must be host:port, with a port from 1 to {2**16 - 1}"
        )
    return host, int(port)


def _wait_until_reachable(coordinator: str, address: tuple[str, int], timeout_seconds: float):
    """Waits for process 0 to listen; JAX itself would end the process without an exception."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection(address, timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"--coordinator = {coordinator!r} must be reachable within "
                    f"run.start_timeout_seconds = {timeout_seconds}: {error}"
                ) from error
        time.sleep(0.2)


@contextlib.contextmanager
def _told(sentence: str):
    """Has `sentence` told as an error if this process ends inside, which JAX may make it do."""
    last_words = LastWords(sentence)
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{sentence}: {str(error).splitlines()[0]}") from error
    finally:
        last_words.close()


def _start_devices():
    """Starts the devices of this process; where that fails it says so and ends at once.

    An exception would have it wait at its exit for the others, which wait for its devices.
    """
    try:
        jax.devices()
    except RuntimeError as error:
        process = distributed.global_state.process_id
        sentence = f"the devices of process {process}, or of another one, do not start"
        print(f"error: {sentence}: {describe(error)}", file=sys.stderr, flush=True)
        os._exit(RUN_ERROR)


def _only_device() -> list[int] | None:
    """[0] if this process is shown one GPU alone, whose number is then 0 and not its SLURM rank's.

    JAX would otherwise look for a GPU of the rank's number in every task of a SLURM launch.
    """
    return [0] if len(runtime.visible_gpus()) == 1 else None


def _launched_with_others() -> bool:
    """Whether SLURM or Open MPI started this process as one of several."""
    sizes = (os.environ.get(name) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    in_step = "SLURM_STEP_ID" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ
    return in_step and any(size is not None and int(size) > 1 for size in sizes)
