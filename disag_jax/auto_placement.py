"""`split.placement = auto`: the planner chooses the split for the devices that a run finds."""

import jax

from disag_jax.config import Config, PlacementKind
from disag_jax.errors import ConfigError
from disag_jax.planner import search
from disag_jax.planner.hardware import Hardware, known, load


def resolve(config: Config, hardware_name: str | None = None) -> Config:
    """The config with its split and micro-batches chosen, or itself where it names a placement.

    The step's tokens stay, and so does all else: a resumed run may find other devices.
    """
    if config.split.placement is not PlacementKind.AUTO:
        return config
    devices = jax.devices()
    hardware = load(hardware_name) if hardware_name else _hardware_of(devices[0].device_kind)
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


def _hardware_of(device_kind: str) -> Hardware:
    """The data sheet of the devices here, by their name."""
    names = [name for name in known() if name.upper() in device_kind]
    if not names:
        raise ConfigError(
            f"split.placement = 'auto' must know the devices: {device_kind} is none of "
            f"{', '.join(known())}, and --hardware names no other"
        )
    return load(max(names, key=len))
