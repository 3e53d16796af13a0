"""Every test runs on four host devices and one for control, with strict dtypes and with warnings as errors."""

import os

# Tests compile some hundred programs and run each for milliseconds: LLVM's optimisation costs more than it brings.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax  # the flag above is read when JAX is imported

jax.config.update("jax_num_cpu_devices", 5)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
