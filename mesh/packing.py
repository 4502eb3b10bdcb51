"""One row buffer per worker for the weights of its role, whichever role that is.

The pipeline program needs equal shapes on every worker, while attention and expert layers have
different leaves. Each layer's leaves are laid out one after the other in a row; a worker holds v
rows of P columns, P being the larger role's row: a device pays for the larger role, not the sum.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax


class RowLayout:
    """Where each leaf of one layer (`template`, a tree of ShapeDtypeStructs) sits in its row."""

    def __init__(self, template):
        self.template = template
        self.leaves, self.treedef = jax.tree.flatten(template)
        self.sizes = [math.prod(leaf.shape) for leaf in self.leaves]
        self.offsets = [sum(self.sizes[:n]) for n in range(len(self.sizes))]
        self.num_columns = sum(self.sizes)

    def pack(self, tree, num_columns: int):
        """Leaves [v, *shape] to rows [v, num_columns], zeros past the layout's end."""
        leaves = self.treedef.flatten_up_to(tree)
        flat = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)
        assert flat.shape[1] == self.num_columns, (flat.shape, self.num_columns)
        return jnp.pad(flat, ((0, 0), (0, num_columns - self.num_columns)))

    def unpack(self, rows):
        """Rows [v, P] to leaves [v, *shape]."""
        leaves = [
            rows[:, offset : offset + size].reshape(-1, *leaf.shape)
            for leaf, offset, size in self._spans()
        ]
        return jax.tree.unflatten(self.treedef, leaves)

    def read(self, rows, row):
        """The leaves [*shape] of one row (a traced index)."""
        leaves = [
            lax.dynamic_slice(rows, _at(row, offset), (1, size)).reshape(leaf.shape)
            for leaf, offset, size in self._spans()
        ]
        return jax.tree.unflatten(self.treedef, leaves)

    def as_stacks(self, rows, row):
        """As `read`, without a copy: leaves [E, A, B] as (stack [N, A, B], place of their first).

        P must be a multiple of every A * B, and so must every leaf's offset. Leaves of equal shapes
        have the same stack.
        """
        stacks = {leaf.shape[1:]: _stack(rows, leaf) for leaf in self.leaves}
        views = [
            (stacks[leaf.shape[1:]], _place(rows, row, leaf, offset))
            for leaf, offset, _ in self._spans()
        ]
        return jax.tree.unflatten(self.treedef, views)

    def add(self, rows, row, tree):
        """Adds leaves [*shape] into one row (a traced index) in place, in the type of `rows`.

        A leaf may be a product that is not yet made (layers.grouped_matmul.WeightGradient), to be
        added without making it where that can be done.
        """
        values = self.treedef.flatten_up_to(tree)
        for value, (leaf, offset, size) in zip(values, self._spans(), strict=True):
            if hasattr(value, "add_to"):
                if value.adds_in_place(rows.dtype):
                    place = _place(rows, row, leaf, offset)
                    rows = value.add_to(_stack(rows, leaf), place).reshape(rows.shape)
                    continue
                value = value.dense(rows.dtype)
            old = lax.dynamic_slice(rows, _at(row, offset), (1, size))
            new = old + value.reshape(1, size).astype(rows.dtype)
            rows = lax.dynamic_update_slice(rows, new, _at(row, offset))
        return rows

    def columns(self, prefix: str) -> slice:
        """Columns of the top-level branch `prefix`, whose leaves are adjacent; empty if absent."""
        paths = jax.tree_util.tree_flatten_with_path(self.treedef.unflatten(self.leaves))[0]
        spans = [
            (offset, offset + size)
            for (path, _), (_, offset, size) in zip(paths, self._spans(), strict=True)
            if path[0].key == prefix
        ]
        return slice(spans[0][0], spans[-1][1]) if spans else slice(0, 0)

    def _spans(self):
        return zip(self.leaves, self.offsets, self.sizes, strict=True)


def _stack(rows, leaf):
    """The rows [v, P] as a stack of matrices like a leaf's."""
    return rows.reshape(-1, *leaf.shape[1:])


def _place(rows, row, leaf, offset: int):
    """Where the first matrix of a row's leaf lies in that stack."""
    num_columns, size = rows.shape[1], math.prod(leaf.shape[1:])
    assert num_columns % size == 0 and offset % size == 0, (num_columns, offset, leaf.shape)
    return jnp.asarray(row * (num_columns // size) + offset // size, jnp.int32)


def _at(row, offset: int):
    """Indices of one integer type, whatever JAX's default is."""
    return row, jnp.asarray(offset, row.dtype)
