"""The roofline's allocation against trying everything, and its counts against a simulation."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import qwen3_235b
from disag_jax import plan
from disag_jax.config import SplitConfig
from disag_jax.planner import hardware, roofline
from disag_jax.planner.prediction import predict
from disag_jax.planner.roofline import Demand

RATES = dict(flops_per_second=7e14, bytes_per_second=4e10, peak_flops_per_second=1e15)


@st.composite
def demands(draw, num_devices):
    """With bytes that do not depend on the expert devices, or do so in any way."""
    flops, transfer = st.floats(1e8, 1e11), st.floats(1e3, 1e7)
    size = num_devices - 1
    each = st.lists(transfer, min_size=size, max_size=size).map(np.array)
    return Demand(draw(flops), draw(flops), draw(flops) / 10, draw(transfer | each))


def brute_force(demand: Demand, num_devices: int, num_cards: int | None):
    """(least seconds, highest MFU at them) over all devices and cards, used or not."""
    found = []
    for m, n in itertools.product(range(1, num_devices), repeat=2):
        if m + n > num_devices:
            continue
        cards = itertools.product(range(1, num_cards), repeat=2) if num_cards else [(m, n)]
        transfer = demand.transfer
        if isinstance(transfer, np.ndarray):
            transfer = transfer[n - 1]
        for a, f in cards:
            if num_cards and a + f > num_cards:
                continue
            head = demand.head / (m + n) / 7e14
            t_a = max(demand.attention / m / 7e14 + head, transfer / a / 4e10)
            t_f = max(demand.expert / n / 7e14 + head, transfer / f / 4e10)
            found.append((max(t_a, t_f), m + n))
    least = min(seconds for seconds, _ in found)
    total = demand.attention + demand.expert + demand.head
    # FLOP/s that a token's FLOPs come to, of what all devices used could do: not only reach.
    return least, max(
        total / least / (used * 1e15) for seconds, used in found if seconds <= least * (1 + 1e-12)
    )


@settings(max_examples=60)
@given(st.data(), st.integers(2, 12), st.none() | st.integers(2, 7))
def test_allocation_is_optimal(data, num_devices, num_cards):
    demand = data.draw(demands(num_devices))
    found = roofline.allocate(demand, num_devices, num_cards, **RATES)
    seconds, mfu = brute_force(demand, num_devices, num_cards)
    assert found.seconds == pytest.approx(seconds, rel=1e-9)
    assert found.mfu == pytest.approx(mfu, rel=1e-9) and found.mfu <= 0.7 * (1 + 1e-9)
    used = found.attention_devices + found.expert_devices
    assert used <= num_devices
    assert found.attention_cards + found.expert_cards == (num_cards or used)
    if isinstance(demand.transfer, np.ndarray):
        transfer = demand.transfer[found.expert_devices - 1]
        demand = dataclasses.replace(demand, transfer=transfer)
    times = roofline.role_seconds(
        demand, found.attention_devices, found.expert_devices, found.attention_cards,
        found.expert_cards, flops_per_second=7e14, bytes_per_second=4e10,
    )  # fmt: skip
    assert max(times) == pytest.approx(seconds, rel=1e-9)


def test_bytes_are_those_of_the_expert_workers_that_a_stage_has():
    config = qwen3_235b.get_config()
    config.split.replicas, config.split.stages = 2, 2
    demand = roofline.demand_of_any(config, 1024)
    assert demand.attention == roofline.demand_of(config, 7).attention
    for devices, workers in ((1, 1), (4, 1), (5, 2), (64, 16), (512, 128)):
        expected = roofline.demand_of(config, workers).transfer
        assert demand.transfer[devices - 1] == expected, devices
    # There are 128 experts.
    assert len(demand.transfer) == 1023 and np.isinf(demand.transfer[512:]).all()


def test_the_plan_has_the_roofline_of_the_workers_that_it_names():
    """Its MFU is of the peak, as the step's; cards are divided only where there are any."""
    config = qwen3_235b.get_config()
    config.split = SplitConfig(stages=32, attention_workers=1, expert_workers=3)
    device = hardware.load("h800")
    words = plan._roofline(predict(config, device))
    pattern = r"attention (\d+) : experts (\d+) of 128 devices, (\d+) a stage .*MFU (\d+)%"
    m, n, workers, mfu = map(int, re.match(pattern, words).groups())
    assert -(-n // 32) == workers
    demand = roofline.demand_of(config, workers)
    work = (demand.attention / m, demand.expert / n)
    seconds = max(*(demand.head / (m + n) + w for w in work)) / (0.75 * 989e12)
    seconds = max(seconds, demand.transfer / (64 * 0.9 * 50e9))
    total = demand.attention + demand.expert + demand.head
    assert mfu == round(100 * total / seconds / (m + n) / 989e12) <= 75
    assert "Network cards 64 : 64: to divide them so, name each process's in its NCCL" in words
    config.split = SplitConfig(attention_workers=3, expert_workers=4)
    words = plan._roofline(predict(config, device))
    assert "of 7 devices" in words and "cards" not in words and "NCCL" not in words


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
