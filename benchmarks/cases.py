"""What benchmarks of whole steps share: cases beside their prediction, measured one by one.

Results are kept with what they hold for: the devices, the network, and of each the config. None is
taken for another's. What was measured does not depend on the hardware's description: with another
one, predictions are made anew.
"""

import collections
import concurrent.futures
import dataclasses
import faulthandler
import gc
import hashlib
import json
import pathlib
import statistics
import time

import jax

from disag_jax import facts, processes
from disag_jax.bench_step import NothingTimed, run_steps, without_compiling
from disag_jax.compare import largest_difference
from disag_jax.config import Config, ConfigError
from disag_jax.errors import RunError
from disag_jax.files import check_out
from disag_jax.flops import flops_per_device
from disag_jax.geometry import enable_float64, placement_of
from disag_jax.inputs import load_inputs
from disag_jax.memory import needed_bytes
from disag_jax.nccl_log import check_network
from disag_jax.planner import search
from disag_jax.planner.hardware import Hardware, load
from disag_jax.planner.prediction import predict
from disag_jax.step import Stepper
from mesh.placement import Meshes

WARM_UP, STEPS = 2, 3

# Longer than this no case takes that ends: the process is ended, and says where it was.
CASE_SECONDS = 150

# The mark of a result that says what it is predicted for.
HARDWARE = "hardware"


@dataclasses.dataclass(frozen=True)
class Case:
    """A config to measure; what a benchmark adds to it is kept with the results.

    Attributes:
      group: cases of a group are compared with each other.
      name: the split in words; unique in the group.
      placement: "disaggregated" or "colocated".
      predicted_seconds: of a step.
      predicted_gib: memory of the worker that needs most.
    """

    group: str
    name: str
    placement: str
    predicted_seconds: float
    predicted_gib: float
    config: Config

    @classmethod
    def of(cls, group: str, config: Config, hardware: Hardware, **more) -> "Case":
        """The case with its prediction; `more`: what the benchmark adds."""
        found = predict(config, hardware)
        return cls(
            group=group,
            name=search.in_words(config),
            placement=config.split.placement.value,
            predicted_seconds=found.step_seconds,
            predicted_gib=max(memory.total for memory in found.memory.values()) / 2**30,
            config=config,
            **more,
        )


def check_start(config: Config, out: str, wanted: int | None = None) -> int:
    """The number of devices; ConfigError before anything is compiled if the run cannot begin.

    wanted: so many of those that are here; None takes all.
    """
    config.validate()
    processes.check_same_config(config)
    processes.on_first(lambda: check_out(out))
    enable_float64(config)
    here = len(jax.devices())
    num_devices = here if wanted is None else wanted
    if not 2 <= num_devices <= here:
        raise ConfigError(
            f"devices = {num_devices} must be from 2, to be split, to the {here} here"
        )
    if num_devices < here and jax.process_count() > 1:
        raise ConfigError(
            f"devices = {num_devices} must be the {here} of all processes: none may be left out"
        )
    return num_devices


def hardware_here(name: str, num_devices: int, network: str) -> Hardware:
    """What to predict for on the devices here; ConfigError if it was measured over another network.

    network: as `mesh.runtime.start` was given.
    """
    hardware = processes.on_each(lambda: load(name))
    processes.check_same_flags(hardware=f"{name} {_hash(hardware)}")
    if hardware.network != network:
        raise ConfigError(
            f"hardware {name}: network = {hardware.network!r} must be --network = {network!r}, as "
            f"python -m disag_jax.profile --network={network} measures it"
        )
    if jax.process_count() > 1:
        return hardware
    # Exactly so many, so that results of other numbers of devices are told apart.
    return dataclasses.replace(hardware, devices_per_node=num_devices)


def stepper_of(case: Case) -> Stepper:
    """With its pipeline compiled in the bucket that it begins with."""
    placement = placement_of(case.config.validate())
    stepper = Stepper(case.config, Meshes.make(placement, jax.devices()[: placement.num_devices]))
    stepper.compiled_program(stepper.chooser.current)
    return stepper


def measure(case: Case, stepper: Stepper) -> dict:
    """Trains a few steps: what is kept of them in JSON; steps that compile are not timed."""
    config = case.config
    processes.on_each(stepper.check_memory)
    seconds, metrics = run_steps(stepper, WARM_UP + STEPS)
    counts = metrics[-1]["expert_counts"]
    program = stepper.compiled_program(stepper.chooser.current)
    timed = without_compiling(seconds[WARM_UP:], metrics[WARM_UP:])
    median = statistics.median(processes.largest(timed))
    speed = config.tokens_per_step / median
    return {
        "sequence_length": config.batch.sequence_length,
        "devices": config.split.num_devices,
        "tokens_per_step": config.tokens_per_step,
        "seconds": median,
        "tokens_per_second": speed,
        "tflops_per_device": flops_per_device(config, speed) / 1e12,
        "losses": [float(of_step["loss"]) for of_step in metrics],
        "expert_load": float(counts.max() / counts.mean()),
        # By the compiler: the measured peak of a process is that of all its cases.
        "gib": max(needed_bytes(stepper.manager, program).values()) / 2**30,
    }


def _of_case(case: Case) -> dict:
    """What a result has from its case, predictions among it."""
    fields = {k: v for k, v in dataclasses.asdict(case).items() if k != "config"}
    speed = case.config.tokens_per_step / case.predicted_seconds
    return fields | {"predicted_tokens_per_second": speed}


def run(
    cases: list, out: pathlib.Path, seconds: float, threads: int, hardware: Hardware
) -> tuple[list[dict], str]:
    """Measures what `out` does not hold yet: (all results, what failed or had no time, in words).

    Results of cases that are not asked for now are among them if they are predicted for the same
    hardware; `out` keeps them all.

    As many programs as there are `threads` are compiled at once and then measured one after the
    other: what is compiled beside a measurement would disturb it. No case begins after `seconds`.
    One that does not end in `CASE_SECONDS` ends the process, and is not tried again with the same
    `out`.
    """
    began = time.perf_counter()
    marks = {(case.group, case.name): _marks(case, hardware) for case in cases}
    kept = processes.on_each(lambda: _kept(out, marks))
    done = {(result["group"], result["name"]) for result in kept}
    waiting = [case for case in cases if (case.group, case.name) not in done]
    complete = [result for result in kept if "seconds" in result]
    results, others = _predicted_anew(complete, cases, marks)
    stuck = [result for result in kept if "seconds" not in result]
    missing = [f"{one['group']}: {one['name']} did not end in an earlier run" for one in stuck]

    processes.check_same_flags(out=f"{out}, {len(kept)} results {_digest(json.dumps(kept))}")

    def write(*begun: dict):
        everything = [*results, *others, *stuck, *begun]
        processes.on_first(lambda: out.write_text(json.dumps(everything, indent=1)))

    def in_time() -> bool:
        return not processes.any_of(time.perf_counter() - began >= seconds)

    def say(what: str):
        processes.say(f"{time.perf_counter() - began:.0f} s  {what}")

    write()
    # A text that is too short is found before anything is compiled.
    processes.on_each(lambda: [load_inputs(case.config) for case in waiting])
    while waiting and in_time():
        together, waiting = waiting[:threads], waiting[threads:]
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            steppers = processes.on_each(lambda t=together: list(pool.map(stepper_of, t)))
        say(f"{len(together)} compiled")
        while together and in_time():
            case = together.pop(0)
            name = f"{case.group}: {case.name}"
            marked = marks[case.group, case.name]
            write({"group": case.group, "name": case.name} | marked)
            try:
                measured = _measure_in_time(case, steppers.pop(0), hardware)
                results.append(_of_case(case) | measured | marked)
                outcome = f"{results[-1]['seconds']:.3f} s"
            # Such as too little memory.
            except (ConfigError, NothingTimed, *_of_a_device()) as error:
                outcome = f"failed: {str(error).splitlines()[0]}"
                missing.append(f"{name} {outcome}")
            except BaseException:
                # Only a case that hangs stays begun, and one that other processes wait for.
                if jax.process_count() == 1:
                    write()
                raise
            write()
            say(f"{name}: {outcome}")
            # The next one needs the memory.
            gc.collect()
        waiting = together + waiting
    late = "; ".join(f"{case.group}: {case.name}" for case in waiting)
    if late:
        missing.append(f"no time was left for {late}: go on with the same --out")
    return results, "; ".join(missing)


def _of_a_device() -> tuple[type[Exception], ...]:
    """What a device says that lacks memory, if it ends the case alone.

    Of several processes one may fail so while the others wait for it: then the program ends.
    """
    return (jax.errors.JaxRuntimeError,) if jax.process_count() == 1 else ()


def _measure_in_time(case: Case, stepper: Stepper, hardware: Hardware) -> dict:
    """What `measure` returns; the process ends where it takes longer than any case that ends."""
    faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
    try:
        result = measure(case, stepper)
        processes.on_each(lambda: check_network(hardware.network))
        return result
    finally:
        faulthandler.cancel_dump_traceback_later()


def _marks(case: Case, hardware: Hardware) -> dict[str, str]:
    """What a result holds for, in words and as hashes."""
    return {
        "devices_here": f"{facts.devices()}, jax {jax.__version__}",
        "network": hardware.network,
        HARDWARE: f"{hardware.name} {_hash(hardware)}",
        "config": _hash(case.config),
    }


def _predicted_anew(measured: list[dict], cases: list, marks: dict) -> tuple[list, list]:
    """(results with what is predicted now, those of other cases that were predicted otherwise)."""
    by_name = {(case.group, case.name): case for case in cases}
    now = {mark[HARDWARE] for mark in marks.values()}
    results, others = [], []
    for result in measured:
        name = result["group"], result["name"]
        if name in by_name:
            results.append(result | _of_case(by_name[name]) | marks[name])
        else:
            (results if result[HARDWARE] in now else others).append(result)
    return results, others


def _hash(record) -> str:
    return _digest(json.dumps(dataclasses.asdict(record), sort_keys=True, default=str))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _kept(out: pathlib.Path, marks: dict) -> list[dict]:
    """The results of earlier runs; ConfigError if one holds for something else than this run's."""
    kept = json.loads(out.read_text()) if out.exists() else []
    any_marks = next(iter(marks.values()), {})
    for result in kept:
        # Of a case that is not measured now all but the config must be the same.
        wanted = marks.get(
            (result["group"], result["name"]), any_marks | {"config": result.get("config")}
        )
        for field, value in wanted.items():
            if field != HARDWARE and result.get(field) != value:
                raise ConfigError(
                    f"--out = {str(out)!r}, {result['group']}, {result['name']}: {field} = "
                    f"{result.get(field)!r} must be {value!r}; name another file"
                )
    return kept


def differing_losses(results: list[dict], tolerance: float, *keys: str) -> list[str]:
    """Cases on the same batches whose losses are not those of the first of them, in sentences.

    keys: fields of the results that are equal where the batches and the model are.
    """
    alike = collections.defaultdict(list)
    for result in results:
        alike[tuple(result[key] for key in keys)].append(result)
    return [
        f"{', '.join(f'{k} {first[k]}' for k in keys)}: losses of {first['name']} and "
        f"{other['name']} differ"
        for first, *others in alike.values()
        for other in others
        if not largest_difference(first["losses"], other["losses"]) <= tolerance
    ]


def conclude(wrong: list[str], missing: str, sentence: str):
    """Prints that all holds, or raises RunError with what does not and what is not measured."""
    if missing or wrong:
        raise RunError("; ".join(filter(None, [*wrong, missing])))
    processes.say(sentence)


class Flags:
    """The flags that the benchmarks share; each is an attribute."""

    def __init__(self):
        from absl import flags

        from disag_jax import cli
        from mesh import runtime

        self.config = cli.define_config_flag()
        self.hardware = flags.DEFINE_string(
            "hardware", None, "what to predict for: a name or a file"
        )
        self.out = flags.DEFINE_string(
            "out", None, "JSON file of the results, gone on with if it is there"
        )
        self.seconds = flags.DEFINE_float("seconds", 540, "begin no case after this")
        self.threads = flags.DEFINE_integer(
            "threads", 16, "programs compiled at once", lower_bound=1
        )
        self.cpu_devices = cli.define_cpu_devices_flag()
        self.network = flags.DEFINE_enum(
            "network", "default", list(runtime.NETWORKS), runtime.NETWORK_HELP
        )
        self.processes = cli.define_process_flags()
        flags.mark_flags_as_required(["config", "hardware", "out"])

    def start(self) -> tuple:
        """Starts the runtime, joined with other processes: (config, hardware, network, out)."""
        from disag_jax import cli
        from mesh import runtime

        runtime.start(self.cpu_devices.value, network=self.network.value)
        processes.join(*(flag.value for flag in self.processes), self.config.value)
        processes.check_same_flags(**cli.values_for_all())
        return self.config.value, self.hardware.value, self.network.value, self.out.value
