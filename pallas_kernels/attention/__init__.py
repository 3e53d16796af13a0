"""Attention over a paged key/value cache.

`attention` and `rotate_and_write` are the doors (`api.py`), `reference.py` is the specification.
"""

from pallas_kernels.attention.api import attention, rotate_and_write
from pallas_kernels.attention.config import BlockConfig
from pallas_kernels.attention.reference import KVScales
from pallas_kernels.attention.xla import append, rotate

__all__ = ["BlockConfig", "KVScales", "append", "attention", "rotate", "rotate_and_write"]
