"""Measures the devices here and writes what the planner needs to know of them.

  python -m disag_jax.profile --config configs/balanced.py --out fast.json
  python -m disag_jax.profile --config configs/balanced.py --out slow.json --units fast.json \\
    --network=sockets

The pipeline's phases and the loss are timed in some variants of the config's shape, transfers and
sums over sizes, and the optimizer; each is fitted to the work in it (disag_jax/planner/fits.py).
The devices, an even number of them, are half attention and half expert workers. With `--units` only
transfers are measured and what units lose beside them, and all else is taken from a profile of the
same devices: it does not depend on the network.
"""

import copy
import dataclasses
import os
import pathlib
import time

import jax
import numpy as np

from disag_jax import bench_phases, bench_transfer, facts, processes
from disag_jax.bench_units import Rates, measure_rates
from disag_jax.config import Config, ConfigError, PlacementKind, SplitConfig
from disag_jax.files import check_out, write_out
from disag_jax.flops import peak_flops
from disag_jax.nccl_log import check_network
from disag_jax.planner.costs import unit_work
from disag_jax.planner.fits import fit_link, fit_units, fit_update
from disag_jax.planner.hardware import MEASURED, UNITS, Hardware, Link, Transfer, load
from disag_jax.planner.prediction import check_predictable
from disag_jax.planner.sizes import Sizes
from disag_jax.state import StateManager
from disag_jax.training import make_meshes
from mesh.placement import Meshes

# Not measured here: what a step's host takes between programs, a unit's launch where a unit has no
# fit, and the share of the product's rate that attention reaches where it has none.
HOST_MILLISECONDS, UNIT_OVERHEAD_MICROSECONDS, SCORE_EFFICIENCY = 5, 50, 0.65
ASSUMED = "Assumed: host_milliseconds, unit_overhead_microseconds, score_efficiency."

UPDATES = 4
UPDATE_LAYERS = (1, 2)


def profile(
    config: Config, out: str, network: str, units: str | None = None, say=print
) -> Hardware:
    """Measures, and writes to `out` the hardware, and beside it the points it is fitted to.

    network: as `mesh.runtime.start` was given.
    units: hardware that all is taken from which does not depend on the network; None measures it.

    RunError if no line goes through the points, which are then written alone. `say` is told what is
    being measured.
    """
    shape = _one_stage(config)
    known = _devices_as_in(units, config) if units else None
    points, rates = {}, None
    if known:
        _, lost = measure_units([("as configured", shape)], say)
    else:
        say("rates of a product and of a copy")
        rates, _ = measure_rates(config)
        points, lost = measure_units(variants(shape), say)
    say("transfers")
    points |= measure_transfers(shape)
    processes.on_each(lambda: check_network(network))
    if not known:
        say("optimizer")
        points["update"] = measure_updates(shape, make_meshes(shape))
    # Minutes of measurement, kept also where the fits below fail.
    processes.on_first(lambda: write_out(points_file(out), points))
    here = dict(
        name=pathlib.Path(out).stem,
        comment=(
            f"{facts.devices()}, jax {jax.__version__}, "
            f"{time.strftime('%Y-%m-%d')}, around {config.name}. "
            + (f"All but transfers, and what is lost beside them: {units}." if known else ASSUMED)
        ),
        devices_per_node=len(jax.devices()),
        nics_per_node=len(jax.devices()),
        intra_node=fit_link(points),
        inter_node=None,
        network=network,
        lost_beside_transfers=lost,
    )
    if known:
        hardware = dataclasses.replace(known, **here)
    else:
        hardware = Hardware(**here, **_fitted_devices(config, points, rates))
    processes.on_first(lambda: write_out(pathlib.Path(out), dataclasses.asdict(hardware)))
    return hardware


def _fitted_devices(config: Config, points: dict, rates: Rates) -> dict:
    """Fields of the hardware that do not depend on the network."""
    device = jax.local_devices()[0]
    peak = peak_flops(config, device.device_kind) or rates.flops
    limit = (device.memory_stats() or {}).get("bytes_limit", _host_bytes())
    return dict(
        source=MEASURED,
        peak_tflops=peak / 1e12,
        product_tflops=rates.flops / 1e12,
        product_efficiency=1.0,
        score_efficiency=SCORE_EFFICIENCY,
        memory_gigabytes_per_second=rates.bytes / 1e9,
        memory_efficiency=1.0,
        memory_gibibytes=limit / 2**30,
        # The limit is what JAX may use, already without the rest.
        usable_memory_share=1.0,
        unit_overhead_microseconds=UNIT_OVERHEAD_MICROSECONDS,
        host_milliseconds=HOST_MILLISECONDS,
        unit_fits=fit_units(points, rates.flops / 1e12),
        update_milliseconds_per_gigaparameter=fit_update(points),
    )


def _devices_as_in(name: str, config: Config) -> Hardware:
    """Hardware to take units from; ConfigError if not measured, or on devices of other kinds."""
    known, kind = load(name), jax.devices()[0].device_kind
    here = peak_flops(config, kind)
    if here and here / 1e12 != known.peak_tflops:
        raise ConfigError(
            f"--units = {name!r}: peak_tflops = {known.peak_tflops:g} must be {here / 1e12:g}, "
            f"that of {kind}"
        )
    if known.source != MEASURED:
        raise ConfigError(
            f"--units = {name!r}: source = {known.source!r} must be {MEASURED!r}: the units of a "
            "profile are taken"
        )
    return known


def measure_units(
    shapes: list[tuple[str, Config]], say
) -> tuple[dict[str, list[dict]], dict[str, float]]:
    """(points of each unit in the shapes; what units of the first lose beside transfers).

    shapes: (label, config of one stage and two layers) of each.
    """
    labels, shapes = zip(*shapes, strict=True)
    say(f"programs of the variants: {'; '.join(labels)}")
    measured, lost = bench_phases.measure(shapes, make_meshes(shapes[0]), say)
    points = {unit: [] for unit in UNITS}
    for label, variant, times in zip(labels, shapes, measured, strict=True):
        work = unit_work(Sizes(variant, times.bucket, 1.0), times.pairs)
        for unit in UNITS:
            milliseconds = times.figures[unit].milliseconds
            points[unit].append(
                {"variant": label, "milliseconds": milliseconds, **dataclasses.asdict(work[unit])}
            )
    return points, lost


def variants(config: Config) -> list[tuple[str, Config]]:
    """Shapes around the config in which tokens, sequence, choices, experts and vocabulary vary.

    Wide experts are fewer and narrow ones chosen more often: where products and bytes grow
    together in all variants, a fit cannot tell which of them takes the time.
    """
    tokens, length = config.batch.tokens_per_worker, config.batch.sequence_length
    model = config.model
    wanted = [
        {},
        {"tokens_per_worker": tokens // 2},
        {"sequence_length": length // 2},
        {"tokens_per_worker": tokens // 2, "sequence_length": length // 4},
        {"top_k": model.top_k // 2},
        {"top_k": 2 * model.top_k, "expert_width": model.expert_width // 2},
        {"num_experts": model.num_experts // 2, "vocab_size": model.vocab_size // 2},
        {"num_experts": model.num_experts // 2, "expert_width": 2 * model.expert_width},
        {"tokens_per_worker": tokens // 4, "sequence_length": length // 4,
         "top_k": model.top_k // 2},
    ]  # fmt: skip
    found = []
    for changes in wanted:
        variant = copy.deepcopy(config)
        for field, value in changes.items():
            section = variant.batch if hasattr(variant.batch, field) else variant.model
            setattr(section, field, value)
        try:
            variant.validate()
        except ConfigError:
            continue  # too small a shape to halve
        label = ", ".join(f"{field} {value}" for field, value in changes.items())
        found.append((label or "as configured", variant))
    return found


def measure_transfers(config: Config) -> dict[str, list[dict]]:
    """Rounds, bytes in all and milliseconds of each size, by the field of `hardware.Link`."""
    twin, split = copy.deepcopy(config), config.split
    workers = split.attention_workers + split.expert_workers
    twin.split = SplitConfig(
        attention_workers=workers, expert_workers=workers, placement=PlacementKind.COLOCATED
    )
    rounds = split.attention_workers
    measured = {
        "many_to_many": (rounds, rounds, bench_transfer.measure_slots(config)),
        "all_to_all": (1, workers - 1, bench_transfer.measure_slots(twin)),
        "all_reduce": (1, 2 * (workers - 1) / workers, bench_transfer.measure_all_reduce(config)),
    }
    return {
        kind: [
            {"rounds": rounds, "num_bytes": factor * size, "milliseconds": figure.milliseconds}
            for size, figure in found
        ]
        for kind, (rounds, factor, found) in measured.items()
    }


def measure_updates(config: Config, meshes: Meshes) -> list[dict]:
    """Parameters of the device with most and milliseconds of an update, for numbers of layers."""
    points = []
    for num_layers in UPDATE_LAYERS:
        smaller = copy.deepcopy(config)
        smaller.model.num_layers = num_layers
        manager = StateManager(smaller, meshes)
        state, gradients = manager.init(0), manager.zero_gradients()
        seconds = []
        for _ in range(UPDATES):
            jax.block_until_ready((state.masters, gradients))
            began = time.perf_counter()
            state = manager.update(state, *gradients, state.router_bias, 1.0, 0.0)
            state.wait()
            seconds.append(time.perf_counter() - began)
        # A process waits for its own devices only, and may hold the role that has less to update.
        seconds = processes.largest(seconds)
        sizes = Sizes.of(smaller)
        held = num_layers * max(sizes.layer_parameters.values())
        parameters = held + sizes.vocabulary_parameters / sizes.placement.num_devices
        # The first compiles.
        points.append({"parameters": parameters, "milliseconds": 1e3 * np.median(seconds[1:])})
    return points


def points_file(out: str) -> pathlib.Path:
    """Where the measured points of a profile are, beside the hardware that `--hardware` reads."""
    return pathlib.Path(out).with_suffix(".points.json")


def summary(hardware: Hardware) -> str:
    """The fits, one a line."""
    lines = [
        f"products {hardware.product_tflops:.0f} TFLOP/s, "
        f"copies {hardware.memory_gigabytes_per_second:.0f} GB/s, optimizer "
        f"{hardware.update_milliseconds_per_gigaparameter:.1f} ms per 10^9 parameters"
    ]
    for unit, fit in hardware.unit_fits.items():
        lines.append(
            f"{unit:<20}{fit.overhead_microseconds:8.0f} us"
            f"{fit.milliseconds_per_product_tflop:8.3f} ms/TFLOP of products"
            f"{fit.milliseconds_per_score_tflop:8.3f} ms/TFLOP of scores"
            f"{fit.milliseconds_per_gigabyte:8.3f} ms/GB   R^2 {fit.r_squared:.4f}"
        )
    lost = [f"{unit} {x:.2f} s/s" for unit, x in hardware.lost_beside_transfers.items()]
    lines.append(f"lost beside transfers: {', '.join(lost) or 'none ran beside a phase'}")
    for field in dataclasses.fields(Link):
        transfer: Transfer = getattr(hardware.intra_node, field.name)
        lines.append(
            f"{field.name:<20}{transfer.latency_microseconds:8.0f} us"
            f"{transfer.gigabytes_per_second:8.1f} GB/s   R^2 {transfer.r_squared:.4f}"
        )
    return "\n".join(lines)


def main(config: Config, out: str, network: str = "default", units: str | None = None):
    """Measures, prints and writes."""
    config.validate()
    processes.check_same_config(config)
    check_predictable(config)
    processes.on_first(lambda: check_out(out))
    began = time.perf_counter()

    def say(what: str):
        processes.say(f"{time.perf_counter() - began:6.0f} s  {what}")

    processes.say(summary(profile(config, out, network, units, say)))


def _one_stage(config: Config) -> Config:
    """The config with one stage on the devices here, half of them of either role; two layers."""
    devices, own = len(jax.devices()), jax.local_device_count()
    if devices % 2:
        raise ConfigError(
            f"devices = {devices} must be an even number, half attention and half expert workers"
        )
    if own not in (1, devices):
        raise ConfigError(
            f"devices = {own} of a process must be 1 where there are several processes: links "
            "within one and between them are not measured apart"
        )
    shape = copy.deepcopy(config)
    half = devices // 2
    shape.split = SplitConfig(
        attention_workers=half, expert_workers=half, bucket_factors=config.split.bucket_factors
    )
    shape.model.num_layers, shape.batch.micro_batches = 2, 1
    return shape.validate()


def _host_bytes() -> int:
    """Memory of this machine, which simulated devices share."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli
    from mesh import runtime

    _CONFIG = cli.define_config_flag()
    _OUT = flags.DEFINE_string("out", None, "JSON file to write, for --hardware of disag_jax.plan")
    _CPU_DEVICES = cli.define_cpu_devices_flag()
    _NETWORK = flags.DEFINE_enum("network", "default", list(runtime.NETWORKS), runtime.NETWORK_HELP)
    _UNITS = flags.DEFINE_string(
        "units", None, "measure what depends on the network only; take the rest from this"
    )
    _PROCESSES = cli.define_process_flags()
    flags.mark_flags_as_required(["config", "out"])

    def _run():
        runtime.start(_CPU_DEVICES.value, network=_NETWORK.value)
        processes.join(*(flag.value for flag in _PROCESSES), _CONFIG.value)
        processes.check_same_flags(**cli.values_for_all())
        main(_CONFIG.value, _OUT.value, _NETWORK.value, _UNITS.value)

    cli.run(_run)
