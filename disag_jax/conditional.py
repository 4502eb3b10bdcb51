"""Conditionals that work in place."""

from jax import lax


def update_if(predicate, update, *state):
    """`update(*state)` where the predicate holds, else `state`, as a tuple.

    XLA passes state through a conditional without copying it only if there are two branches and one
    of them leaves it as it is; a switch over the roles would copy all gradients every period.
    """
    return lax.cond(predicate, lambda *state: tuple(update(*state)), lambda *state: state, *state)
