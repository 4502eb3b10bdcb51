"""Trees as words and weights as rows: every bit comes back."""

import functools
import math

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from mesh.packing import RowLayout
from mesh.wire import WordCodec

# Words

WORDS = {
    "bfloat16": (ml_dtypes.bfloat16, np.float32),
    "float32": (np.float32, np.float32),
    "float64": (np.float64, np.float64),
}


def bits_of(array):
    array = np.asarray(array)
    return array.view(f"uint{8 * array.dtype.itemsize}")


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    np.testing.assert_array_equal(bits_of(actual), bits_of(expected))


def codec_of(name):
    compute, wide = WORDS[name]
    template = {
        "x": jax.ShapeDtypeStruct((2, 3), compute),
        "gate": jax.ShapeDtypeStruct((3,), wide),
        "id": jax.ShapeDtypeStruct((2, 2), np.int32),
        "count": jax.ShapeDtypeStruct((), np.int32),
    }
    return WordCodec(template, compute), template


@functools.cache
def round_trip(name):
    codec, _ = codec_of(name)

    @jax.jit
    def run(tree):
        words = codec.encode(tree)
        longer = jnp.concatenate([words, jnp.ones_like(words)], axis=-1)
        return words, codec.decode(words), codec.decode(longer)

    return run


def special_floats(dtype):
    """-0, infinities, a subnormal, and quiet and signalling NaNs of a payload."""
    dtype = np.dtype(dtype)
    info, unsigned = ml_dtypes.finfo(dtype), f"uint{8 * dtype.itemsize}"
    infinity = bits_of(np.array(np.inf, dtype))[()]
    one, quiet = infinity.dtype.type(1), infinity.dtype.type(1 << (info.nmant - 1))
    sign = one << (8 * dtype.itemsize - 1)
    nans = [infinity | quiet | one, infinity | one, sign | infinity | quiet, sign | infinity | one]
    return np.array([sign, infinity, sign | infinity, one, *nans], unsigned).view(dtype)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", WORDS)
def test_words_keep_every_bit(name, lead):
    codec, template = codec_of(name)
    rng = np.random.default_rng(0)

    def fill(leaf):
        shape = (*lead, *leaf.shape)
        random = rng.bytes(math.prod(shape) * leaf.dtype.itemsize)
        return np.frombuffer(random, leaf.dtype).reshape(shape)

    tree = jax.tree.map(fill, template)
    words, decoded, decoded_longer = round_trip(name)(tree)
    assert words.shape == (*lead, codec.num_words)
    assert words.dtype == codec.word_dtype == codec.zeros(*lead).dtype
    assert words.shape == codec.zeros(*lead).shape
    for result in (decoded, decoded_longer):
        jax.tree.map(assert_same_bits, result, tree)


@pytest.mark.parametrize("name", WORDS)
def test_words_keep_negative_zero_and_the_payload_of_a_nan(name):
    compute, wide = map(np.dtype, WORDS[name])
    template = [jax.ShapeDtypeStruct((8,), dtype) for dtype in (compute, wide)]
    codec = WordCodec(template, compute)
    tree = [special_floats(dtype) for dtype in (compute, wide)]
    back = jax.jit(lambda tree: codec.decode(codec.encode(tree)))(tree)
    jax.tree.map(assert_same_bits, back, tree)


@pytest.mark.parametrize("name", WORDS)
def test_zero_words_are_a_tree_of_zeros(name):
    codec, template = codec_of(name)
    zeros = jax.tree.map(lambda leaf: np.zeros((2, *leaf.shape), leaf.dtype), template)
    jax.tree.map(assert_same_bits, codec.decode(codec.zeros(2)), zeros)


def test_activations_take_one_word_each_and_others_as_many_as_they_need():
    assert codec_of("bfloat16")[0].num_words == 6 + 2 * (3 + 4 + 1)
    assert codec_of("float32")[0].num_words == codec_of("float64")[0].num_words == 6 + 3 + 4 + 1


def test_encode_refuses_a_tree_of_other_types_or_shapes():
    codec, template = codec_of("float32")
    tree = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template)
    for wrong in ({**tree, "x": tree["x"].T}, {**tree, "id": tree["id"] * 1.0}, {"x": tree["x"]}):
        with pytest.raises(AssertionError):
            codec.encode(wrong)


@settings(max_examples=20, deadline=None)
@given(hnp.arrays(np.int32, 4))
def test_every_int32_survives_wider_words(values):
    codec = WordCodec(jax.ShapeDtypeStruct((4,), np.int32), np.float64)
    np.testing.assert_array_equal(codec.decode(codec.encode(jnp.asarray(values))), values)


# Rows

LEAVES = {"a": {"w": (2, 3), "scale": (2,)}, "b": (4,), "c": {"v": (1, 2, 2)}}
NUM_ROWS, NUM_COLUMNS = 3, 20


def layout_of():
    template = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32), LEAVES,
        is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    return RowLayout(template), template


def random_leaves(template, *lead, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=(*lead, *leaf.shape)), template)


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_unpack_and_read_undo_pack():
    layout, template = layout_of()
    leaves = random_leaves(template, NUM_ROWS)
    rows = layout.pack(leaves, NUM_COLUMNS)
    assert rows.shape == (NUM_ROWS, NUM_COLUMNS) and layout.num_columns == 16
    assert not rows[:, 16:].any()
    assert_trees_equal(layout.unpack(rows), leaves)
    read = jax.jit(layout.read)
    for row in range(NUM_ROWS):
        one = jax.tree.map(lambda leaf, r=row: leaf[r], leaves)
        assert_trees_equal(read(rows, np.int32(row)), one)


def test_add_changes_one_row_by_the_leaves_of_one_layer():
    layout, template = layout_of()
    rows = np.random.default_rng(1).normal(size=(NUM_ROWS, NUM_COLUMNS))
    leaves = random_leaves(template)
    added = np.asarray(jax.jit(layout.add)(rows, np.int32(1), leaves)) - rows
    assert not added[[0, 2]].any() and not added[:, 16:].any()
    expected = layout.pack(jax.tree.map(lambda leaf: leaf[None], leaves), NUM_COLUMNS)[0]
    np.testing.assert_allclose(added[1], expected, atol=1e-15)


def test_add_sums_in_the_type_of_the_rows():
    layout = RowLayout([jax.ShapeDtypeStruct((1,), jnp.bfloat16)])
    rows = jnp.full((1, 1), 256, jnp.float32)
    added = layout.add(rows, jnp.int32(0), [jnp.ones(1, jnp.bfloat16)])
    assert added.dtype == jnp.float32 and added[0, 0] == 257


def test_pack_and_add_refuse_another_tree():
    layout = layout_of()[0]
    renamed = {"a": {"w": np.zeros((1, 6)), "bias": np.zeros((1, 2))}, "b": np.zeros((1, 8))}
    with pytest.raises(ValueError):
        layout.pack(renamed, NUM_COLUMNS)
    with pytest.raises(ValueError):
        layout.add(jnp.zeros((1, NUM_COLUMNS)), jnp.int32(0), renamed)


def test_columns_are_where_a_branch_lies():
    layout, template = layout_of()
    for branch in LEAVES:
        marked = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape)), template)
        marked[branch] = jax.tree.map(np.ones_like, marked[branch])
        row = np.asarray(layout.pack(marked, NUM_COLUMNS))[0]
        columns = layout.columns(branch)
        assert row[columns].all() and row.sum() == columns.stop - columns.start
    assert layout.columns("absent") == slice(0, 0)
