"""The stash: what forward units leave for their backward units, in one buffer per worker."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mesh.roles import Role
from mesh.wire import WordCodec

# Entries start at whole blocks, so that slot offsets stay small integers in buffers of many GiB.
BLOCK_WORDS = 1024
# A kernel writes a matrix in tiles of so many rows.
TILE_ROWS = 8


def alignment(row_words: int) -> int:
    """Blocks that are whole tiles of rows of `row_words` words too."""
    return math.lcm(BLOCK_WORDS, TILE_ROWS * row_words) // BLOCK_WORDS


class StashPool:
    """Slots for the stash entries of either role, in a buffer whose shape is the same for both.

    Every leaf of an entry begins at a whole block and is written and read by itself, so that the
    large ones are copied once. It begins at whole rows of `row_words` words too: the buffer is
    also a matrix of such rows, into which a kernel can write.

    templates: the entry of each role, a tree of ShapeDtypeStructs; slots: entries of each role;
    colocated: whether a worker plays both roles, so that the expert slots come after the others.
    """

    def __init__(
        self,
        templates: dict,
        slots: tuple[int, int],
        compute_dtype,
        colocated: bool,
        row_words: int,
    ):
        self.row_words = row_words
        self.entries = {
            role: _Entry(templates[role], compute_dtype, alignment(row_words)) for role in Role
        }
        blocks = [slots[role] * self.entries[role].num_blocks for role in Role]
        self.num_blocks = sum(blocks) if colocated else max(blocks)
        self.word_dtype = self.entries[Role.ATTENTION].word_dtype
        self.first_block = {
            Role.ATTENTION: 0,
            Role.EXPERT: blocks[Role.ATTENTION] if colocated else 0,
        }

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * BLOCK_WORDS * self.word_dtype.itemsize

    def zeros(self):
        return jnp.zeros((self.num_blocks, BLOCK_WORDS), self.word_dtype)

    def write(self, pool, role: Role, slot, entry):
        """Writes an entry into a slot (a traced index) in place.

        A leaf may be a product that is not yet made (layers.grouped_matmul.PairProduct), to be
        written where it is kept by what makes it, where that can be done.
        """
        layout, first = self.entries[role], self._first_block(role, slot)
        leaves = layout.treedef.flatten_up_to(entry)
        for leaf, codec, blocks in zip(leaves, layout.codecs, layout.blocks, strict=True):
            if hasattr(leaf, "write_to"):
                if leaf.writes_in_place(pool.dtype):
                    rows = pool.reshape(-1, self.row_words)
                    pool = leaf.write_to(rows, self._first_row(first + blocks.first))
                    pool = pool.reshape(-1, BLOCK_WORDS)
                    continue
                leaf = leaf.dense()
            words = codec.encode(leaf)
            words = jnp.pad(words, (0, blocks.size * BLOCK_WORDS - words.shape[0]))
            at = (first + blocks.first, jnp.zeros_like(slot))
            pool = lax.dynamic_update_slice(pool, words.reshape(blocks.size, BLOCK_WORDS), at)
        return pool

    def read(self, pool, role: Role, slot):
        """The entry in a slot (a traced index)."""
        layout, first = self.entries[role], self._first_block(role, slot)
        leaves = []
        for codec, blocks in zip(layout.codecs, layout.blocks, strict=True):
            at = (first + blocks.first, jnp.zeros_like(slot))
            words = lax.dynamic_slice(pool, at, (blocks.size, BLOCK_WORDS))
            leaves.append(codec.decode(words.reshape(-1)))
        return jax.tree.unflatten(layout.treedef, leaves)

    def _first_row(self, block):
        """The row that begins where an aligned block does."""
        count = alignment(self.row_words)
        return block // count * (count * BLOCK_WORDS // self.row_words)

    def _first_block(self, role: Role, slot):
        return self.first_block[role] + slot * self.entries[role].num_blocks


class _Blocks(NamedTuple):
    first: int
    size: int


class _Entry:
    """Where the leaves of one role's entry lie, in blocks from its beginning.

    align: leaves begin at multiples of so many blocks.
    """

    def __init__(self, template, compute_dtype, align: int):
        leaves, self.treedef = jax.tree.flatten(template)
        self.codecs = [WordCodec(leaf, compute_dtype) for leaf in leaves]
        self.word_dtype = self.codecs[0].word_dtype
        self.blocks, self.num_blocks = [], 0
        for codec in self.codecs:
            size = -(-codec.num_words // BLOCK_WORDS)
            self.blocks.append(_Blocks(self.num_blocks, size))
            self.num_blocks += -(-size // align) * align
