"""Pure device operations on paged key/value caches. Who owns which page is the ledger's business (`kv/pages.py`)."""

from typing import Any

import jax
import jax.numpy as jnp

from streamserve.kv.pages import SCRATCH_PAGE
from streamserve.types import KVCache, KVPages, KVPool, KVShape, LayerKV


def zeros(shape: KVShape, num_pages: int, page_size: int) -> KVPool:
    """Allocate a pool of `num_pages` empty pages, the scratch page among them.

    Zeros, not `jnp.empty`: uninitialised memory may hold NaN.
    """
    dims = (num_pages, shape.num_kv_heads, page_size, shape.head_dim)
    layer = lambda: LayerKV(k=jnp.zeros(dims, shape.dtype), v=jnp.zeros(dims, shape.dtype))  # noqa: E731
    return KVPool(layers=tuple(layer() for _ in range(shape.num_layers)))


def rows(shape: KVShape, batch: int, capacity: int, *, page_size: int = 64) -> KVCache:
    """Allocate a pool whose pages are dealt out already: `batch` rows of at least `capacity` tokens each."""
    per_row = -(-capacity // page_size)
    table_BM = 1 + jnp.arange(batch * per_row, dtype=jnp.int32).reshape(batch, per_row)
    return KVCache(pool=zeros(shape, 1 + batch * per_row, page_size), table=table_BM)


def append(layer: LayerKV, k_BTGD: jax.Array, v_BTGD: jax.Array, table_BM: jax.Array, start_B: jax.Array) -> LayerKV:
    """Write `T` new tokens a row at positions `start_B ...`, as the pool's dtype.

    Undoing it is a change of the caller's lengths: what lies beyond a length is never read. Positions beyond the
    table, and those whose table entry is the scratch page, go to the scratch page: nobody reads them.

    Args:
      layer: pool of one layer, [N, G, P, D].
      k_BTGD: new keys.
      v_BTGD: new values.
      table_BM: int32, page of each row's m-th stretch of P positions.
      start_B: int32, first position of each row.
    """
    page_size, columns = layer.k.shape[2], table_BM.shape[1]
    position_BT = start_B[:, None] + jnp.arange(k_BTGD.shape[1])[None]
    column_BT = position_BT // page_size
    page_BT = jnp.take_along_axis(table_BM, jnp.minimum(column_BT, columns - 1), axis=1)
    page_BT = jnp.where(column_BT < columns, page_BT, SCRATCH_PAGE)
    slot_BT = position_BT % page_size
    if page_BT.size == 1:
        # XLA makes an update of a slice of a single write, fuses that into the reading which follows, and then has to
        # copy the pool in every step to keep what it was before (CPU, JAX 0.10). A second write, to the scratch page,
        # keeps it a scatter, in place.
        page_BT = jnp.pad(page_BT, ((0, 0), (0, 1)), constant_values=SCRATCH_PAGE)
        slot_BT, k_BTGD, v_BTGD = (jnp.repeat(array, 2, axis=1) for array in (slot_BT, k_BTGD, v_BTGD))

    def write(pool_NGPD: jax.Array, new_BTGD: jax.Array) -> jax.Array:
        new = new_BTGD.astype(pool_NGPD.dtype)
        return pool_NGPD.at[page_BT, :, slot_BT].set(new, mode="promise_in_bounds")

    return LayerKV(k=write(layer.k, k_BTGD), v=write(layer.v, v_BTGD))


def take_pages(pools: Any, page_n: jax.Array) -> Any:
    """Copy pages out of a tree of pools: the [N, G, P, D] leaves of each `KVPool` become one [2L, n, G, P, D]."""

    def take(pool: KVPool) -> KVPages:
        parts = [leaf.at[page_n].get(mode="promise_in_bounds") for leaf in jax.tree.leaves(pool)]
        return KVPages(pages=jnp.stack(parts))

    return jax.tree.map(take, pools, is_leaf=_is_pool)


def put_pages(pools: Any, pages: Any, page_n: jax.Array) -> Any:
    """Copy what `take_pages` gave into a tree of pools at `page_n`; padding goes to the scratch page. DONATES pools."""

    def put(pool: KVPool, new: KVPages) -> KVPool:
        leaves, tree = jax.tree.flatten(pool)
        written = [leaf.at[page_n].set(new.pages[i], mode="promise_in_bounds") for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(tree, written)

    return jax.tree.map(put, pools, pages, is_leaf=_is_pool)


def _is_pool(node: object) -> bool:
    return isinstance(node, KVPool)


def num_bytes(tree: object) -> int:
    """Bytes of all arrays of a tree, over all devices once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
