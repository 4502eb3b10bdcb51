"""Final norm, output head and cross-entropy, a chunk of tokens at a time.

Legend: T tokens, c tokens of a chunk, D model width, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layers import target
from layers.dtypes import accumulation_dtype
from layers.norm import rms_norm

NO_LABEL = -1


class HeadParams(NamedTuple):
    """final_norm: [D]; head: [V, D]."""

    final_norm: jax.Array
    head: jax.Array


def cross_entropy(params: HeadParams, h_TD, label_T, *, eps: float, chunk: int):
    """Returns the sum of -log p(label) over the tokens that have a label."""

    def add_chunk(total, inputs):
        h_cD, label_c = inputs
        logits_cV = _logits(params, rms_norm(h_cD, params.final_norm, eps))
        return total + jnp.sum(_nll(logits_cV, label_c)[0]), None

    zero = jnp.zeros((), accumulation_dtype(h_TD.dtype))
    return lax.scan(add_chunk, zero, _chunks(h_TD, label_T, chunk))[0]


def cross_entropy_and_grads(
    params: HeadParams, h_TD, label_T, scale, grads: HeadParams, *, eps: float, chunk: int
):
    """Returns (sum of -log p(label), dh [T, D], grads): gradients of `scale` times the sum.

    Parameter gradients are added to `grads` (float32 or wider) in place; only one chunk's logits
    [c, V] exist at a time, in the forward and in the backward pass. Softmax, loss and gradient by
    the logits are one kernel where there is one (`has_kernel`).
    """
    fused = has_kernel(params.head.shape[0], h_TD.dtype)

    def add_chunk(carry, inputs):
        total, grads = carry
        h_cD, label_c = inputs
        x_cD, norm_vjp = jax.vjp(lambda h, s: rms_norm(h, s, eps), h_cD, params.final_norm)
        logits_cV = _logits(params, x_cD)
        make = _fused_nll_and_gradient if fused else _nll_and_gradient
        nll_c, dlogits_cV = make(logits_cV, label_c, scale, h_cD.dtype)
        dx_cD = dlogits_cV @ params.head
        dh_cD, dnorm_D = norm_vjp(dx_cD)
        dhead_VD = jnp.einsum(
            "cv,cd->vd", dlogits_cV, x_cD, preferred_element_type=grads.head.dtype
        )
        grads = HeadParams(
            final_norm=grads.final_norm + dnorm_D.astype(grads.final_norm.dtype),
            head=grads.head + dhead_VD,
        )
        return (total + jnp.sum(nll_c), grads), dh_cD

    zero = jnp.zeros((), accumulation_dtype(h_TD.dtype))
    (total, grads), dh = lax.scan(add_chunk, (zero, grads), _chunks(h_TD, label_T, chunk))
    return total, dh.reshape(-1, h_TD.shape[1])[: h_TD.shape[0]], grads


def _logits(params: HeadParams, x_cD):
    wide = accumulation_dtype(x_cD.dtype)
    return jnp.einsum("cd,vd->cv", x_cD, params.head, preferred_element_type=wide)


def has_kernel(vocab_size: int, dtype) -> bool:
    """Whether a kernel makes loss and gradient of activations of this type: on Hopper GPUs."""
    if not target.is_hopper() or jnp.dtype(dtype) != jnp.bfloat16:
        return False
    return _hopper().piece_words(vocab_size) is not None


def _hopper():
    """The kernel's module, which needs JAX's GPU support to import."""
    from layers import softmax_hopper

    return softmax_hopper


def _nll_and_gradient(logits_cV, label_c, scale, dtype):
    """Negative log-likelihood [c], and the gradient of `scale` times it by the logits [c, V]."""
    nll_c, log_partition_c = _nll(logits_cV, label_c)
    probability_cV = jnp.exp(logits_cV - log_partition_c[:, None])
    is_label_cV = jnp.arange(logits_cV.shape[1]) == label_c[:, None]
    weight_c = _weight(label_c, scale, logits_cV.dtype)
    return nll_c, ((probability_cV - is_label_cV) * weight_c[:, None]).astype(dtype)


def _fused_nll_and_gradient(logits_cV, label_c, scale, dtype):
    weight_c = _weight(label_c, scale, logits_cV.dtype)
    some_label_c = jnp.maximum(label_c, 0)
    nll_c, dlogits_cV = _hopper().nll_and_gradient(logits_cV, some_label_c, weight_c, dtype)
    return jnp.where(label_c >= 0, nll_c, 0), dlogits_cV


def _weight(label_c, scale, dtype):
    """`scale` where there is a label."""
    return jnp.where(label_c >= 0, scale, 0).astype(dtype)


def _nll(logits_cV, label_c):
    """Negative log-likelihood (0 without a label) and log-partition, each [c]."""
    # On a GPU each pass over the logits counts; a CPU is ten times slower at reducing pairs.
    one_pass = target.is_gpu()
    log_partition_c = one_pass_logsumexp(logits_cV) if one_pass else jax.nn.logsumexp(logits_cV, -1)
    at_label_c = jnp.take_along_axis(logits_cV, jnp.maximum(label_c, 0)[:, None], axis=1)[:, 0]
    return jnp.where(label_c >= 0, log_partition_c - at_label_c, 0), log_partition_c


def one_pass_logsumexp(x_cV):
    """log(sum(exp(x))) of each row [c], reading x once: the maximum and the sum grow together.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867).
    """

    def combine(left, right):
        largest = jnp.maximum(left[0], right[0])
        sums = [total * jnp.exp(maximum - largest) for maximum, total in (left, right)]
        return largest, sums[0] + sums[1]

    # Finite, so that nothing is subtracted from itself at infinity.
    start = (jnp.finfo(x_cV.dtype).min, jnp.zeros((), x_cV.dtype))
    largest_c, total_c = lax.reduce((x_cV, jnp.ones_like(x_cV)), start, combine, (1,))
    return largest_c + jnp.log(total_c)


def _chunks(h_TD, label_T, chunk: int):
    """Splits tokens into equal chunks; padding tokens have no label."""
    num_tokens, width = h_TD.shape
    chunk = min(chunk, num_tokens)
    missing = -num_tokens % chunk
    h_TD = jnp.pad(h_TD, ((0, missing), (0, 0)))
    label_T = jnp.pad(label_T, (0, missing), constant_values=NO_LABEL)
    return h_TD.reshape(-1, chunk, width), label_T.reshape(-1, chunk)
