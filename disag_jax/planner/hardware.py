"""What a cluster can do, from its data sheets or measured by `python -m disag_jax.profile`.

A file holds one `Hardware` as JSON, with the same field names. Nothing here starts JAX.
"""

import dataclasses
import functools
import json
import math
import pathlib
import types
import typing

from disag_jax.errors import ConfigError

DIRECTORY = pathlib.Path(__file__).parent / "hardware"
MEASURED = "measured"
SOURCES = ("datasheet", MEASURED)

# The units of work that a profile measures, by the names of its fits.
UNITS = ("attention_forward", "attention_backward", "expert_forward", "expert_backward", "loss")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Time of one kind of transfer: latency + bytes / (rate * efficiency).

    Attributes:
      gigabytes_per_second: of one device (between nodes: one network card), each way.
      latency_microseconds: of one round or collective, however little it moves.
      efficiency: share of the rate that large messages reach; 1 where the rate was measured.
      r_squared: of the fit, where there was one.
    """

    gigabytes_per_second: float
    latency_microseconds: float
    efficiency: float = 1.0
    r_squared: float | None = None

    def seconds(self, num_bytes: float, rounds: int = 1) -> float:
        """Seconds of `num_bytes` in all, sent one after the other in `rounds` parts."""
        rate = 1e9 * self.gigabytes_per_second * self.efficiency
        return rounds * 1e-6 * self.latency_microseconds + num_bytes / rate


@dataclasses.dataclass(frozen=True)
class Link:
    """How devices are connected: the three kinds of transfer, which libraries do differently well.

    Attributes:
      many_to_many: a round of a transfer between submeshes (mesh/m2n.py), or to the next stage.
      all_to_all: bytes are those that leave a device.
      all_reduce: bytes are those that a ring moves, 2 (n - 1) / n of the array's.
    """

    many_to_many: Transfer
    all_to_all: Transfer
    all_reduce: Transfer

    def scaled(self, factor: float) -> "Link":
        """The link with `factor` times the rates."""
        transfers = (self.many_to_many, self.all_to_all, self.all_reduce)
        return Link(
            *(
                dataclasses.replace(one, gigabytes_per_second=factor * one.gigabytes_per_second)
                for one in transfers
            )
        )


@dataclasses.dataclass(frozen=True)
class UnitFit:
    """Measured time of a unit: a sum over the kinds of work in it (`costs.Work`).

    The coefficients are a least-squares fit with none below 0; r_squared is over `num_points`
    measured times.
    """

    overhead_microseconds: float
    milliseconds_per_product_tflop: float
    milliseconds_per_score_tflop: float
    milliseconds_per_gigabyte: float
    r_squared: float
    num_points: int

    def seconds(self, products: float, scores: float, num_bytes: float) -> float:
        """Seconds of this many FLOPs in products and in attention scores, and bytes moved."""
        return 1e-3 * (
            1e-3 * self.overhead_microseconds
            + self.milliseconds_per_product_tflop * products / 1e12
            + self.milliseconds_per_score_tflop * scores / 1e12
            + self.milliseconds_per_gigabyte * num_bytes / 1e9
        )


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of device, and the cluster that it stands in.

    Attributes:
      name, source, comment: what this is, "datasheet" or "measured", and where figures come from.
      peak_tflops: bfloat16 TFLOP/s that MFU is measured against.
      product_tflops: TFLOP/s of a large matrix product: the data sheet's, or measured.
      product_efficiency: share of it that the units' products reach.
      score_efficiency: share of it that fused causal attention reaches, whose masked half counts
        for nothing.
      memory_gigabytes_per_second, memory_efficiency: the same of device memory.
      memory_gibibytes: of one device.
      usable_memory_share: what JAX may take of it (mesh/runtime.py).
      unit_overhead_microseconds: of a unit's or the loss's launch, whatever its size.
      host_milliseconds: of a step, between its programs.
      devices_per_node, nics_per_node: rates of `inter_node` are those of one network card, of which
        a device has nics / devices.
      intra_node, inter_node: the links; None where there is one node.
      unit_fits: measured times by unit (`UNITS`), of measured hardware all; an absent unit's time
        follows from the rates.
      lost_beside_transfers: seconds that a unit takes longer, measured, for each second of a
        transfer that runs beside it; 0 for an absent unit. Transfers take processors and memory
        traffic while they last, not a share of the unit. Of a transfer longer than half a unit a
        part was sent, which runs beside the unit's first kernels: that they are like the others is
        assumed.
      update_milliseconds_per_gigaparameter: measured time of the optimizer and of packing weights;
        None takes the bytes that they move.
      network: what the links were measured over, by its name in mesh/runtime.py.
    """

    name: str
    source: str
    comment: str
    peak_tflops: float
    product_tflops: float
    product_efficiency: float
    score_efficiency: float
    memory_gigabytes_per_second: float
    memory_efficiency: float
    memory_gibibytes: float
    usable_memory_share: float
    unit_overhead_microseconds: float
    host_milliseconds: float
    devices_per_node: int
    nics_per_node: int
    intra_node: Link
    inter_node: Link | None
    unit_fits: dict[str, UnitFit]
    lost_beside_transfers: dict[str, float] = dataclasses.field(default_factory=dict)
    update_milliseconds_per_gigaparameter: float | None = None
    network: str = "default"

    @property
    def usable_bytes(self) -> float:
        return self.memory_gibibytes * 2**30 * self.usable_memory_share

    @property
    def bytes_per_second(self) -> float:
        return 1e9 * self.memory_gigabytes_per_second * self.memory_efficiency

    def on_one_node(self, num_devices: int) -> "Hardware":
        """With at least so many devices a node, which the links within it reach alike."""
        return dataclasses.replace(self, devices_per_node=max(self.devices_per_node, num_devices))

    def unit_seconds(self, unit: str, products: float, scores: float, num_bytes: float) -> float:
        """Seconds of a unit, from its fit or from the rates.

        From the rates, its products, its attention scores and its passes over memory run one after
        the other, as separate kernels do.
        """
        if unit in self.unit_fits:
            return self.unit_fits[unit].seconds(products, scores, num_bytes)
        peak = 1e12 * self.product_tflops
        return (
            1e-6 * self.unit_overhead_microseconds
            + products / (peak * self.product_efficiency)
            + scores / (peak * self.score_efficiency)
            + num_bytes / self.bytes_per_second
        )


def known() -> list[str]:
    """Names of the hardware in the project."""
    return sorted(path.stem for path in DIRECTORY.glob("*.json"))


def load(name: str) -> Hardware:
    """Hardware by its name, or from a JSON file; ConfigError if it is neither."""
    path = DIRECTORY / f"{name}.json" if name in known() else pathlib.Path(name)
    if not path.is_file():
        raise ConfigError(
            f"hardware = {name!r} must be one of {', '.join(known())}, or a file that "
            "disag_jax.profile wrote"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError) as error:
        raise ConfigError(f"hardware = {name!r} must be a JSON file: {error}") from error
    return read(record, name)


def read(record, name: str) -> Hardware:
    """Hardware from what JSON holds; ConfigError names the first bad field. `name`: of the file."""
    hardware = _dataclass(Hardware, record, f"hardware {name}")
    fail = functools.partial(_fail, f"hardware {name}")
    if hardware.source not in SOURCES:
        fail("source", hardware.source, f"one of {', '.join(SOURCES)}")
    for field in ("unit_fits", "lost_beside_transfers"):
        for unit in getattr(hardware, field):
            if unit not in UNITS:
                fail(field, unit, f"of the units {', '.join(UNITS)}")
    if hardware.source == MEASURED:
        given = f"given where source = {MEASURED!r}"
        for unit in UNITS:
            if unit not in hardware.unit_fits:
                fail("unit_fits", unit, given)
        if hardware.update_milliseconds_per_gigaparameter is None:
            fail("update_milliseconds_per_gigaparameter", None, given)
    for unit, fit in hardware.unit_fits.items():
        if fit.seconds(1.0, 1.0, 1.0) == 0:
            fail("unit_fits", unit, "a fit with a coefficient greater than 0")
    return hardware


def _dataclass(kind, record, where: str):
    if not isinstance(record, dict):
        raise ConfigError(f"{where} = {record!r} must be an object with fields")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in record:
        if name not in fields:
            _fail(where, name, record[name], f"a known field: {', '.join(fields)}")
    values = {}
    for name, field in fields.items():
        if name in record:
            values[name] = _value(field.type, record[name], where, name)
        elif field.default is field.default_factory is dataclasses.MISSING:
            _fail(where, name, None, "given")
    return kind(**values)


def _value(kind, value, where: str, name: str):
    """A field's value, checked; numbers are finite, and rates greater than 0."""
    if isinstance(kind, types.UnionType):  # of one type and None
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, f"{where}, {name}")
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            _fail(where, name, value, "an object")
        item = typing.get_args(kind)[1]
        return {key: _value(item, one, f"{where}, {name}", key) for key, one in value.items()}
    if kind is str:
        if not isinstance(value, str):
            _fail(where, name, value, "a string")
        if name == "name" and not value.strip():
            _fail(where, name, value, "not empty")
        return value
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not _is_finite(value):
        _fail(where, name, value, "an int" if kind is int else "a finite number")
    if name in _MAY_BE_ZERO:
        if value < 0:
            _fail(where, name, value, "0 or more")
    elif value <= 0:
        _fail(where, name, value, "greater than 0")
    if value > _MOST:
        _fail(where, name, value, f"at most {_MOST:g}")
    if name in _SHARES and value > 1:
        _fail(where, name, value, "at most 1")
    return value


# With larger numbers times are infinite.
_MOST = 1e12
_SHARES = (
    "efficiency", "product_efficiency", "score_efficiency", "memory_efficiency",
    "usable_memory_share", "r_squared",
)  # fmt: skip
_MAY_BE_ZERO = (
    "latency_microseconds", "unit_overhead_microseconds", "host_milliseconds", "r_squared",
    "overhead_microseconds", "milliseconds_per_product_tflop", "milliseconds_per_score_tflop",
    "milliseconds_per_gigabyte", *UNITS,  # of `lost_beside_transfers`
)  # fmt: skip


def _is_finite(value: int | float) -> bool:
    """Whether it is a number that a float holds; JSON's integers have any number of digits."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _fail(where: str, name: str, value, rule: str):
    # The largest integers are not even printed whole.
    is_huge = isinstance(value, int) and value.bit_length() > 1024
    shown = f"an integer of {value.bit_length()} bits" if is_huge else repr(value)
    raise ConfigError(f"{where}: {name} = {shown} must be {rule}")


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number")
