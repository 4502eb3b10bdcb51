"""A message in chunks, so that one can be computed on while the others travel."""

import jax
import jax.numpy as jnp

from disag_jax.geometry import Geometry
from mesh.wire import WordCodec


class Chunks:
    """Messages as words in `count` parts; part i has rows i, i + count, ... of every slot.

    Slots are filled from the front: dealt out like this, the chunks are as full as each other.

    make_template: function of a Geometry that returns one slot of the message.
    """

    def __init__(self, geometry: Geometry, make_template, count: int):
        self.count, self.slots = count, geometry.R
        self.codec = WordCodec(make_template(geometry.in_chunks(count)), geometry.compute_dtype)

    def encode(self, message) -> list:
        """Leaves [R, C, ...] to the words [R, num_words] of each chunk."""
        return [self.codec.encode(part) for part in self.cut(message)]

    def decode(self, words: list):
        """The inverse of `encode`."""
        return self.join([self.codec.decode(part) for part in words])

    def zeros(self) -> list:
        """The words of a message of zeros."""
        return [self.codec.zeros(self.slots) for _ in range(self.count)]

    def cut(self, message) -> list:
        """Leaves [R, C, ...] to those of each chunk, [R, C / count, ...]."""
        if self.count == 1:
            return [message]

        def part(first):
            return jax.tree.map(lambda leaf: leaf[:, first :: self.count], message)

        return [part(first) for first in range(self.count)]

    def join(self, parts: list):
        """The inverse of `cut`."""
        if self.count == 1:
            return parts[0]

        def interleave(*leaves):
            rows = jnp.stack(leaves, axis=2)  # [R, C / count, count, ...]
            return rows.reshape(rows.shape[0], -1, *rows.shape[3:])

        return jax.tree.map(interleave, *parts)
