"""`split.placement` or `split.overlap` = auto: the planner chooses for the devices that are here.

The placement's choice is the whole split, the overlap's that of a co-located split that is named.
"""

import dataclasses
import re
import socket
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from disag_jax import processes
from disag_jax.config import Config, Overlap, PlacementKind
from disag_jax.config_rules import require
from disag_jax.errors import ConfigError
from disag_jax.planner import overlaps, search
from disag_jax.planner.hardware import Hardware, known, load
from disag_jax.planner.prediction import check_predictable

# How far the gigabytes in a device's name may be from its data sheet's, as a share: 80 GB devices
# have 79.2 GiB.
SAME_MEMORY = 0.05


def resolve(config: Config, hardware_name: str | None = None) -> Config:
    """The config with its split and micro-batches, or its overlap, chosen; itself if all are named.

    The step's tokens stay, and so does all else: a resumed run may find other devices.
    """
    if config.split.placement is PlacementKind.AUTO:
        return _with_split(config, hardware_name)
    if config.split.overlap is Overlap.AUTO:
        return _with_overlap(config, hardware_name)
    return config


def _with_split(config: Config, hardware_name: str | None) -> Config:
    devices = jax.devices()
    hardware = _hardware("split.placement", hardware_name)
    # The split that stands there counts for its tokens alone.
    config = search.without_auto(config)
    fixed = search.Fixed(tokens_per_step=config.tokens_per_step, recompute=config.run.recompute)
    found = [
        best
        for placement in search.PLACEMENTS
        if (best := search.search(config, hardware, len(devices), placement, fixed))
    ]
    if not found:
        raise search.refusal(config, hardware, len(devices), fixed)
    best = min(found, key=lambda one: one.seconds_per_token)
    print(
        f"split.placement = auto: {best.config.split.placement}, {search.in_words(best.config)}; "
        f"{best.step_seconds:.3f} s a step predicted on {len(devices)} x {hardware.name}"
    )
    return best.config


def _with_overlap(config: Config, hardware_name: str | None) -> Config:
    rule = "none with split.placement = disaggregated, whose transfers are always hidden"
    require(config.split.colocated, "split.overlap", config.split.overlap, rule)
    config = search.without_auto(config)
    check_predictable(config)
    hardware = _hardware("split.overlap", hardware_name)
    best = overlaps.choose(config, hardware)
    print(
        f"split.overlap = auto: {best.config.split.overlap_in_words}; {best.step_seconds:.3f} s a "
        f"step predicted on {config.split.num_devices} x {hardware.name}"
    )
    return best.config


def _hardware(field: str, name: str | None) -> Hardware:
    """What a user names; else what is here."""
    if not name:
        return _hardware_here(field)
    hardware = load(name)
    # A profile knows as many devices of a node as it was measured on.
    return hardware.on_one_node(len(jax.devices())) if jax.process_count() == 1 else hardware


def _hardware_here(field: str) -> Hardware:
    """The data sheet of the devices here, with as many a node and as much memory as there are.

    field: what is auto.
    """
    devices = jax.local_devices()
    # Refused by all processes alike, or some would wait for the others below.
    sheet = processes.on_each(lambda: _hardware_of(devices[0].device_kind, field))
    megabytes = (devices[0].memory_stats() or {}).get("bytes_limit", 0) >> 20
    host = zlib.crc32(socket.gethostname().encode()) >> 1
    here = np.array([host, len(devices), megabytes], np.int32)
    # A host may have a process for each device. All processes must choose the same split.
    everyone = np.atleast_2d(multihost_utils.process_allgather(here))
    hosts, devices_on, megabytes_on = everyone.T
    return _as_found(sheet, _fewest_on_a_host(hosts, devices_on), int(megabytes_on.min()))


def _fewest_on_a_host(hosts, devices_on) -> int:
    """Devices of the host with fewest, from each process's host and number of devices."""
    return min(int(devices_on[hosts == host].sum()) for host in set(hosts.tolist()))


def _as_found(sheet: Hardware, devices_per_node: int, megabytes: int) -> Hardware:
    """The data sheet with the hosts' devices; `megabytes` (MiB) are what JAX may use, 0 unknown."""
    nics = sheet.nics_per_node * devices_per_node / sheet.devices_per_node
    found = dataclasses.replace(
        sheet, devices_per_node=devices_per_node, nics_per_node=max(1, round(nics))
    )
    if megabytes:
        found = dataclasses.replace(
            found, memory_gibibytes=megabytes / 1024, usable_memory_share=1.0
        )
    return found


def _hardware_of(device_kind: str, field: str) -> Hardware:
    """The data sheet of a kind of device: whole SXM modules, with the memory of the sheet."""
    words = re.split(r"[ -]", device_kind.upper())
    sizes = [int(word[:-2]) for word in words if re.fullmatch(r"\d+GB", word)]
    for name in known():
        if name.upper() not in words or {"MIG", "PCIE", "NVL"} & set(words):
            continue
        sheet = load(name)
        if all(abs(size / sheet.memory_gibibytes - 1) < SAME_MEMORY for size in sizes):
            return sheet
    raise ConfigError(
        f"{field} = 'auto' must know the devices: {device_kind} is none of {', '.join(known())}, "
        "whole and with NVLink, and --hardware names no other"
    )
