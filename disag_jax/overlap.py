"""Proves that communication runs under compute: from the compiled program, and a trace of GPUs.

  python -m disag_jax.overlap --config configs/balanced.py --workdir runs/overlap
  python -m disag_jax.overlap --config configs/balanced.py --workdir runs/slow --network=sockets

In the program, a steady-state transfer must begin before and end after a conditional that holds the
units of a phase; of the co-located twin an all-to-all, where `split.overlap` has it hidden. In the
trace, transfers must coincide with compute: half of what the compute is long enough to hide, and
80% where the twin's two half micro-batches hide each other's exchanges and compute is longer than
they are. NCCL's kernels of permutes and all-to-alls count, with their waiting for the partner;
those of sums and gathers do not. Exit code 1 if not.
"""

import pathlib
import re
from typing import NamedTuple

import jax

from disag_jax import trace
from disag_jax.config import Config, Overlap, SplitConfig
from disag_jax.errors import ConfigError, RunError
from disag_jax.geometry import enable_float64
from disag_jax.inputs import load_inputs
from disag_jax.nccl_log import check_network
from disag_jax.profiling import Profiler
from disag_jax.step import Stepper
from disag_jax.training import make_meshes
from disag_jax.workdir import check_new

START = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .* (?:collective-permute|all-to-all)-start\(")
DONE = re.compile(r" (?:collective-permute|all-to-all)-done\(%?([\w.-]+)\)")
SYNCHRONOUS = re.compile(r" = .* (?:collective-permute|all-to-all)\(")
CONDITIONAL = re.compile(r" conditional\(")
NAMES = r"%[^\s,}]+(?:, %[^\s,}]+)*"
CALLED = re.compile(rf"(?:computations?|calls|to_apply|body)=\{{?({NAMES})")
UNIT = re.compile(r'op_name="[^"]*(?:attention|expert)_(?:forward|backward)')
SCOPE = re.compile(r'op_name="[^"]*?((?:m2n|all_to_all)_(?:forward|backward))')

# Of the transfers that the compute of a device could hide, the share that it must.
LEAST_HIDDEN, LEAST_HIDDEN_INTERLEAVED = 0.5, 0.8

WARM_UP, TRACED = 2, 2


class Transfer(NamedTuple):
    """A permute or all-to-all of the compiled program.

    Attributes:
      computation: the function of the program that it is in.
      scope: "m2n_forward", "m2n_backward", "all_to_all_forward" or "all_to_all_backward", "" for
        another one's.
      conditionals: conditionals with a unit in a branch between its start and its end, in the
        order of execution; none where it is synchronous.
    """

    computation: str
    scope: str
    conditionals: int


def transfers(text: str) -> list[Transfer]:
    """The permutes and all-to-alls of a scheduled program in text form."""
    found, computation, running, seen = [], "", {}, 0
    with_units = _computations_with_units(text)
    for line in text.splitlines():
        if line and not line[0].isspace():
            computation, running, seen = _computation(line), {}, 0
        start, done = START.match(line), DONE.search(line)
        if start:
            running[start.group(1)] = (_scope(line), seen)
        elif SYNCHRONOUS.search(line):
            found.append(Transfer(computation, _scope(line), 0))
        elif done and done.group(1) in running:
            scope, before = running.pop(done.group(1))
            found.append(Transfer(computation, scope, seen - before))
        elif CONDITIONAL.search(line) and not with_units.isdisjoint(_called(line)):
            seen += 1
    return found


def _computations_with_units(text: str) -> set[str]:
    """Functions of a program that run operations of a unit, or call one that does."""
    found, calls, computation = set(), {}, ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            computation = _computation(line)
        elif UNIT.search(line):
            found.add(computation)
        calls.setdefault(computation, set()).update(_called(line))
    size = -1
    while size != len(found):
        size = len(found)
        found |= {caller for caller, called in calls.items() if not found.isdisjoint(called)}
    return found


def _computation(line: str) -> str:
    """The name of the function whose first line this is, with its percent sign."""
    return next((word for word in line.split(" ") if word.startswith("%")), line.split(" ")[0])


def _called(line: str) -> list[str]:
    return [name for found in CALLED.findall(line) for name in found.split(", ")]


def _scope(line: str) -> str:
    found = SCOPE.search(line)
    return found.group(1) if found else ""


def check_program(text: str, split: SplitConfig) -> list[Transfer]:
    """The transfers of the steady loop; RunError unless each has a conditional to hide under.

    In chunks, a phase's first dispatch and last combine have none, as `hideable_share` says.
    """
    if "is_scheduled=true" not in text:
        raise RunError("the program's text must be in the order of execution")
    kind = "all_to_all" if split.colocated else "m2n"
    scopes = [f"{kind}_forward", f"{kind}_backward"]
    every = transfers(text)
    # The steady loop is the one with transfers in both directions.
    found = {}
    for transfer in every:
        found.setdefault(transfer.computation, set()).add(transfer.scope)
    steady = [t for t in every if t.scope in scopes and found[t.computation].issuperset(scopes)]
    if not steady:
        raise RunError("the program must have transfers in both directions in a loop")
    num_exposed = 2 if split.overlap is Overlap.CHUNKED else 0
    bare = [t.scope for t in steady if t.conditionals == 0]
    too_many = [scope for scope in scopes if bare.count(scope) > num_exposed]
    if too_many:
        raise RunError(
            f"transfers of the steady loop must span a conditional: {', '.join(too_many)}"
            + (f" (all but {num_exposed})" if num_exposed else "")
        )
    return steady


def hideable_share(split: SplitConfig) -> float:
    """Share of a period's transfers that have some compute of their own to run under."""
    if split.overlap is not Overlap.CHUNKED:
        return 1.0
    return 1 - (1 / split.forward_chunks + 1 / split.backward_chunks) / 2


def check_trace(times: dict[str, trace.DeviceTime], split: SplitConfig):
    """RunError unless each device hid enough of the transfers that its compute could hide."""
    for device, t in times.items():
        if not t.communication:
            raise RunError(f"{device}: the trace must hold transfers")
        could = min(1.0, t.compute / t.communication)
        could *= hideable_share(split)
        is_interleaved = split.overlap is Overlap.INTERLEAVED and t.compute > t.communication
        least = (LEAST_HIDDEN_INTERLEAVED if is_interleaved else LEAST_HIDDEN) * could
        if t.hidden_share < least:
            raise RunError(
                f"{device}: {t.hidden_share:.0%} of the transfers were hidden, and {least:.0%} "
                f"must be, of the {could:.0%} that its compute could hide"
            )


def main(config: Config, workdir: str, network: str):
    """Compiles, checks, trains a few steps under a trace and checks that."""
    config.validate()
    split = config.split
    if split.colocated and split.overlap is Overlap.NONE:
        raise ConfigError("split.overlap = none must be chunked or interleaved to hide anything")
    check_new(workdir)  # two traces would be read as one
    enable_float64(config)
    stepper = Stepper(config, make_meshes(config))
    stepper.check_memory()
    program = stepper.compiled_program(stepper.chooser.current)
    steady = check_program(program.as_text(), split)
    for transfer in steady:
        print(f"{transfer.scope}: {transfer.conditionals} conditionals between start and end")
    batches, state = load_inputs(config).train, stepper.init(config.run.seed)
    profiler = Profiler(pathlib.Path(workdir), range(WARM_UP, WARM_UP + TRACED))
    for step in range(WARM_UP + TRACED):
        profiler.before_step(state)
        state, _ = stepper.train_step(state, stepper.read_batch(batches, step))
    state.wait()
    profiler.close()
    check_network(network)
    times = trace.device_times(workdir, trace.EXCHANGE)
    for device, t in times.items():
        print(
            f"{device}: {t.span:.3f} s, compute {t.compute:.3f}, transfers "
            f"{t.communication:.3f} ({t.hidden_share:.0%} hidden), exposed {t.exposed:.3f}, "
            f"idle {t.idle:.3f}"
        )
    check_trace(times, split)
    print(f"{jax.device_count()} devices: transfers run under compute")


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli
    from mesh import runtime

    _CONFIG = cli.define_config_flag()
    _WORKDIR = flags.DEFINE_string("workdir", None, "directory for the trace")
    _NETWORK = flags.DEFINE_enum("network", "default", list(runtime.NETWORKS), runtime.NETWORK_HELP)
    flags.mark_flags_as_required(["config", "workdir"])

    def _run():
        runtime.start(0, network=_NETWORK.value)
        main(_CONFIG.value, _WORKDIR.value, _NETWORK.value)

    cli.run(_run)
