"""What a measurement holds for: the devices, the version of JAX, the day and the config."""

import concurrent.futures
import copy
import dataclasses
import json
import multiprocessing
import time

import jax

from disag_jax import training
from disag_jax.config import Config
from disag_jax.errors import RunError
from disag_jax.inputs import load_inputs
from mesh import runtime


def about(config: Config) -> dict:
    """The facts of this process, as JSON."""
    return {
        "devices": devices(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "config": as_json(config),
    }


def devices() -> str:
    """How many devices of which kind there are, or what part of one each is."""
    here, share = jax.devices(), runtime.gpu_share()
    part = "" if share == 1 else f"{share:.0%} of "
    return f"{len(here)} x {part}{here[0].device_kind}"


def as_json(config: Config) -> dict:
    """The config as a JSON file that is read again has it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def of_training(config: Config, cpu_devices: int) -> dict:
    """The facts of a `train.py` that is to be started; ConfigError if it lacks devices or data.

    They are found by another process, which ends: one that has asked for a GPU keeps its memory.
    """
    others = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=others) as pool:
        try:
            return pool.submit(_look, config, cpu_devices).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise RunError(f"the devices could not be looked at: {error}") from error


def _look(config: Config, cpu_devices: int) -> dict:
    runtime.start(cpu_devices)
    training.make_meshes(config)
    without_baseline = copy.deepcopy(config)
    without_baseline.run.eval_batches = 0
    load_inputs(without_baseline)
    return about(config)
