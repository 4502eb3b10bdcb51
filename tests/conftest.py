"""Eight simulated CPU devices and float64, set before JAX starts its CPU client.

Tests marked `gpu` run on the machine's GPUs: `JAX_PLATFORMS=cuda python -m pytest -m gpu`.
"""

import os

import hypothesis
import jax

from mesh import runtime

if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    runtime.simulate_cpu_devices(8)
jax.config.update("jax_enable_x64", True)

# Examples that compile take seconds on a busy machine.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")
