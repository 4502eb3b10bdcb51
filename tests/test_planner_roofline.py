"""The roofline's allocation against trying everything, and its counts against a simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import qwen3_235b
from disag_jax.planner import roofline
from disag_jax.planner.roofline import Demand

RATES = dict(flops_per_second=7e14, bytes_per_second=4e10)


@st.composite
def demands(draw):
    flops = st.floats(1e8, 1e11)
    return Demand(draw(flops), draw(flops), draw(flops) / 10, draw(st.floats(1e3, 1e7)))


def brute_force(demand: Demand, num_devices: int, num_cards: int):
    """(least seconds, highest MFU at them) over all devices and cards, used or not."""
    found = []
    for m, n in itertools.product(range(1, num_devices), repeat=2):
        if m + n > num_devices:
            continue
        for a, f in itertools.product(range(1, num_cards), repeat=2):
            if a + f > num_cards:
                continue
            head = demand.head / (m + n) / 7e14
            t_a = max(demand.attention / m / 7e14 + head, demand.transfer / a / 4e10)
            t_f = max(demand.expert / n / 7e14 + head, demand.transfer / f / 4e10)
            total = demand.attention + demand.expert + demand.head
            found.append((max(t_a, t_f), m + n, total))
    least = min(seconds for seconds, *_ in found)
    return least, max(
        total / (least * used * 7e14)
        for seconds, used, total in found
        if seconds <= least * (1 + 1e-12)
    )


@settings(max_examples=60)
@given(demands(), st.integers(2, 12), st.integers(2, 7))
def test_allocation_is_optimal(demand, num_devices, num_cards):
    found = roofline.allocate(demand, num_devices, num_cards, **RATES)
    seconds, mfu = brute_force(demand, num_devices, num_cards)
    assert found.seconds == pytest.approx(seconds, rel=1e-9)
    assert found.mfu == pytest.approx(mfu, rel=1e-9)
    assert found.attention_devices + found.expert_devices <= num_devices
    assert found.attention_cards + found.expert_cards == num_cards
    times = roofline.role_seconds(
        demand, found.attention_devices, found.expert_devices, found.attention_cards,
        found.expert_cards, **RATES,
    )  # fmt: skip
    assert max(times) == pytest.approx(seconds, rel=1e-9)


@pytest.mark.parametrize(("experts", "top_k", "workers"), [(8, 2, 4), (7, 3, 3), (16, 4, 1)])
def test_expected_copies_are_the_mean_over_all_choices(experts, top_k, workers):
    worker_of = np.concatenate(
        [[w] * len(roofline.ExpertPlaces(experts, workers).share(w)) for w in range(workers)]
    )
    subsets = itertools.combinations(range(experts), top_k)
    counts = [len({worker_of[e] for e in chosen}) for chosen in subsets]
    copies = roofline.expected_copies(experts, top_k, workers)
    assert copies == pytest.approx(np.mean(counts))


def test_fewer_copies_travel_to_nodes_than_to_workers():
    config = qwen3_235b.get_config()
    workers, nodes = (roofline.demand_of(config, 16, per_node) for per_node in (1, 8))
    assert nodes.transfer < workers.transfer
    assert nodes.transfer == roofline.demand_of(config, 2).transfer


def test_attention_share_of_the_model_is_that_of_its_flops():
    config = qwen3_235b.get_config()
    config.model.num_experts, config.model.num_shared_experts = 128, 0
    demand = roofline.demand_of(config, 1)
    share = demand.attention / (demand.attention + demand.expert)
    # The share leaves the router out.
    assert roofline.attention_share(config) == pytest.approx(share, rel=0.01)


def test_longer_sequences_move_devices_to_attention():
    config = qwen3_235b.get_config()
    devices = []
    for length in (4096, 32_768):
        config.batch.sequence_length = length
        found = roofline.allocate(roofline.demand_of(config, 16, 8), 32, 32, **RATES)
        devices.append(found.attention_devices / found.expert_devices)
    assert devices[1] > 1.4 * devices[0]
