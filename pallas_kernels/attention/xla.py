"""Attention by XLA alone, block by block over the pages: the CPU path, and the fallback everywhere.

The loop over blocks ends at the longest row's last visible key, a number known only on the device, so a step over short
contexts does not pay for the cache's capacity. A block that is masked for a row leaves its running sums exactly as they
are (its weights are exp(-1e30) = 0 and its rescaling is exp(0) = 1): rows do not see each other's lengths.

A block is a copy of whole pages, for a single row by slices and else by a gather: their [G, P, D] lies in one piece, so
that XLA copies it in long runs. Copying the whole context at once costs twice as much, because the copy leaves the
cores' caches before it is used.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.reference import MASK_VALUE, SCRATCH_PAGE, KVScales, cap, visible

# Keys of all rows that a loop step reads, and of a single row. More leave a core's caches between gather and use (8
# rows of 512: 1.12 times the step, 32 rows of 512: 1.6 times); fewer pay for the loop (64 a row: up to 1.1 times).
BLOCK_KEYS = 2048
MAX_ROW_KEYS = 512
# A single row's pages are copied by a slice each, up to this number: on CPU 0.85 to 0.9 of the step with a gather. For
# two rows it makes no difference, for eight it costs 1.04.
MAX_SLICES = 16


class _Carry(NamedTuple):
    """Online softmax after some blocks (Milakov and Gimelshein, arXiv 1805.02867)."""

    out_BGXD: jax.Array  # weighted sum of values, not yet divided
    peak_BGX: jax.Array  # largest score so far
    total_BGX: jax.Array  # sum of weights so far


def pages_per_block(batch: int, page_size: int) -> int:
    """Pages of each row that one loop step reads."""
    return max(1, min(BLOCK_KEYS // batch, MAX_ROW_KEYS) // page_size)


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
    """Same as `reference.attention`. X below is the M query heads of a group times T tokens."""
    batch, length, heads, head_dim = q_BTHD.shape
    kv_heads, page_size = k_NGPD.shape[1:3]
    group = heads // kv_heads
    pages = min(pages_per_block(batch, page_size), table_BM.shape[1])
    block, by_slices = pages * page_size, batch == 1 and pages <= MAX_SLICES
    table_BM = jnp.pad(table_BM, ((0, 0), (0, -table_BM.shape[1] % pages)))
    q_BTGMD = (scale * q_BTHD.astype(jnp.float32)).reshape(batch, length, kv_heads, group, head_dim)
    dtype = k_NGPD.dtype if scales is None else q_BTHD.dtype
    q_BGXD = q_BTGMD.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * length, head_dim).astype(dtype)
    position_BX = jnp.tile(start_B[:, None] + jnp.arange(length)[None], (1, group))
    last_B = start_B + length - 1

    def fetch(pool_NGPD: jax.Array, page_Bp: jax.Array) -> jax.Array:
        if by_slices:
            parts = [jax.lax.dynamic_slice_in_dim(pool_NGPD, page_Bp[0, index], 1) for index in range(pages)]
            return jnp.concatenate(parts, axis=2)
        # Heads keep a dimension of their own: they may be divided among devices, and the pool must not be collected.
        part_BpGPD = pool_NGPD.at[page_Bp].get(mode="promise_in_bounds")
        return part_BpGPD.swapaxes(1, 2).reshape(batch, kv_heads, block, head_dim)

    def factors(scale_NGP: jax.Array, page_Bp: jax.Array) -> jax.Array:
        part_BpGP = scale_NGP.at[page_Bp].get(mode="promise_in_bounds")
        return part_BpGP.swapaxes(1, 2).reshape(batch, kv_heads, 1, block)

    def pages_of(index: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(table_BM, index * pages, pages, axis=1)

    def attend(index: jax.Array, page_Bp: jax.Array, carry: _Carry) -> _Carry:
        key_c = index * block + jnp.arange(block)
        k_BGcD, v_BGcD = fetch(k_NGPD, page_Bp).astype(dtype), fetch(v_NGPD, page_Bp).astype(dtype)
        there_Bc = jnp.repeat(page_Bp != SCRATCH_PAGE, page_size, axis=1)
        reached_Bc = there_Bc & (key_c[None] <= last_B[:, None])
        v_BGcD = jnp.where(reached_Bc[:, None, :, None], v_BGcD, jnp.zeros((), v_BGcD.dtype))
        seen_BXc = visible(position_BX, key_c, window) & there_Bc[:, None]
        scores = jnp.einsum("bgxd,bgcd->bgxc", q_BGXD, k_BGcD, preferred_element_type=jnp.float32)
        if scales is not None:
            scores = scores * factors(scales.k_NGP, page_Bp)
        scores = jnp.where(seen_BXc[:, None], cap(scores, soft_cap), MASK_VALUE)
        peak_BGX = jnp.maximum(carry.peak_BGX, scores.max(axis=-1))
        rescale_BGX = jnp.exp(carry.peak_BGX - peak_BGX)
        weights = jnp.where(seen_BXc[:, None], jnp.exp(scores - peak_BGX[..., None]), 0.0)
        scaled = weights
        if scales is not None:
            reached = reached_Bc[:, None, None]
            scaled = weights * jnp.where(reached, factors(scales.v_NGP, page_Bp), 0.0)
        new_BGXD = jnp.einsum("bgxc,bgcd->bgxd", scaled.astype(dtype), v_BGcD, preferred_element_type=jnp.float32)
        return _Carry(
            out_BGXD=carry.out_BGXD * rescale_BGX[..., None] + new_BGXD,
            peak_BGX=peak_BGX,
            total_BGX=carry.total_BGX * rescale_BGX + weights.sum(axis=-1),
        )

    num_blocks = jnp.minimum((jnp.max(last_B) + block) // block, table_BM.shape[1] // pages)
    rows = (batch, kv_heads, group * length)
    begin = _Carry(jnp.zeros((*rows, head_dim), jnp.float32), jnp.full(rows, MASK_VALUE), jnp.zeros(rows, jnp.float32))

    def ahead(index: jax.Array, carry: tuple[jax.Array, _Carry]) -> tuple[jax.Array, _Carry]:
        page_Bp, online = carry
        return pages_of(index + 1), attend(index, page_Bp, online)

    # A table of one block needs no loop, which costs a tenth of a small model's step. A row that is copied by slices
    # gets its page numbers a block ahead: where they are used at once, XLA looks them up again for every element.
    if table_BM.shape[1] == pages:
        end = attend(jnp.int32(0), table_BM, begin)
    elif by_slices:
        _, end = jax.lax.fori_loop(0, num_blocks, ahead, (pages_of(jnp.int32(0)), begin))
    else:
        end = jax.lax.fori_loop(0, num_blocks, lambda index, carry: attend(index, pages_of(index), carry), begin)
    # The total is at least one where a key was seen: that of the largest score counts one.
    out_BGXD = end.out_BGXD / jnp.maximum(end.total_BGX, 1.0)[..., None]
    out_BTGMD = out_BGXD.reshape(batch, kv_heads, group, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out_BTGMD.reshape(q_BTHD.shape).astype(q_BTHD.dtype)


def rotate_and_write(
    qkv_BTGXD: Float[Array, "B T G X D"],
    cos_BTd: Float[Array, "B T half"],
    sin_BTd: Float[Array, "B T half"],
    k_NGPD: Float[Array, "N G P D"],
    v_NGPD: Float[Array, "N G P D"],
    table_BM: Int[Array, "B M"],
    start_B: Int[Array, "B"],
) -> tuple[Float[Array, "B T H D"], Float[Array, "N G P D"], Float[Array, "N G P D"]]:
    """Turn queries and keys by their positions, and write keys and values into pages.

    Args:
      qkv_BTGXD: of each group its M query heads, its key and its value (X = M + 2).
      cos_BTd: float32 cosine of the angle by which the pair (i, i + D/2) of dimensions is turned.
      sin_BTd: float32 sine of it.
      k_NGPD: pages of keys.
      v_NGPD: pages of values.
      table_BM: the rows' pages.
      start_B: position of each row's first token.

    Returns:
      The queries [B, T, H, D], and the pages with `T` more tokens a row.
    """
    q_BTGMD, k_BTGD, v_BTGD = qkv_BTGXD[..., :-2, :], qkv_BTGXD[..., -2, :], qkv_BTGXD[..., -1, :]
    q_BTHD = q_BTGMD.reshape(*qkv_BTGXD.shape[:2], -1, qkv_BTGXD.shape[-1])
    q_BTHD, k_BTGD = rotate(q_BTHD, cos_BTd, sin_BTd), rotate(k_BTGD, cos_BTd, sin_BTd)
    return q_BTHD, *append(k_NGPD, v_NGPD, k_BTGD, v_BTGD, table_BM, start_B)


def rotate(
    x_BTHD: Float[Array, "B T H D"], cos_BTd: Float[Array, "B T half"], sin_BTd: Float[Array, "B T half"]
) -> Float[Array, "B T H D"]:
    """Rotate each pair (i, i + D/2) of dimensions (RoFormer, arXiv 2104.09864); in float32, in the input's dtype."""
    cos, sin = cos_BTd[:, :, None], sin_BTd[:, :, None]
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHD.dtype)


def append(
    k_NGPD: Float[Array, "N G P D"],
    v_NGPD: Float[Array, "N G P D"],
    k_BTGD: Float[Array, "B T G D"],
    v_BTGD: Float[Array, "B T G D"],
    table_BM: Int[Array, "B M"],
    start_B: Int[Array, "B"],
) -> tuple[Float[Array, "N G P D"], Float[Array, "N G P D"]]:
    """Write `T` new tokens a row at positions `start_B ...`, as the pages' dtype.

    Undoing it is a change of the caller's lengths: what lies beyond a length is never read. Positions beyond the
    table, and those whose table entry is the scratch page, go to the scratch page: nobody reads them.

    Args:
      k_NGPD: pages of keys.
      v_NGPD: pages of values.
      k_BTGD: new keys.
      v_BTGD: new values.
      table_BM: page of each row's m-th stretch of P positions.
      start_B: first position of each row.
    """
    page_size, columns = k_NGPD.shape[2], table_BM.shape[1]
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

    return write(k_NGPD, k_BTGD), write(v_NGPD, v_BTGD)
