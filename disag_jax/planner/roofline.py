"""How many devices and network cards either role needs, by arithmetic and bandwidth alone.

The allocation of the DisagMoE paper (arXiv 2605.11005, section on resource allocation): a layer
takes T_a = max(C_a / (M P), V / (M_a B)) on M attention devices with M_a network cards, and T_f
likewise; first the slower role is made as fast as can be, then of all ways to do that the one with
the highest model FLOP/s per device is taken. `disag_jax.planner.search` simulates what this only
sketches.
"""

import dataclasses
import math

import numpy as np

from disag_jax.config import Config
from disag_jax.flops import model_flops
from mesh.placement import ExpertPlaces


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a token of a step needs, over all layers, forward and backward.

    Attributes:
      attention, expert: FLOPs of the roles (C_a, C_f).
      head: FLOPs of the output head, which all devices share.
      transfer: bytes that leave each role for the other (V); as many come back. An array has those
        of 1, 2, ... expert devices.
    """

    attention: float
    expert: float
    head: float
    transfer: float | np.ndarray


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Devices and cards of the roles; seconds of a token, and model FLOP/s over the peak's."""

    attention_devices: int
    expert_devices: int
    attention_cards: int
    expert_cards: int
    seconds: float
    mfu: float


def demand_of(config: Config, expert_workers: int, workers_per_node: int = 1) -> Demand:
    """The demand of a config whose experts are split over `expert_workers`.

    A token goes once to each worker that holds one of its experts, or, with several
    `workers_per_node`, once to each node and on from there. Shared experts travel with a copy that
    is sent anyway.
    """
    flops, model = model_flops(config), config.model
    copies = expected_copies(model.num_experts, model.top_k, -(-expert_workers // workers_per_node))
    # Out to the experts; the gradient comes back the same way.
    row = 2 * 2 * model.d_model
    return Demand(flops.attention, flops.expert, flops.head, model.num_layers * copies * row)


def demand_of_any(config: Config, num_devices: int) -> Demand:
    """The demand of a config with any number of expert devices in all its stages and replicas.

    A stage has its part of them, and a token goes to each of the part that it needs: at most one
    device for each expert.
    """
    copies, experts = config.split.replicas * config.split.stages, config.model.num_experts
    of_stage = [-(-devices // copies) for devices in range(1, num_devices)]
    made = {n: demand_of(config, n) for n in set(of_stage) if n <= experts}
    transfer = [made[n].transfer if n in made else np.inf for n in of_stage]
    return dataclasses.replace(made[1], transfer=np.array(transfer))


def expected_copies(num_experts: int, top_k: int, num_workers: int) -> float:
    """Expected workers that hold one of a token's experts, all subsets of experts as likely."""
    places = ExpertPlaces(num_experts, num_workers)
    missed = [
        math.comb(num_experts - len(places.share(worker)), top_k) for worker in range(num_workers)
    ]
    return num_workers - sum(missed) / math.comb(num_experts, top_k)


def attention_intensity(config: Config) -> float:
    """FLOPs per transferred element of an attention layer, as the paper writes it.

    (H (2 + 2/g) + 4 s) / (2 k), with attention as wide as the model (H) and without a causal half.
    """
    model = config.model
    group = model.num_heads / model.num_kv_heads
    width = model.d_model * (2 + 2 / group)
    return (width + 4 * config.batch.sequence_length) / (2 * model.top_k)


def expert_intensity(config: Config) -> float:
    """FLOPs per transferred element of an expert layer, as the paper writes it: 2 D_e."""
    return 2 * config.model.expert_width


def attention_share(config: Config, *, width: int | None = None) -> float:
    """Attention's share of a layer's FLOPs.

    width: of all query heads together; None takes the model's. The key and value heads keep their
    number per query head.
    """
    model, length = config.model, config.batch.sequence_length
    heads = width or model.num_heads * model.head_dim
    groups = heads * model.num_kv_heads / model.num_heads
    attention = 4 * model.d_model * (heads + groups) + 2 * (length + 1) * heads
    expert = model.top_k * 6 * model.d_model * model.expert_width
    return attention / (attention + expert)


def role_seconds(
    demand: Demand,
    attention_devices,
    expert_devices,
    attention_cards,
    expert_cards,
    *,
    flops_per_second: float,
    bytes_per_second: float,
):
    """(T_a, T_f) of a token; devices and cards may be arrays. bytes_per_second: of a card."""
    head = demand.head / ((attention_devices + expert_devices) * flops_per_second)
    return (
        np.maximum(
            demand.attention / (attention_devices * flops_per_second) + head,
            demand.transfer / (attention_cards * bytes_per_second),
        ),
        np.maximum(
            demand.expert / (expert_devices * flops_per_second) + head,
            demand.transfer / (expert_cards * bytes_per_second),
        ),
    )


def allocate(
    demand: Demand,
    num_devices: int,
    num_cards: int | None,
    *,
    flops_per_second: float,
    bytes_per_second: float,
    peak_flops_per_second: float,
) -> Allocation:
    """The two-phase choice: the least max(T_a, T_f), then the highest FLOP/s per device used.

    Each role has a device and a card at least. T_a and T_f together are the longest of each role's
    work and of the transfer over the role with fewer cards: no division of the cards is better than
    an even one, whatever the devices. All pairs (M, N) are tried, with devices left over or not,
    since more expert workers may mean more copies.

    num_cards: None where there is nothing to divide, because a role's links are its devices'.
    flops_per_second: that a device reaches; of `peak_flops_per_second`, which MFU is a share of.
    """
    attention, expert = np.arange(1, num_devices)[:, None], np.arange(1, num_devices)[None]
    cards = (attention, expert) if num_cards is None else (num_cards // 2, -(-num_cards // 2))
    slower = np.maximum(
        *role_seconds(
            demand, attention, expert, *cards,
            flops_per_second=flops_per_second, bytes_per_second=bytes_per_second,
        )
    )  # fmt: skip
    used = attention + expert
    slower = np.where(used <= num_devices, slower, np.inf)
    seconds = float(slower.min())
    used = np.where(slower <= seconds * (1 + 1e-12), used, num_devices + 1)
    m, n = (int(i) + 1 for i in np.unravel_index(used.argmin(), used.shape))
    total = demand.attention + demand.expert + demand.head
    mfu = total / (seconds * (m + n) * peak_flops_per_second)
    return Allocation(m, n, *((m, n) if num_cards is None else cards), seconds, mfu)
