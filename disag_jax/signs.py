"""Signs of life that the processes of a run give each other, through JAX's key-value store.

The store is with process 0: it lives and dies with it, and its calls may block when that one is
stopped.
"""

import dataclasses
import json

import jax

from disag_jax import processes

SIGNS, VERDICT = "watchdog/signs", "watchdog/verdict"
RUNNING, DONE = "running", "done"


@dataclasses.dataclass(frozen=True)
class Sign:
    """What a process last said of itself.

    Attributes:
      number: another one in every sign.
      status: RUNNING, DONE, or why it failed.
      place: where its main thread is.
    """

    number: int = 0
    status: str = RUNNING
    place: str = "the start"

    @property
    def has_failed(self) -> bool:
        return self.status not in (RUNNING, DONE)


def give(sign: Sign):
    """Writes this process's sign over its last one."""
    name = f"{SIGNS}/{jax.process_index()}"
    text = json.dumps(dataclasses.astuple(sign))
    processes.key_value_store().key_value_set(name, text, allow_overwrite=True)


def read(process: int) -> Sign:
    """The last sign of a process."""
    try:
        text = processes.key_value_store().key_value_try_get(f"{SIGNS}/{process}")
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return Sign()
    return Sign(*json.loads(text))


def read_all() -> dict[int, Sign]:
    """The last sign of every process that has given one."""
    pairs = processes.key_value_store().key_value_dir_get(SIGNS)
    return {int(name.rpartition("/")[2]): Sign(*json.loads(text)) for name, text in pairs}


def give_verdict(sentence: str):
    """Has all processes end with a sentence."""
    processes.key_value_store().key_value_set(f"{VERDICT}/text", sentence, allow_overwrite=True)


def read_verdict() -> str:
    """The sentence to end with, empty if there is none."""
    pairs = processes.key_value_store().key_value_dir_get(VERDICT)
    return pairs[0][1] if pairs else ""
