"""cuDNN's flash attention with its residuals in the caller's hands.

`jax.nn.dot_product_attention` keeps the output and the log-sum-exp of the scores for its backward
pass inside one trace. Here both passes are functions of their own, so that the residuals can wait
in the stash between two programs' units. That needs functions of JAX that are not public: a version
with other arguments fails with a TypeError, and tests/test_gpu.py compares the numbers.

Legend: B sequences, S positions, H query heads, G key/value heads, A head width.
"""

import functools

import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from mesh import runtime

_LAYOUT = cudnn.AttentionLayout.BTNH.value


def forward(q_BSHA, k_BSGA, v_BSGA, mask_BSS=None):
    """Causal attention scaled by A^-1/2: (output [B, S, H, A], log-sum-exp float32 [B, H, S]).

    mask_BSS: bool, what a position may see besides; None: everything earlier.
    """
    inputs, options = _inputs_and_options(q_BSHA, k_BSGA, v_BSGA, mask_BSS)
    _, residuals = cudnn._dot_product_attention_fwd_rule(
        *inputs, **options, cudnn_version=cudnn.check_cudnn_version(), return_residual=False
    )
    lse_BHS, out_BSHA = residuals[len(inputs) :]
    return out_BSHA, lse_BHS


def backward(q_BSHA, k_BSGA, v_BSGA, out_BSHA, lse_BHS, dout_BSHA, mask_BSS=None):
    """Gradients of (q, k, v) for `dout`, from what `forward` returned."""
    inputs, options = _inputs_and_options(q_BSHA, k_BSGA, v_BSGA, mask_BSS)
    gradients = cudnn._dot_product_attention_bwd_rule(
        **options, is_training=True, return_residual=False,
        res=(*inputs, lse_BHS, out_BSHA), grad_output=dout_BSHA,
    )  # fmt: skip
    return gradients[:3]


def _inputs_and_options(q_BSHA, k_BSGA, v_BSGA, mask_BSS):
    unused = jnp.zeros(0, q_BSHA.dtype)
    bias = unused
    if mask_BSS is not None:
        bias = cudnn.combine_bias_and_mask(None, mask_BSS[:, None], q_BSHA.dtype)
    options = dict(
        scale=q_BSHA.shape[-1] ** -0.5,
        seed=42,
        dropout_rate=0.0,
        # Whether there is a bias, and whether its gradient is wanted.
        variadic_args=(mask_BSS is not None, False),
        mask_type=cudnn.MaskType.CAUSAL,
        layout=_LAYOUT,
        sliding_window_length=None,
    )
    # Lengths, offsets and pages of packed sequences: none here.
    return (q_BSHA, k_BSGA, v_BSGA, bias, *[unused] * 6), options


def _mark_deterministic(make_config):
    """Works around a lookup that fails: XLA sets this field only after it has hashed the config.

    Source: openxla/xla pull request 46500.
    """

    @functools.wraps(make_config)
    def marked(*args, **kwargs):
        config = make_config(*args, **kwargs)
        config["cudnn_fmha_backend_config"]["force_deterministic"] = True
        return config

    return marked


if all(runtime.is_on(flag) for flag in runtime.DETERMINISTIC_FLAGS):
    cudnn.create_dot_product_attention_backend_config_base = _mark_deterministic(
        cudnn.create_dot_product_attention_backend_config_base
    )
