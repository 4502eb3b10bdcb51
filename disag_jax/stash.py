"""The stash: what forward units leave for their backward units, in one buffer per worker."""

import jax.numpy as jnp
from jax import lax

from mesh.roles import Role
from mesh.wire import WordCodec

# Entries start at whole blocks, so that slot offsets stay small integers in buffers of many GiB.
BLOCK_WORDS = 1024


class StashPool:
    """Slots for the stash entries of either role, in a buffer whose shape is the same for both.

    templates: the entry of each role, a tree of ShapeDtypeStructs; slots: entries of each role;
    colocated: whether a worker plays both roles, so that the expert slots come after the others.
    """

    def __init__(self, templates: dict, slots: tuple[int, int], compute_dtype, colocated: bool):
        self.codecs = {role: WordCodec(templates[role], compute_dtype) for role in Role}
        self.entry_blocks = {
            role: -(-codec.num_words // BLOCK_WORDS) for role, codec in self.codecs.items()
        }
        blocks = [slots[role] * self.entry_blocks[role] for role in Role]
        self.num_blocks = sum(blocks) if colocated else max(blocks)
        self.first_block = {
            Role.ATTENTION: 0,
            Role.EXPERT: blocks[Role.ATTENTION] if colocated else 0,
        }

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * BLOCK_WORDS * self.codecs[Role.ATTENTION].word_bytes

    def zeros(self):
        return jnp.zeros((self.num_blocks, BLOCK_WORDS), self.codecs[Role.ATTENTION].word_dtype)

    def write(self, pool, role: Role, slot, entry):
        """Writes an entry into a slot (a traced index) in place."""
        words, blocks = self.codecs[role].encode(entry), self.entry_blocks[role]
        words = jnp.pad(words, (0, blocks * BLOCK_WORDS - words.shape[0]))
        return lax.dynamic_update_slice(
            pool, words.reshape(blocks, BLOCK_WORDS), self._at(role, slot)
        )

    def read(self, pool, role: Role, slot):
        """The entry in a slot (a traced index)."""
        blocks = self.entry_blocks[role]
        words = lax.dynamic_slice(pool, self._at(role, slot), (blocks, BLOCK_WORDS))
        return self.codecs[role].decode(words.reshape(-1))

    def _at(self, role: Role, slot):
        return self.first_block[role] + slot * self.entry_blocks[role], jnp.zeros_like(slot)
