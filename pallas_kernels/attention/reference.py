"""The specification of attention over a cache, in plain jnp. Every other implementation is tested against it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Low enough that exp() is exactly zero beside any real score, and finite so that a row with no key gives no NaN.
MASK_VALUE = -1e30


def visible(position_BT: Int[Array, "B T"], num_keys: int, window: int | None) -> jax.Array:
    """Which keys each query may see: up to its own position, and within the sliding window if there is one.

    Args:
      position_BT: absolute positions of the queries.
      num_keys: cache positions, counted from 0.
      window: number of positions that a query sees, its own included; None for all.

    Returns:
      Boolean [B, T, num_keys].
    """
    key_C = jnp.arange(num_keys)[None, None]
    seen = key_C <= position_BT[..., None]
    return seen if window is None else seen & (key_C > position_BT[..., None] - window)


def attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BGCD: Float[Array, "B G C D"],
    v_BGCD: Float[Array, "B G C D"],
    start_B: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Array, "B T H D"]:
    """Grouped-query attention of `T` new tokens a row over a cache that already holds them.

    `softmax(scale * q k^T + mask) v` in float32; query head h reads key/value head `h // (H // G)`.

    Args:
      q_BTHD: queries; token t of row b sits at position `start_B[b] + t`.
      k_BGCD: cached keys.
      v_BGCD: cached values.
      start_B: position of each row's first query.
      scale: factor on the scores.
      window: sliding window in tokens, None for full causal attention.

    Returns:
      In the queries' dtype.
    """
    batch, length, heads, head_dim = q_BTHD.shape
    kv_heads, capacity = k_BGCD.shape[1], k_BGCD.shape[2]
    q_BTGMD = q_BTHD.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).astype(jnp.float32)
    scores_BGMTC = scale * jnp.einsum("btgmd,bgcd->bgmtc", q_BTGMD, k_BGCD.astype(jnp.float32))
    position_BT = start_B[:, None] + jnp.arange(length)[None]
    mask_BTC = visible(position_BT, capacity, window)
    weights_BGMTC = jax.nn.softmax(jnp.where(mask_BTC[:, None, None], scores_BGMTC, MASK_VALUE), axis=-1)
    out_BTGMD = jnp.einsum("bgmtc,bgcd->btgmd", weights_BGMTC, v_BGCD.astype(jnp.float32))
    return out_BTGMD.reshape(q_BTHD.shape).astype(q_BTHD.dtype)
