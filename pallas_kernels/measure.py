"""How a kernel is timed: calls in a row inside one program, on several caches in turn, so that nothing is in a cache.

One call takes tens of microseconds, less than its dispatch from the host, so a measurement is many of them.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

ROTATED_BYTES = 256 * 2**20  # of caches that are taken in turn: several times the 50 MB of an H200's L2
CALLS = 16  # in one measurement
# Largest error that is rounding and not a fault, by dtype of the queries.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}

Call = Callable[..., jax.Array]  # of queries, cache, page table and starts


def num_caches(kv_bytes: int) -> int:
    """Count the caches of this size that are taken in turn."""
    return max(1, min(CALLS, -(-ROTATED_BYTES // max(1, kv_bytes))))


def chain(call: Call, queries: jax.Array, caches: Sequence[Any], *rest: jax.Array) -> Callable[[], Any]:
    """Compile `CALLS` calls in a row, each on the next cache; gives what dispatches them.

    Each call waits for the one before: its queries are made of that one's output, times nearly nothing.
    """

    def calls(queries: jax.Array, caches: Sequence[Any], *rest: jax.Array) -> jax.Array:
        for index in range(CALLS):
            out = call(queries, caches[index % len(caches)], *rest)
            queries = queries + (out * 1e-3).astype(queries.dtype)
        return queries

    return functools.partial(jax.jit(calls).lower(queries, caches, *rest).compile(), queries, caches, *rest)


def seconds(run: Callable[[], Any], calls: int = CALLS) -> float:
    """Time a dispatched program of several calls, in seconds a call."""
    begun = time.perf_counter()
    jax.block_until_ready(run())
    return (time.perf_counter() - begun) / calls
