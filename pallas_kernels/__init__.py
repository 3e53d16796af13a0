"""Kernels that know nothing of the engine: jax and numpy only."""
