"""The specification of attention over a paged cache, in plain jnp. Every implementation is tested against it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Low enough that exp() is exactly zero beside any real score, and finite so that a row with no key gives no NaN.
MASK_VALUE = -1e30
# A table entry that names this page stands for no keys: here rows write what nobody needs, and anything may lie in it.
SCRATCH_PAGE = 0


class KVScales(NamedTuple):
    """What the numbers of int8 or float8 pages are multiplied by: one factor a token and head.

    Attributes:
      k_NGP: float32, of keys.
      v_NGP: float32, of values.
    """

    k_NGP: jax.Array
    v_NGP: jax.Array


def visible(position_BT: Int[Array, "B T"], key_C: Int[Array, "C"], window: int | None) -> jax.Array:
    """Which keys each query may see: up to its own position, and within the sliding window if there is one.

    Args:
      position_BT: absolute positions of the queries.
      key_C: absolute positions of the keys.
      window: number of positions that a query sees, its own included; None for all.

    Returns:
      Boolean [B, T, C].
    """
    key = key_C[None, None]
    seen = key <= position_BT[..., None]
    return seen if window is None else seen & (key > position_BT[..., None] - window)


def cap(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    """Bound scores smoothly: `cap tanh(scores / cap)` (Gemma 2, arXiv 2408.00118)."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def attention(
    q_BTHD: Float[Array, "B T H D"],
    k_NGPD: Float[Array, "N G P D"] | Int[Array, "N G P D"],
    v_NGPD: Float[Array, "N G P D"] | Int[Array, "N G P D"],
    table_BM: Int[Array, "B M"],
    start_B: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    scales: KVScales | None = None,
) -> Float[Array, "B T H D"]:
    """Grouped-query attention of `T` new tokens a row over a cache that already holds them.

    `softmax(cap(scale * q k^T) + mask) v` in float32; query head h reads key/value head `h // (H // G)`. The key at
    position c of row b lies in page `table_BM[b, c // P]`, at place `c % P`. What lies beyond a row's last query, or in
    the scratch page, is not read, not even multiplied by zero: it may be NaN. A query that sees no key gets zeros.

    Args:
      q_BTHD: queries; token t of row b sits at position `start_B[b] + t`.
      k_NGPD: pages of keys.
      v_NGPD: pages of values.
      table_BM: the rows' pages.
      start_B: position of each row's first query.
      scale: factor on the scores.
      window: sliding window in tokens, None for full causal attention.
      soft_cap: bound on the scores' size; None for none.
      scales: what the pages' numbers are multiplied by; None for one.

    Returns:
      In the queries' dtype.
    """
    batch, length, heads, head_dim = q_BTHD.shape
    kv_heads, page_size = k_NGPD.shape[1:3]
    capacity = table_BM.shape[1] * page_size

    def lay_out(pool: jax.Array, scale_NGP: jax.Array | None) -> jax.Array:
        real = pool.astype(jnp.float32) if scale_NGP is None else pool.astype(jnp.float32) * scale_NGP[..., None]
        return real[table_BM].swapaxes(1, 2).reshape(batch, kv_heads, capacity, head_dim)

    position_BT = start_B[:, None] + jnp.arange(length)[None]
    there_BC = jnp.repeat(table_BM != SCRATCH_PAGE, page_size, axis=1)
    seen_BTC = visible(position_BT, jnp.arange(capacity), window) & there_BC[:, None]
    k_BGCD = lay_out(k_NGPD, None if scales is None else scales.k_NGP)
    v_BGCD = lay_out(v_NGPD, None if scales is None else scales.v_NGP)
    v_BGCD = jnp.where(seen_BTC.any(axis=1)[:, None, :, None], v_BGCD, 0.0)
    q_BTGMD = q_BTHD.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).astype(jnp.float32)
    scores_BGMTC = cap(scale * jnp.einsum("btgmd,bgcd->bgmtc", q_BTGMD, k_BGCD), soft_cap)
    weights_BGMTC = jax.nn.softmax(jnp.where(seen_BTC[:, None, None], scores_BGMTC, MASK_VALUE), axis=-1)
    weights_BGMTC = jnp.where(seen_BTC[:, None, None], weights_BGMTC, 0.0)
    out_BTGMD = jnp.einsum("bgmtc,bgcd->btgmd", weights_BGMTC, v_BGCD)
    return out_BTGMD.reshape(q_BTHD.shape).astype(q_BTHD.dtype)
