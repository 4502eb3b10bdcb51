"""How much of a micro-batch's loss its attention worker should keep (`split.loss_share`)."""

import dataclasses
import math

from disag_jax.config import Config
from disag_jax.planner.costs import Costs, loss_tokens
from disag_jax.planner.prediction import simulate_step, total_seconds


def with_share(config: Config, share: float | None) -> Config:
    """The config with that `split.loss_share`."""
    return dataclasses.replace(config, split=dataclasses.replace(config.split, loss_share=share))


def with_best_share(costs: Costs) -> tuple[Costs, float]:
    """(costs with the share that is predicted to be fastest, seconds of a step with it).

    Co-located, shares stay equal. Otherwise an attention worker that is done before the experts has
    time for more: from the whole chunks with which all would end at once shares grow as long as a
    step shrinks, because a worker may be ahead by more than this period's difference. All of it is
    tried too: then nothing is exchanged.
    """
    best, config = _timed(costs, None), costs.config
    chunks = None if config.split.colocated else _even_chunks(best[0])
    if chunks is None:
        return best
    best = min(best, _timed(costs, 1.0), key=_seconds)
    tokens, chunk, last = config.batch.tokens_per_worker, config.run.loss_chunk, math.inf
    while last > _seconds(found := _timed(costs, min(1.0, chunks * chunk / tokens))):
        best, last = min(best, found, key=_seconds), _seconds(found)
        chunks += 1
    return best


def _timed(costs: Costs, share: float | None) -> tuple[Costs, float]:
    sizes = dataclasses.replace(costs.sizes, config=with_share(costs.config, share))
    found = dataclasses.replace(costs, sizes=sizes)
    return found, total_seconds(found, simulate_step(found))


def _seconds(timed: tuple[Costs, float]) -> float:
    return timed[1]


def _even_chunks(costs: Costs) -> int | None:
    """Whole chunks of the loss with which an owner ends when its helpers do; None without helpers.

    costs: with equal shares.
    """
    config, units = costs.config, costs.unit_seconds
    own, helpers, _ = loss_tokens(costs.sizes)
    if not helpers:
        return None
    ahead = max(0.0, units["expert_backward"] - units["attention_backward"])
    ahead += max(0.0, units["expert_forward"] - units["attention_forward"])
    # Later by what the tokens and the gradients are under way; each token takes as long.
    later = (ahead + 2 * costs.loss_transfer) / (units["loss"] / own)
    tokens = min(config.batch.tokens_per_worker, own + helpers * later / (helpers + 1))
    return max(1, math.floor(tokens / config.run.loss_chunk))
