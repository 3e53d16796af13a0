"""Pure device operations on paged key/value caches. Who owns which page is the ledger's business (`kv/pages.py`)."""

from typing import Any

import jax
import jax.numpy as jnp

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
