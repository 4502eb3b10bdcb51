"""Values that an earlier pass kept."""

import jax


def recalled(function, kept, *args):
    """`function(*args)`, known to be `kept`: its gradient alone is computed.

    function: of differentiable arrays; what it closes over is constant.
    """

    @jax.custom_vjp
    def call(kept, *args):
        del args
        return kept

    def forward(kept, *args):
        return kept, args

    def backward(args, cotangent):
        _, vjp = jax.vjp(function, *args)
        return None, *vjp(cotangent)

    call.defvjp(forward, backward)
    return call(kept, *args)
