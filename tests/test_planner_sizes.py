"""Sizes by arithmetic against those that the program's own classes allocate."""

import dataclasses
import itertools

import pytest

from disag_jax.config import Dtype, Overlap, PlacementKind, Recompute, SplitConfig
from disag_jax.dispatch import cotangent_template, message_template
from disag_jax.geometry import buckets, make_geometry
from disag_jax.phases import Layouts
from disag_jax.planner.sizes import TILE, Sizes
from disag_jax.stash import StashPool
from disag_jax.units import AttentionUnit, ExpertUnit
from mesh.roles import Role
from mesh.wire import WordCodec
from tests import support

COLOCATED = PlacementKind.COLOCATED
SPLITS = {
    "even": SplitConfig(stages=2, attention_workers=2, expert_workers=2),
    "more experts": SplitConfig(stages=1, attention_workers=1, expert_workers=4),
    "more attention": SplitConfig(stages=2, attention_workers=3, expert_workers=1),
    "twin": SplitConfig(stages=1, attention_workers=4, expert_workers=2, placement=COLOCATED),
    "twin in chunks": SplitConfig(
        attention_workers=4, expert_workers=2, placement=COLOCATED, overlap=Overlap.CHUNKED,
        forward_chunks=4, backward_chunks=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", Dtype)
@pytest.mark.parametrize("split, recompute", list(zip(SPLITS, itertools.cycle(Recompute))))
def test_sizes_are_the_programs(split, recompute, dtype):
    config = support.small_config(SPLITS[split], num_shared_experts=1, num_experts=6, top_k=3)
    config.run = dataclasses.replace(config.run, compute_dtype=dtype, recompute=recompute)
    chunks = config.split.backward_chunks
    for bucket in buckets(config, TILE):
        geometry = dataclasses.replace(make_geometry(config, bucket), tile=TILE)
        sizes = Sizes(config, bucket, 1.0)
        layouts = Layouts.of(geometry)
        columns = sum(sizes.row_columns.values())
        assert columns == layouts.worker_columns
        for template, size in (
            (message_template, sizes.message_bytes),
            (cotangent_template, sizes.cotangent_bytes),
        ):
            codec = WordCodec(template(geometry), geometry.compute_dtype)
            assert codec.num_words * codec.word_bytes == size
        templates = {
            Role.ATTENTION: AttentionUnit(geometry).stash_template(),
            Role.EXPERT: ExpertUnit(geometry.in_chunks(chunks)).stash_template(),
        }
        part, chunk = geometry.in_chunks(chunks), sizes.in_chunks(chunks)
        assert (part.bucket, part.M * part.C) == (chunk.bucket, chunk.rows)
        for role in Role:
            slots = tuple(3 * (other is role) for other in Role)
            slots = slots[0], chunks * slots[1]
            pool = StashPool(
                templates,
                slots,
                geometry.compute_dtype,
                config.split.colocated,
                config.model.expert_width,
            )
            assert pool.num_bytes == 3 * sizes.stash_entry_bytes[role]
        assert sizes.layer_parameters == {role: layouts[role].num_columns for role in Role}


def test_the_smallest_bucket_that_holds_the_load_is_taken():
    config = support.small_config(SPLITS["more experts"])
    config.batch = dataclasses.replace(config.batch, tokens_per_worker=4096)
    config.model = dataclasses.replace(config.model, num_experts=64)
    options = buckets(config, TILE)
    assert [Sizes.of(config, load).bucket for load in (1.0, 1.24, 1.5, 3.0, 1e9)] == [
        options[0], options[0], options[1], options[2], options[2],
    ]  # fmt: skip


def test_a_bucket_holds_the_tiles_that_are_not_full_too():
    config = support.small_config(
        SplitConfig(attention_workers=1, expert_workers=2), num_experts=8, top_k=4
    )
    config.batch = dataclasses.replace(config.batch, tokens_per_worker=4096)
    options = buckets(config, TILE)
    pairs = 4096 * 4 / 2  # 4 experts each
    # The pairs alone would fit, and so would the rows of a slot, which nearly all tokens need.
    assert options[0].rows == 4096 and 1.28 * pairs <= options[0].sorted_rows
    assert 1.28 * pairs + 4 * TILE / 2 > options[0].sorted_rows
    assert Sizes.of(config, 1.28).bucket == options[1]
