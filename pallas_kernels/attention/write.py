"""Rotary embedding and the write into pages, in one kernel: what lies between the projection and attention.

It reads the fused projection once, turns queries and keys, and writes keys and values where the page table says, in
place. Grid: tokens of all rows, key/value heads.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import backend
from pallas_kernels.attention.reference import SCRATCH_PAGE


def _kernel(
    qkv_ref: Any,  # [B, T, G, M + 2, D]
    cos_ref: Any,  # [B, T, D / 2]
    sin_ref: Any,  # [B, T, D / 2]
    k_in_ref: Any,  # [N, G, P, D], the same memory as k_ref
    v_in_ref: Any,  # [N, G, P, D], the same memory as v_ref
    table_ref: Any,  # [B, M]
    start_ref: Any,  # [B]
    q_ref: Any,  # [B, T, H, D]
    k_ref: Any,  # [N, G, P, D]
    v_ref: Any,  # [N, G, P, D]
) -> None:
    """Turn and write one token's heads of one group."""
    del k_in_ref, v_in_ref
    length, group, head_dim = qkv_ref.shape[1], qkv_ref.shape[3] - 2, qkv_ref.shape[4]
    page_size, columns, half = k_ref.shape[2], table_ref.shape[1], head_dim // 2
    row, token, kv_head = pl.program_id(0) // length, pl.program_id(0) % length, pl.program_id(1)
    low_d, all_D = jnp.arange(half), jnp.arange(head_dim)
    cos_d, sin_d = backend.load(cos_ref, (row, token, low_d)), backend.load(sin_ref, (row, token, low_d))

    member_M = jnp.arange(backend.power_of_two(group))
    real_M1 = (member_M < group)[:, None]
    first_Md, second_Md = (
        backend.load(qkv_ref, (row, token, kv_head, member_M[:, None], low_d[None] + shift), real_M1)
        for shift in (0, half)
    )
    first_Md, second_Md = _turn(first_Md, second_Md, cos_d[None], sin_d[None])
    head_M1 = (kv_head * group + member_M)[:, None]
    backend.store(q_ref, (row, token, head_M1, low_d[None]), first_Md, real_M1)
    backend.store(q_ref, (row, token, head_M1, low_d[None] + half), second_Md, real_M1)

    position = backend.load(start_ref, (row,)) + token
    column = position // page_size
    page = backend.load(table_ref, (row, jnp.minimum(column, columns - 1)))
    page, slot = jnp.where(column < columns, page, SCRATCH_PAGE), position % page_size
    first_d, second_d = (backend.load(qkv_ref, (row, token, kv_head, group, low_d + shift)) for shift in (0, half))
    first_d, second_d = _turn(first_d, second_d, cos_d, sin_d)
    backend.store(k_ref, (page, kv_head, slot, low_d), first_d, low_d >= 0)
    backend.store(k_ref, (page, kv_head, slot, low_d + half), second_d, low_d >= 0)
    value_D = backend.load(qkv_ref, (row, token, kv_head, group + 1, all_D))
    backend.store(v_ref, (page, kv_head, slot, all_D), value_D, all_D >= 0)


def _turn(first: jax.Array, second: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotate pairs (i, i + D/2) in float32, and round to the input's dtype as the model does."""
    dtype, first, second = first.dtype, first.astype(jnp.float32), second.astype(jnp.float32)
    return (first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)


def rotate_and_write(
    qkv_BTGXD: Float[Array, "B T G X D"],
    cos_BTd: Float[Array, "B T half"],
    sin_BTd: Float[Array, "B T half"],
    k_NGPD: Float[Array, "N G P D"],
    v_NGPD: Float[Array, "N G P D"],
    table_BM: Int[Array, "B M"],
    start_B: Int[Array, "B"],
    *,
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "N G P D"], Float[Array, "N G P D"]]:
    """Same as `xla.rotate_and_write`. The pages are changed in place where the caller gives them away.

    Raises:
      NotImplementedError: pages of bytes, or a head size that is no power of two.
    """
    batch, length, kv_heads, width, head_dim = qkv_BTGXD.shape
    if head_dim & (head_dim - 1) or k_NGPD.dtype.itemsize == 1:
        raise NotImplementedError(f"head size {head_dim}, pages of {k_NGPD.dtype}")
    write = backend.call(
        _kernel,
        name="rotate_and_write",
        grid=(batch * length, kv_heads),
        inputs=7,
        out_shape=(
            jax.ShapeDtypeStruct((batch, length, kv_heads * (width - 2), head_dim), qkv_BTGXD.dtype),
            jax.ShapeDtypeStruct(k_NGPD.shape, k_NGPD.dtype),
            jax.ShapeDtypeStruct(v_NGPD.shape, v_NGPD.dtype),
        ),
        num_warps=1 if head_dim <= 128 else 2,
        num_stages=1,
        aliases={3: 1, 4: 2},
        interpret=interpret,
    )
    return write(qkv_BTGXD, cos_BTd, sin_BTd, k_NGPD, v_NGPD, table_BM, start_B)
