"""Eight simulated CPU devices and float64, set before JAX starts its CPU client."""

import hypothesis
import jax

from mesh import runtime

runtime.simulate_cpu_devices(8)
jax.config.update("jax_enable_x64", True)

# Examples that compile take seconds on a busy machine.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")
