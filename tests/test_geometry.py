"""Transport capacities: rising, the last one never overflowed, the expected load as by counting."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disag_jax.config import SplitConfig
from disag_jax.geometry import buckets, make_geometry
from layers.grouped_matmul import tile_rows
from mesh.placement import ExpertPlaces
from tests import support


def config_of(attention, expert, factors=(), **model):
    split = SplitConfig(
        attention_workers=attention, expert_workers=expert, bucket_factors=tuple(factors)
    )
    return support.small_config(split, **model)


@st.composite
def configs(draw):
    num_experts = draw(st.integers(1, 12))
    return config_of(
        draw(st.integers(1, 4)),
        draw(st.integers(1, num_experts)),
        draw(st.lists(st.sampled_from([1.0, 1.25, 1.5, 2.0, 4.0]), max_size=3)),
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        num_shared_experts=draw(st.integers(0, 2)),
    )


@settings(max_examples=50, deadline=None)
@given(configs())
def test_buckets_rise_and_are_whole_tiles(config):
    found = buckets(config)
    assert make_geometry(config).bucket == found[-1]
    for low, high in itertools.pairwise(found):
        assert low != high and low.rows <= high.rows and low.sorted_rows <= high.sorted_rows
    assert all(bucket.sorted_rows % tile_rows() == 0 for bucket in found)


@settings(max_examples=50, deadline=None)
@given(configs(), st.sampled_from([1, 2, 4]), st.data())
def test_nothing_overflows_the_last_bucket_or_a_chunk_of_it(config, chunks, data):
    """Every token visits one worker: as many of its experts as it may, and the shared ones."""
    worst, model = make_geometry(config).in_chunks(chunks).bucket, config.model
    tokens_per_worker = config.batch.tokens_per_worker // chunks
    tokens = config.split.attention_workers * tokens_per_worker
    held = ExpertPlaces(model.num_experts, config.split.expert_workers).per_worker
    visited = min(model.top_k, held)
    # How many of the tokens take each set of experts.
    sets = list(itertools.combinations(range(held), visited))
    weights = data.draw(st.lists(st.integers(0, 9), min_size=len(sets), max_size=len(sets)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    chances = (np.array(weights) + 1e-9) / np.sum(np.array(weights) + 1e-9)
    sizes = [0] * held + [tokens] * model.num_shared_experts
    for experts, count in zip(sets, rng.multinomial(tokens, chances), strict=True):
        for expert in experts:
            sizes[expert] += count
    assert sum(-(-size // tile_rows()) * tile_rows() for size in sizes) <= worst.sorted_rows
    assert tokens_per_worker <= worst.rows


@settings(max_examples=50, deadline=None)
@given(configs(), st.sampled_from([1, 2, 4]))
def test_a_chunk_fits_where_the_whole_is_said_to(config, chunks):
    for bucket in buckets(config):
        whole = make_geometry(config, bucket)
        chunk = whole.in_chunks(chunks)
        for needed in range(0, chunk.P + 3 * chunk.tile, chunk.tile):
            assert (needed <= chunk.P) == (chunk.whole_sorted_rows(needed) <= whole.P)


def test_the_rows_of_a_slot_divide_into_both_kinds_of_chunks():
    config = config_of(2, 2, [1.0, 1.5], num_experts=6)
    config.batch.tokens_per_worker = config.batch.sequence_length * 15
    config.split.forward_chunks, config.split.backward_chunks = 3, 5
    for bucket in buckets(config):
        assert bucket.rows % 3 == bucket.rows % 5 == 0


@pytest.mark.parametrize(("expert_workers", "top_k"), [(1, 2), (3, 2), (3, 3), (7, 1)])
def test_the_expected_rows_are_those_of_even_routing(expert_workers, top_k):
    config = config_of(2, expert_workers, [1.0], num_experts=7, top_k=top_k)
    config.batch.tokens_per_worker = tokens = 800
    here = set(range(ExpertPlaces(7, expert_workers).per_worker))
    choices = list(itertools.combinations(range(7), top_k))
    expected = tokens * sum(bool(here & set(c)) for c in choices) / len(choices)
    assert buckets(config)[0].rows == math.ceil(round(expected, 6) / 8) * 8
