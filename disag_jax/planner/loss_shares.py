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
    time for more: tried are the two numbers of whole chunks around that with which all end at once.
    """
    tried = [with_share(costs.config, None), *_around_even(costs)]
    found = []
    for config in tried:
        one = dataclasses.replace(costs, sizes=dataclasses.replace(costs.sizes, config=config))
        found.append((one, total_seconds(one, simulate_step(one))))
    return min(found, key=lambda pair: pair[1])


def _around_even(costs: Costs) -> list[Config]:
    """Configs with the whole chunks below and above the share with which all would end at once."""
    config, units = costs.config, costs.unit_seconds
    own, helpers, _ = loss_tokens(costs.sizes)
    tokens, chunk = config.batch.tokens_per_worker, config.run.loss_chunk
    if config.split.colocated or not helpers:
        return []
    ahead = max(0.0, units["expert_backward"] - units["attention_backward"])
    ahead += max(0.0, units["expert_forward"] - units["attention_forward"])
    # Later by what the tokens and the gradients are under way; each token takes as long.
    later = (ahead + 2 * costs.loss_transfer) / (units["loss"] / own)
    even = (tokens + helpers * later) / (helpers + 1)
    around = {math.floor(even / chunk), math.ceil(even / chunk)}
    shares = {min(1.0, number * chunk / tokens) for number in around if number > 0}
    return [with_share(config, share) for share in sorted(shares)]
