"""Hardware files: the project's own are valid, and every bad field is named in one sentence."""

import copy
import dataclasses
import json

import pytest

from disag_jax.errors import ConfigError
from disag_jax.flops import PEAK_TFLOPS
from disag_jax.planner import hardware


@pytest.fixture
def record():
    return json.loads((hardware.DIRECTORY / "h800.json").read_text())


def test_the_projects_own_files_are_valid_and_marked():
    assert hardware.known() == ["a100", "h100", "h100x2_nvlink", "h200", "h800"]
    for name in hardware.known():
        found = hardware.load(name)
        assert found.name == name
        assert found.source == ("measured" if "x" in name else "datasheet")
        assert found.peak_tflops == PEAK_TFLOPS[name.upper().split("X")[0]]


def test_what_is_written_is_read_back(record, tmp_path):
    record["lost_beside_transfers"] = {"expert_backward": 0.0}  # as a measurement may find
    found = hardware.read(record, "h800")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(dataclasses.asdict(found)))
    assert hardware.load(str(path)) == found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("peak_tflops",), -1, r"peak_tflops = -1 must be greater than 0"),
        (("peak_tflops",), "fast", r"peak_tflops = 'fast' must be a finite number"),
        (("peak_tflops",), None, r"peak_tflops = None must be a finite number"),
        (("peak_tflops",), True, r"peak_tflops = True must be a finite number"),
        (("devices_per_node",), 7.5, r"devices_per_node = 7.5 must be an int"),
        (("memory_efficiency",), 1.2, r"memory_efficiency = 1.2 must be at most 1"),
        (("host_milliseconds",), -3, r"host_milliseconds = -3 must be 0 or more"),
        (("source",), "rumour", r"source = 'rumour' must be one of datasheet, measured"),
        (("name",), 3, r"name = 3 must be a string"),
        (("name",), " ", r"name = ' ' must be not empty"),
        (("peak_tflops",), 10**400, r"peak_tflops = an integer of 1329 bits must be a finite numb"),
        (("devices_per_node",), -(10**4000), r"devices_per_node = an integer of \d+ bits must be"),
        (("inter_node", "all_reduce", "gigabytes_per_second"), 10**309,
         r"inter_node, all_reduce: gigabytes_per_second = an integer of 1027 bits must be a "),
        (("bandwidth",), 3, r"bandwidth = 3 must be a known field: name, source"),
        (("unit_fits",), [], r"unit_fits = \[\] must be an object"),
        (("unit_fits",), {"mlp": {}}, r"mlp: overhead_microseconds = None must be given"),
        (("lost_beside_transfers",), {"loss": -0.1}, r"loss = -0.1 must be 0 or more"),
        (("intra_node",), None, r"intra_node = None must be an object"),
        (("intra_node", "all_to_all", "latency_microseconds"), -1,
         r"intra_node, all_to_all: latency_microseconds = -1 must be 0 or more"),
        (("inter_node", "all_reduce", "gigabytes_per_second"), 0,
         r"inter_node, all_reduce: gigabytes_per_second = 0 must be greater than 0"),
    ],
)  # fmt: skip
def test_bad_fields_are_named(record, path, value, message):
    *parents, last = path
    place = record
    for name in parents:
        place = place[name]
    place[last] = value
    with pytest.raises(ConfigError, match=f"hardware h800.*{message}"):
        hardware.read(record, "h800")


def test_missing_fields_are_named(record):
    for name in record:
        less = copy.deepcopy(record)
        del less[name]
        if name in ("lost_beside_transfers", "update_milliseconds_per_gigaparameter"):
            hardware.read(less, "h800")
            continue
        with pytest.raises(ConfigError, match=f"hardware h800: {name} = None must be given"):
            hardware.read(less, "h800")


def test_a_measured_profile_must_hold_what_was_measured():
    whole = dataclasses.asdict(hardware.load("h100x2_nvlink"))
    for unit in hardware.UNITS:
        less = copy.deepcopy(whole)
        del less["unit_fits"][unit]
        with pytest.raises(ConfigError, match=f"unit_fits = '{unit}' must be given where source"):
            hardware.read(less, "mine")
        less["unit_fits"][unit] = whole["unit_fits"][unit] | dict.fromkeys(
            (name for name in whole["unit_fits"][unit] if name.startswith(("milli", "over"))), 0
        )
        with pytest.raises(ConfigError, match=f"'{unit}' must be a fit with a coefficient greater"):
            hardware.read(less, "mine")
        less["unit_fits"][unit]["milliseconds_per_product_tflop"] = 1e308
        with pytest.raises(ConfigError, match=r"product_tflop = 1e\+308 must be at most"):
            hardware.read(less, "mine")
    whole["update_milliseconds_per_gigaparameter"] = None
    with pytest.raises(ConfigError, match="gigaparameter = None must be given where source"):
        hardware.read(whole, "mine")


def test_an_unknown_unit_is_refused(record):
    fit = dict.fromkeys((f.name for f in dataclasses.fields(hardware.UnitFit)), 1)
    record["unit_fits"] = {"mlp": fit}
    with pytest.raises(ConfigError, match="'mlp' must be of the units attention_forward"):
        hardware.read(record, "h800")
    record |= {"unit_fits": {}, "lost_beside_transfers": {"mlp": 1.1}}
    with pytest.raises(ConfigError, match="lost_beside_transfers = 'mlp' must be of the units"):
        hardware.read(record, "h800")


def test_unknown_hardware_lists_the_known(tmp_path):
    with pytest.raises(
        ConfigError, match="'b300' must be one of a100, h100, h100x2_nvlink, h200, h800, or a"
    ):
        hardware.load("b300")
    for text in ("not json", '{"peak_tflops": NaN}', "[1]"):
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"hardware .*bad\.json"):
            hardware.load(str(path))
