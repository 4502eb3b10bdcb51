"""AdamW and its learning-rate schedule.

Clipping and the learning rate come from outside the optimizer: the exact global norm is known only
to the pipeline program, and a role that clipped by itself would clip by its own part of the norm.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from disag_jax.config import Config, MuDtype


def learning_rates(config: Config) -> np.ndarray:
    """Learning rate of each step and, last, of all after: linear warm-up, cosine decay; [steps].

    All at once: asked step by step, the schedule's dozen operations keep the host from sending the
    update for 8 ms (a trace of two H100, docs/performance.md).
    """
    options = config.optimizer
    num_steps = max(config.run.num_steps, options.warmup_steps + 1)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=options.peak_learning_rate,
        warmup_steps=options.warmup_steps,
        decay_steps=num_steps,
        end_value=options.final_learning_rate,
    )
    return np.asarray(jax.vmap(schedule)(jnp.arange(num_steps + 1)))


def clip_factor(config: Config, gradient_norm: float) -> float:
    """What to multiply gradients by so that their norm is at most `max_grad_norm`."""
    limit = config.optimizer.max_grad_norm
    return 1.0 if gradient_norm < limit else limit / gradient_norm


def make_optimizer(config: Config, leading_dims: int) -> optax.GradientTransformation:
    """AdamW without its learning rate, for leaves with `leading_dims` dims before their own.

    Weights with two or more dims of their own decay; norm scales do not.
    """
    options = config.optimizer

    mu_dtype = None if options.mu_dtype is MuDtype.MASTER else jnp.dtype(options.mu_dtype.value)

    def decays(params):
        return jax.tree.map(lambda leaf: leaf.ndim - leading_dims >= 2, params)

    return optax.chain(
        optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.eps, mu_dtype=mu_dtype),
        optax.add_decayed_weights(options.weight_decay, mask=decays),
    )


def apply(optimizer, params, opt_state, grads, factor, rate):
    """One update with gradients times `factor` at learning rate `rate`: (params, opt_state)."""
    grads = jax.tree.map(lambda grad: grad * factor, grads)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), opt_state
