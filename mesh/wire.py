"""Packs trees of arrays of several types into one array of words, by bits.

A transfer then is one collective instead of one per field, and a stash one buffer instead of one
per field. A word is an unsigned integer as wide as the compute type, so that activations, nearly
all of the bytes, keep their layout.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class WordCodec:
    """Encodes trees like `template` (ShapeDtypeStructs) as words, with any leading dims."""

    def __init__(self, template, compute_dtype):
        self.leaves, self.treedef = jax.tree.flatten(template)
        self.word_bytes = np.dtype(compute_dtype).itemsize
        self.word_dtype = np.dtype(f"uint{8 * self.word_bytes}")
        self.sizes = [math.prod(leaf.shape) * self._words_per_item(leaf) for leaf in self.leaves]
        self.num_words = sum(self.sizes)

    def _words_per_item(self, leaf) -> int:
        return max(1, leaf.dtype.itemsize // self.word_bytes)

    def encode(self, tree):
        """Leaves [..., *shape] to words [..., num_words]."""
        return jnp.concatenate(self._parts(tree), axis=-1)

    def write(self, words, tree, rows=None):
        """`encode` of leaves [R, *shape] into words [R, num_words], which lose what they held.

        rows: int32 [M] (traced), the rows of words that leaves [M, *shape] go to; the others stay.
        XLA does it in place, also in a conditional, where an array made anew would be copied.
        """
        parts, largest = self._parts(tree), int(np.argmax(self.sizes))
        offset = 0
        # The largest goes straight from what makes it to its place; the others are few bytes.
        for several in (parts[:largest], parts[largest : largest + 1], parts[largest + 1 :]):
            if not several:
                continue
            piece = jnp.concatenate(several, axis=-1)
            if rows is None:
                words = lax.dynamic_update_slice(words, piece, (0, offset))
            else:
                for one, row in zip(piece[:, None], rows, strict=True):
                    words = lax.dynamic_update_slice(words, one, (row, offset))
            offset += piece.shape[-1]
        return words

    def decode(self, words):
        """Words [..., num_words] (or longer) back to a tree of leaves [..., *shape]."""
        lead, offset, leaves = words.shape[:-1], 0, []
        for spec, size in zip(self.leaves, self.sizes, strict=True):
            part = lax.slice_in_dim(words, offset, offset + size, axis=-1)
            leaves.append(self._from_words(part, spec).reshape(*lead, *spec.shape))
            offset += size
        return jax.tree.unflatten(self.treedef, leaves)

    def _parts(self, tree) -> list:
        """Words [..., size] of each leaf."""
        leaves, treedef = jax.tree.flatten(tree)
        assert treedef == self.treedef, (treedef, self.treedef)
        parts = []
        for leaf, spec in zip(leaves, self.leaves, strict=True):
            lead = leaf.shape[: leaf.ndim - len(spec.shape)]
            assert leaf.shape == lead + spec.shape and leaf.dtype == spec.dtype, (leaf, spec)
            parts.append(self._to_words(leaf).reshape(*lead, -1))
        return parts

    def zeros(self, *lead):
        """Words of a tree of zeros."""
        return jnp.zeros((*lead, self.num_words), self.word_dtype)

    def _to_words(self, x):
        if x.dtype.itemsize < self.word_bytes:
            assert jnp.issubdtype(x.dtype, jnp.signedinteger), x.dtype
            x = x.astype(f"int{8 * self.word_bytes}")
        return lax.bitcast_convert_type(x, self.word_dtype)

    def _from_words(self, words, spec):
        if spec.dtype.itemsize < self.word_bytes:
            wide = lax.bitcast_convert_type(words, f"int{8 * self.word_bytes}")
            return wide.astype(spec.dtype)
        words_per_item = self._words_per_item(spec)
        if words_per_item > 1:
            words = words.reshape(*words.shape[:-1], -1, words_per_item)
        return lax.bitcast_convert_type(words, spec.dtype)
