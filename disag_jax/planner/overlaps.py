"""What a co-located twin may overlap, and which way is predicted to be the fastest."""

import dataclasses

from disag_jax.config import Config, Overlap, Recompute
from disag_jax.errors import ConfigError
from disag_jax.planner import twin
from disag_jax.planner.costs import Costs
from disag_jax.planner.hardware import Hardware
from disag_jax.planner.memory_model import missing_bytes, missing_in_words
from disag_jax.planner.prediction import Prediction, assumed_load_factor, predict
from disag_jax.planner.sizes import Sizes

# Chunks more than this are not tried: each pads its groups to whole tiles and reads all weights.
MOST_CHUNKS = 16


def ways(config: Config) -> list[Config]:
    """The config with each overlap that it can have; itself, without any, if it is not co-located.

    Chunks are in the config's own degrees, or the fewest that divide its tokens:
    `with_best_degrees` finds better ones for some hardware.
    """
    split = config.split
    found = [_with(config, Overlap.NONE)]
    if not split.colocated or split.expert_workers == 1:
        return found
    degrees = split.forward_chunks, split.backward_chunks
    tokens, divisors = config.batch.tokens_per_worker, degrees_of(config)[1:]
    if split.overlap is Overlap.CHUNKED and all(tokens % degree == 0 for degree in degrees):
        found.append(_with(config, Overlap.CHUNKED, *degrees))
    elif divisors:
        found.append(_with(config, Overlap.CHUNKED, divisors[0], divisors[0]))
    if config.batch.micro_batches > 1:
        found.append(_with(config, Overlap.INTERLEAVED))
    return found


def degrees_of(config: Config) -> list[int]:
    """Degrees of chunks that divide a micro-batch's tokens, from 1 to `MOST_CHUNKS`."""
    tokens = config.batch.tokens_per_worker
    return [degree for degree in range(1, MOST_CHUNKS + 1) if tokens % degree == 0]


def with_best_degrees(
    config: Config, hardware: Hardware, load_factor: float | None = None
) -> Config | None:
    """A chunked config with the degrees that FSMoE's model finds best; None if one piece is.

    Times are those of a layer. load_factor: as `prediction.predict` takes it.
    """
    whole = _with(config, Overlap.NONE)
    costs = Costs(Sizes.of(whole, assumed_load_factor(whole, load_factor)), hardware)
    is_alike = config.run.recompute is Recompute.NONE
    degrees = twin.best_degrees(costs, degrees_of(config), alike=is_alike)
    return None if degrees == (1, 1) else _with(config, Overlap.CHUNKED, *degrees)


def choose(config: Config, hardware: Hardware, load_factor: float | None = None) -> Prediction:
    """The fastest way that fits, predicted; ConfigError if none fits.

    config: co-located and valid; its own overlap does not count.
    """
    found = []
    for way in ways(_with(config, Overlap.NONE)):
        if way.split.overlap is Overlap.CHUNKED:
            way = with_best_degrees(way, hardware, load_factor)
        if way is not None:
            found.append(predict(way.validate(), hardware, load_factor))
    fitting = [one for one in found if one.fits]
    if not fitting:
        missing = missing_in_words(missing_bytes(found[0].memory, hardware))
        raise ConfigError(
            f"split.overlap = 'auto' must find a way that fits {hardware.name}: with none, "
            f"{missing}"
        )
    return min(fitting, key=lambda one: one.step_seconds)


def _with(config: Config, overlap: Overlap, forward: int = 1, backward: int = 1) -> Config:
    split = dataclasses.replace(
        config.split, overlap=overlap, forward_chunks=forward, backward_chunks=backward
    )
    return dataclasses.replace(config, split=split)
