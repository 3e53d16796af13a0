"""Every test runs on four host devices and one for control, with strict dtypes and with warnings as errors."""

import gc
import os

# Tests compile some hundred programs and run each for milliseconds: LLVM's optimisation costs more than it brings.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax  # the flag above is read when JAX is imported
import pytest

from tests import doubles

jax.config.update("jax_num_cpu_devices", 5)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Let go of what a file has compiled.

    Each program on CPU is some memory maps of the process, and Linux allows 65,530: the whole suite came near, and LLVM
    answers the next one with a segmentation fault.
    """
    yield
    doubles.tiny_pairs.cache_clear()
    jax.clear_caches()
    gc.collect()
