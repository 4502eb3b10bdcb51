"""Advice: what limits the slower placement, and larger changes that turn the order around."""

import dataclasses
import re

import pytest

from configs import balanced, qwen3_235b
from disag_jax import plan
from disag_jax.config import PlacementKind
from disag_jax.planner import advice, hardware, search
from disag_jax.planner.prediction import predict
from disag_jax.planner.search import Fixed

H100 = hardware.load("h100")
ONE_NODE = dataclasses.replace(H100, inter_node=None)
APART, TOGETHER = PlacementKind.DISAGGREGATED, PlacementKind.COLOCATED


def small(sequence_length=1024, **model):
    config = balanced.get_config()
    for name, value in model.items():
        setattr(config.model, name, value)
    config.batch.sequence_length = sequence_length
    config.batch.tokens_per_worker, config.batch.micro_batches = 4 * sequence_length, 8
    return config.validate()


def best(config, device, num_devices):
    return {kind: search.search(config, device, num_devices, kind) for kind in search.PLACEMENTS}


def test_the_shares_of_a_step_add_up_to_it(prediction):
    shares = advice._shares(prediction)
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) >= -1e-9 and shares["work"] > 0.3
    assert prediction.config.split.colocated == (shares["uneven"] == 0)


def test_uneven_roles_and_hidden_communication_are_named_where_nothing_helps():
    """Experts have six times as much to do, and a node of two devices has no even division."""
    node = dataclasses.replace(ONE_NODE, devices_per_node=2)
    made = plan.make_plan(small(top_k=16), node, 2).advice
    assert made.placement is TOGETHER and not made.changes
    assert made.limit.startswith("communication on one node is already hidden or short (")
    (times,) = re.findall(r"each of its expert workers has (\S+) times as much to do", made.limit)
    (ratio,) = re.findall(r"an attention worker has (\S+) times the work", made.balance)
    assert float(times) == pytest.approx(1 / float(ratio), rel=0.05)
    assert f"the other placement's best split, because {made.limit}; with" in made.sentence
    for words in ("4 times the tokens per step", "2 times the memory"):
        assert words in made.sentence
    # There is no network to more devices.
    assert "devices, with" not in made.sentence


def test_other_device_counts_are_tried_and_named_where_they_do_turn_it_around():
    config = small(top_k=16)
    made = plan.make_plan(config, H100, 2).advice
    (words,) = made.changes
    devices = int(re.fullmatch(r"(\d+) devices", words).group(1))
    times = {kind: one.seconds_per_token for kind, one in best(config, H100, devices).items()}
    assert devices > 2 and times[APART] < times[TOGETHER] < float("inf")
    assert made.limit is None and "turn around with" in made.sentence


def test_a_count_that_sequences_do_not_divide_among_is_not_called_a_matter_of_memory():
    """Six workers cannot share a step of 32 sequences: co-location has no split to compare with."""
    made = plan.make_plan(small(num_layers=1), H100, 4).advice
    assert "memory" not in " ".join(made.changes)


def test_memory_is_named_where_more_of_it_would_close_most_of_the_gap():
    config = balanced.get_config()
    config.batch.sequence_length = 4096
    device = dataclasses.replace(H100, memory_gibibytes=64)
    found = best(config, device, 2)
    made = plan.make_plan(config, device, 2).advice
    pattern = r"memory limits it: .* would be (\S+) times as fast, with (\d+) GiB a device"
    faster, gibibytes = map(float, re.fullmatch(pattern, made.limit).groups())
    roomy = dataclasses.replace(H100, memory_gibibytes=(gibibytes + 1) / 0.92)
    there = search.search(config, roomy, 2, APART)
    times = [one.seconds_per_token for one in (found[APART], there, found[TOGETHER])]
    assert times[0] / times[1] == pytest.approx(faster, abs=0.01)
    assert times[0] - times[1] > (times[0] - times[2]) / 2
    assert gibibytes * 2**30 > device.usable_bytes


def test_exposed_transfers_are_named():
    config, device, fixed = qwen3_235b.get_config(), hardware.load("h800"), Fixed(stages=32)
    together, apart = (
        search.search(config, device, 1024, kind, fixed) for kind in (TOGETHER, APART)
    )
    exposed = [
        one.exposed_communication / one.step_seconds
        for one in (predict(found.config, device) for found in (apart, together))
    ]
    assert advice._limit(together, apart, device, fixed, None) == (
        f"transfers expose {exposed[0]:.0%} of its step, and {exposed[1]:.0%} of the co-located one"
    )
