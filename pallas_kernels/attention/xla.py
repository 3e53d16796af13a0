"""Attention by XLA alone, block by block over the keys: the CPU path, and the fallback everywhere.

The loop over key blocks ends at the longest row's last visible key, a number known only on the device, so a step over
short contexts does not pay for the cache's capacity. A block that is masked for a row leaves its running sums exactly
as they are (its weights are exp(-1e30) = 0 and its rescaling is exp(0) = 1): rows do not see each other's lengths.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.reference import MASK_VALUE

BLOCK_TOKENS = 256  # keys per loop step


class _Carry(NamedTuple):
    """Online softmax after some blocks (Milakov and Gimelshein, arXiv 1805.02867)."""

    out_BGXD: jax.Array  # weighted sum of values, not yet divided
    peak_BGX: jax.Array  # largest score so far
    total_BGX: jax.Array  # sum of weights so far


def attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BGCD: Float[Array, "B G C D"],
    v_BGCD: Float[Array, "B G C D"],
    start_B: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Array, "B T H D"]:
    """Same as `reference.attention`. X below is the M query heads of a group times T tokens."""
    batch, length, heads, head_dim = q_BTHD.shape
    kv_heads, capacity = k_BGCD.shape[1], k_BGCD.shape[2]
    group = heads // kv_heads
    q_BTGMD = (scale * q_BTHD.astype(jnp.float32)).reshape(batch, length, kv_heads, group, head_dim)
    q_BGXD = q_BTGMD.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * length, head_dim).astype(k_BGCD.dtype)
    position_BT = start_B[:, None] + jnp.arange(length)[None]
    position_BX = jnp.tile(position_BT, (1, group))
    block = min(BLOCK_TOKENS, capacity)

    def attend(index: jax.Array, carry: _Carry) -> _Carry:
        # The last block is moved back inside the cache; keys that the block before has seen are masked out.
        first = jnp.minimum(index * block, capacity - block)
        k_BGcD = jax.lax.dynamic_slice_in_dim(k_BGCD, first, block, axis=2)
        v_BGcD = jax.lax.dynamic_slice_in_dim(v_BGCD, first, block, axis=2)
        key_c = (first + jnp.arange(block))[None, None]
        seen_BXc = (key_c <= position_BX[..., None]) & (key_c >= index * block)
        if window is not None:
            seen_BXc &= key_c > position_BX[..., None] - window
        scores = jnp.einsum("bgxd,bgcd->bgxc", q_BGXD, k_BGcD, preferred_element_type=jnp.float32)
        scores = jnp.where(seen_BXc[:, None], scores, MASK_VALUE)
        peak_BGX = jnp.maximum(carry.peak_BGX, scores.max(axis=-1))
        rescale_BGX = jnp.exp(carry.peak_BGX - peak_BGX)
        weights = jnp.where(seen_BXc[:, None], jnp.exp(scores - peak_BGX[..., None]), 0.0)
        new_BGXD = jnp.einsum(
            "bgxc,bgcd->bgxd", weights.astype(v_BGcD.dtype), v_BGcD, preferred_element_type=jnp.float32
        )
        return _Carry(
            out_BGXD=carry.out_BGXD * rescale_BGX[..., None] + new_BGXD,
            peak_BGX=peak_BGX,
            total_BGX=carry.total_BGX * rescale_BGX + weights.sum(axis=-1),
        )

    num_blocks = jnp.minimum((jnp.max(start_B) + length + block - 1) // block, -(-capacity // block))
    rows = (batch, kv_heads, group * length)
    begin = _Carry(jnp.zeros((*rows, head_dim), jnp.float32), jnp.full(rows, MASK_VALUE), jnp.zeros(rows, jnp.float32))
    end = jax.lax.fori_loop(0, num_blocks, attend, begin)
    out_BGXD = end.out_BGXD / end.total_BGX[..., None]  # every query sees at least itself, so the total is positive
    out_BTGMD = out_BGXD.reshape(batch, kv_heads, group, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out_BTGMD.reshape(q_BTHD.shape).astype(q_BTHD.dtype)
