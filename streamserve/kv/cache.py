"""Pure device operations on key/value caches. Who owns which row is the ledger's business (`kv/pages.py`)."""

import jax
import jax.numpy as jnp

from streamserve.types import KVCache, KVShape, LayerKV


def zeros(shape: KVShape, batch: int, capacity: int) -> KVCache:
    """Allocate an empty cache of `batch` rows of `capacity` tokens.

    Zeros, not `jnp.empty`: uninitialised memory may hold NaN, which survives masking (0 * NaN).
    """
    dims = (batch, shape.num_kv_heads, capacity, shape.head_dim)
    layer = lambda: LayerKV(k=jnp.zeros(dims, shape.dtype), v=jnp.zeros(dims, shape.dtype))  # noqa: E731
    return KVCache(layers=tuple(layer() for _ in range(shape.num_layers)))


def append(layer: LayerKV, k_BTGD: jax.Array, v_BTGD: jax.Array, start_B: jax.Array) -> LayerKV:
    """Write `T` new tokens a row at positions `start_B ...`, as the cache's dtype.

    Undoing it is a change of the caller's lengths: what lies beyond a length is never read.

    Args:
      layer: cache of one layer, [B, G, C, D].
      k_BTGD: new keys.
      v_BTGD: new values.
      start_B: first position of each row; `start_B + T <= C` is the caller's promise.
    """

    def write_row(row_GCD: jax.Array, new_TGD: jax.Array, start: jax.Array) -> jax.Array:
        new_GTD = jnp.swapaxes(new_TGD, 0, 1).astype(row_GCD.dtype)
        zero = jnp.zeros_like(start)
        return jax.lax.dynamic_update_slice(row_GCD, new_GTD, (zero, start, zero))

    write = jax.vmap(write_row)
    return LayerKV(k=write(layer.k, k_BTGD, start_B), v=write(layer.v, v_BTGD, start_B))


def insert_row(cache: KVCache, row: KVCache, slot: jax.Array) -> KVCache:
    """Put a one-row cache of `S <= C` tokens at the start of row `slot`."""

    def put(whole_BGCD: jax.Array, part_1GSD: jax.Array) -> jax.Array:
        zero = jnp.zeros_like(slot)
        return jax.lax.dynamic_update_slice(whole_BGCD, part_1GSD, (slot, zero, zero, zero))

    return jax.tree.map(put, cache, row)


def num_bytes(tree: object) -> int:
    """Bytes of all arrays of a tree, over all devices once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
