"""What the attention kernels have in common: a tile of queries runs over keys in pages, with an online softmax.

A tile holds query heads of one key/value head, times tokens: x = head * tokens + token, all powers of two, so that
every key is read once for all of them. Keys are found one by one through the page table, so that the size of a loop
step does not depend on that of a page. Refs are whole arrays in the device's memory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import backend
from pallas_kernels.attention.reference import MASK_VALUE, SCRATCH_PAGE, KVScales, cap


class Inputs(NamedTuple):
    """What the kernels are called with; fields as the arguments of `reference.attention`."""

    q_BTHD: jax.Array
    k_NGPD: jax.Array
    v_NGPD: jax.Array
    table_BM: jax.Array
    start_B: jax.Array
    scales: KVScales | None

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """All but the factors, in the order of the kernels' refs."""
        return self[:5]

    @property
    def factors(self) -> tuple[jax.Array, ...]:
        """The factors, if there are any."""
        return () if self.scales is None else tuple(self.scales)


class Rule(NamedTuple):
    """What a score is made of; fields as the arguments of `reference.attention`."""

    scale: float
    window: int | None
    soft_cap: float | None


class Cut(NamedTuple):
    """How queries are cut into tiles.

    Attributes:
      heads: query heads of a tile, a power of two.
      tokens: query tokens of a tile, a power of two.
      group: query heads that share a key/value head.
      length: query tokens of a row.
    """

    heads: int
    tokens: int
    group: int
    length: int

    @property
    def rows(self) -> int:
        """Rows of a tile's matrices: no fewer than a product needs."""
        return max(backend.MIN_DOT, self.heads * self.tokens)

    @property
    def head_tiles(self) -> int:
        """Tiles over the heads of a group."""
        return pl.cdiv(self.group, self.heads)

    @property
    def token_tiles(self) -> int:
        """Tiles over the tokens of a row."""
        return pl.cdiv(self.length, self.tokens)


def cut(group: int, length: int, block_rows: int) -> Cut:
    """Cut queries into tiles of at most `block_rows` rows: all tokens first, then as many heads as fit."""
    tokens = min(backend.power_of_two(length), block_rows)
    heads = max(1, min(backend.power_of_two(group), block_rows // tokens))
    return Cut(heads=heads, tokens=tokens, group=group, length=length)


class Place(NamedTuple):
    """Which tile a program works on: scalars on the device.

    Attributes:
      row: of the batch.
      kv_head: g.
      head: the tile's first query head, counted within the group.
      token: the tile's first query token.
      start: position of the row's first query token.
    """

    row: Any
    kv_head: Any
    head: Any
    token: Any
    start: Any


class Queries(NamedTuple):
    """A tile of queries.

    Attributes:
      value_XD: in the dtype that products are made in; rows without a query are zero.
      position_X: absolute positions.
      token_X: index of the token in its row.
      head_X: index of the query head, over all heads.
      real_X: whether there is such a query.
    """

    value_XD: jax.Array
    position_X: jax.Array
    token_X: jax.Array
    head_X: jax.Array
    real_X: jax.Array


class KVRefs(NamedTuple):
    """Refs of the cache: pages, page table and, for int8 and float8, factors; page table `[B, M]`."""

    k: Any  # [N, G, P, D]
    v: Any  # [N, G, P, D]
    table: Any  # [B, M]
    k_scale: Any = None  # [N, G, P]
    v_scale: Any = None  # [N, G, P]


class Sums(NamedTuple):
    """Online softmax after some keys (Milakov and Gimelshein, arXiv 1805.02867), in float32.

    Attributes:
      out_XD: weighted sum of values, not yet divided.
      peak_X: largest score so far, times log2(e).
      total_X: sum of weights so far.
    """

    out_XD: jax.Array
    peak_X: jax.Array
    total_X: jax.Array


def product_dtype(pages: Any, queries: Any) -> Any:
    """In which dtype matrices are multiplied: that of the pages, or of the queries where pages hold bytes."""
    return pages if jnp.dtype(pages).itemsize > 1 else queries


def load_queries(q_ref: Any, place: Place, cut: Cut, dtype: Any) -> Queries:
    """Read a tile of queries from [B, T, H, D]."""
    x = jnp.arange(cut.rows)
    head_X, token_X = place.head + x // cut.tokens, place.token + x % cut.tokens
    real_X = (x < cut.heads * cut.tokens) & (head_X < cut.group) & (token_X < cut.length)
    head_X = place.kv_head * cut.group + head_X
    column_D = jnp.arange(q_ref.shape[-1])
    index = (place.row, token_X[:, None], head_X[:, None], column_D[None])
    value_XD = backend.load(q_ref, index, real_X[:, None])
    return Queries(value_XD.astype(dtype), place.start + token_X, token_X, head_X, real_X)


def attend(
    queries: Queries, kv: KVRefs, place: Place, bounds: tuple[Any, Any, Any], *, rule: Rule, block_keys: int
) -> Sums:
    """Run a tile over the keys of its row.

    Args:
      queries: the tile.
      kv: the cache.
      place: row and key/value head.
      bounds: first key, a multiple of `block_keys`; a number of keys, likewise, that every query sees if they are
        there at all, so that positions need not be compared; and the end, before which keys are read.
      rule: of the scores.
      block_keys: keys of a step.
    """
    page_size, head_dim = kv.k.shape[2:]
    rows, dtype = queries.value_XD.shape[0], queries.value_XD.dtype
    begin, clear, end = bounds
    column_D = jnp.arange(head_dim)

    def step(index: Any, sums: Sums, *, all_seen: bool) -> Sums:
        key_c = index * block_keys + jnp.arange(block_keys)
        column_c, slot_c = key_c // page_size, key_c % page_size
        page_c = backend.load(kv.table, (place.row, column_c), key_c < end, SCRATCH_PAGE)
        there_c = page_c != SCRATCH_PAGE
        where = (page_c[:, None], place.kv_head, slot_c[:, None], column_D[None])
        k_cD = backend.load(kv.k, where, there_c[:, None]).astype(dtype)
        scores_Xc = backend.dot(queries.value_XD, k_cD, transposed=True) * rule.scale
        if kv.k_scale is not None:
            scores_Xc *= backend.load(kv.k_scale, (page_c, place.kv_head, slot_c), there_c)[None]
        scores_Xc = cap(scores_Xc, rule.soft_cap) * backend.LOG2E
        seen_Xc = jnp.broadcast_to(there_c[None], (rows, block_keys))
        if not all_seen:
            seen_Xc &= key_c[None] <= queries.position_X[:, None]
            if rule.window is not None:
                seen_Xc &= key_c[None] > queries.position_X[:, None] - rule.window
        scores_Xc = jnp.where(seen_Xc, scores_Xc, MASK_VALUE)
        peak_X = jnp.maximum(sums.peak_X, jnp.max(scores_Xc, axis=1))
        weights_Xc = jnp.where(seen_Xc, jnp.exp2(scores_Xc - peak_X[:, None]), 0.0)
        rescale_X = jnp.exp2(sums.peak_X - peak_X)
        total_X = sums.total_X * rescale_X + jnp.sum(weights_Xc, axis=1)
        if kv.v_scale is not None:
            weights_Xc *= backend.load(kv.v_scale, (page_c, place.kv_head, slot_c), there_c)[None]
        v_cD = backend.load(kv.v, where, there_c[:, None]).astype(dtype)
        new_XD = backend.dot(weights_Xc.astype(dtype), v_cD, transposed=False)
        return Sums(sums.out_XD * rescale_X[:, None] + new_XD, peak_X, total_X)

    sums = Sums(
        out_XD=jnp.zeros((rows, head_dim), jnp.float32),
        peak_X=jnp.full((rows,), MASK_VALUE, jnp.float32),
        total_X=jnp.zeros((rows,), jnp.float32),
    )
    first = begin // block_keys
    if clear is not None:
        first_masked = jnp.maximum(first, clear // block_keys)
        sums = jax.lax.fori_loop(first, first_masked, lambda index, sums: step(index, sums, all_seen=True), sums)
        first = first_masked
    return jax.lax.fori_loop(first, pl.cdiv(end, block_keys), lambda i, sums: step(i, sums, all_seen=False), sums)


def divide(sums: Sums) -> jax.Array:
    """Finish a softmax: weighted means, and zeros where no key was seen."""
    return sums.out_XD / jnp.maximum(sums.total_X, jnp.finfo(jnp.float32).tiny)[:, None]


def count_keys(table_BM: jax.Array, start_B: jax.Array, length: int, page_size: int) -> jax.Array:
    """Count the positions up to each row's last query or its last page, whichever comes first; int32 [B]."""
    column_M = jnp.arange(1, table_BM.shape[1] + 1, dtype=jnp.int32)[None]
    pages_B = jnp.max(jnp.where(table_BM != SCRATCH_PAGE, column_M, 0), axis=1)
    return jnp.minimum(start_B + length, pages_B * page_size)
