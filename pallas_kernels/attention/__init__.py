"""Attention over a key/value cache: one door (`api.attention`), one specification (`reference.attention`)."""

from pallas_kernels.attention.api import attention

__all__ = ["attention"]
