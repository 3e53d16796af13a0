"""Attention of a few query tokens a row (decoding, and verifying drafts), bound by the bytes of keys and values.

All query heads of a key/value head, times the query tokens, share a tile, so every key is read once. The keys of a
row are divided into parts of one size, which follows from the room of the page table and from the device, not from the
row or the batch: what a row gets does not depend, to the last bit, on who else is there, and without a window its parts
do not move when it grows. A fixed number of programs works off the parts of all rows, so that one long row among short
ones is shared by all. Each part is a piece of a softmax in float32; a second kernel merges the pieces of each row. The
pieces take `parts * T * H * D * 4` bytes beside the arguments: 34 MB for 64 rows of 8,192 tokens with one query of
Llama-3-8B each.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import backend
from pallas_kernels.attention import tile
from pallas_kernels.attention.config import BlockConfig
from pallas_kernels.attention.reference import MASK_VALUE
from pallas_kernels.attention.tile import Cut, Inputs, KVRefs, Place, Rule

MIN_PART_BLOCKS = 4  # loop steps of a part, at least: each costs a merge
MERGED_AT_ONCE = 4096  # numbers of a query's parts that the merging kernel reads in one step: 32 a thread
PARTS_A_PROGRAM = 2  # of a row that fills the page table and is alone, at most


class Parts(NamedTuple):
    """The division of all rows' keys, made anew on the device in every step.

    Attributes:
      plan: int32 [3, B]: number of parts of this row and those before it; the row's first key; its end.
      size: keys a part.
      room: parts that there may be, at most.
    """

    plan: jax.Array
    size: int
    room: int


def divide_keys(
    table_BM: jax.Array, start_B: jax.Array, *, length: int, page_size: int, window: int | None, block: int, most: int
) -> Parts:
    """Divide the keys of each row into parts of one size: as small as gives a whole row at most `most` of them.

    Args:
      table_BM: int32, pages of the rows.
      start_B: int32, position of each row's first query.
      length: T.
      page_size: P.
      window: sliding window; keys before it are left out.
      block: keys of a loop step; parts begin at multiples of it.
      most: parts of a row that fills the table.
    """
    capacity = table_BM.shape[1] * page_size
    size = max(pl.cdiv(pl.cdiv(capacity, most), block), MIN_PART_BLOCKS) * block
    end_B = tile.count_keys(table_BM, start_B, length, page_size)
    first_B = jnp.zeros_like(end_B) if window is None else jnp.maximum(start_B - window + 1, 0) // block * block
    parts_B = pl.cdiv(jnp.maximum(end_B - first_B, 0), size)
    batch = parts_B.shape[0]
    upto_BB = jnp.arange(batch)[None] <= jnp.arange(batch)[:, None]
    through_B = jnp.sum(jnp.where(upto_BB, parts_B[None], 0), axis=1)
    plan = jnp.stack([through_B, first_B, end_B]).astype(jnp.int32)
    return Parts(plan=plan, size=size, room=batch * pl.cdiv(capacity, size))


def _attend_kernel(
    q_ref: Any,  # [B, T, H, D]
    k_ref: Any,  # [N, G, P, D]
    v_ref: Any,  # [N, G, P, D]
    table_ref: Any,  # [B, M]
    start_ref: Any,  # [B]
    plan_ref: Any,  # [3, B]
    *refs: Any,  # two of factors [N, G, P] or none; parts [W, T, H, D], peaks [W, T, H], totals [W, T, H]
    rule: Rule,
    cut: Cut,
    size: int,
    block_keys: int,
) -> None:
    """Attend over every so-manieth part of `size` keys. Grid: programs, key/value heads."""
    *scale_refs, out_ref, peak_ref, total_ref = refs
    kv = KVRefs(k_ref, v_ref, table_ref, *scale_refs)
    dtype = tile.product_dtype(k_ref.dtype, q_ref.dtype)
    batch, column_D = q_ref.shape[0], jnp.arange(q_ref.shape[-1])
    program, programs = pl.program_id(0), pl.num_programs(0)
    kv_head = pl.program_id(1)
    row_B = jnp.arange(backend.power_of_two(batch))
    through_B = backend.load(plan_ref, (0, row_B), row_B < batch, jnp.iinfo(jnp.int32).max)

    def work(turn: Any, carry: None) -> None:
        part = program + turn * programs
        done_B = through_B <= part
        row, before = jnp.sum(done_B.astype(jnp.int32)), jnp.max(jnp.where(done_B, through_B, 0))
        first, last = (backend.load(plan_ref, (line, row)) for line in (1, 2))
        begin = first + (part - before) * size
        place = Place(row, kv_head, 0, 0, backend.load(start_ref, (row,)))
        queries = tile.load_queries(q_ref, place, cut, dtype)
        bounds = (begin, None, jnp.minimum(begin + size, last))
        sums = tile.attend(queries, kv, place, bounds, rule=rule, block_keys=block_keys)
        at_X = (part, queries.token_X, queries.head_X)
        at_XD = (part, queries.token_X[:, None], queries.head_X[:, None], column_D[None])
        backend.store(out_ref, at_XD, sums.out_XD, queries.real_X[:, None])
        backend.store(peak_ref, at_X, sums.peak_X, queries.real_X)
        backend.store(total_ref, at_X, sums.total_X, queries.real_X)
        return carry

    total = backend.load(plan_ref, (0, batch - 1))
    jax.lax.fori_loop(0, pl.cdiv(jnp.maximum(total - program, 0), programs), work, None)


def _merge_kernel(
    part_ref: Any,  # [W, T, H, D]
    peak_ref: Any,  # [W, T, H]
    total_ref: Any,  # [W, T, H]
    plan_ref: Any,  # [3, B]
    out_ref: Any,  # [B, T, H, D]
    *,
    at_once: int,
) -> None:
    """Merge the parts of one query: a softmax of softmaxes. Grid: rows, tokens, heads."""
    row, token, head = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    through = backend.load(plan_ref, (0, row))
    before = jnp.where(row > 0, backend.load(plan_ref, (0, jnp.maximum(row - 1, 0))), 0)
    head_dim = out_ref.shape[-1]
    column_D = jnp.arange(head_dim)

    def step(index: Any, carry: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, Any, Any]:
        out_D, peak, total = carry
        part_S = before + index * at_once + jnp.arange(at_once)
        there_S = part_S < through
        peak_S = backend.load(peak_ref, (part_S, token, head), there_S, MASK_VALUE)
        total_S = backend.load(total_ref, (part_S, token, head), there_S)
        out_SD = backend.load(part_ref, (part_S[:, None], token, head, column_D[None]), there_S[:, None])
        new_peak = jnp.maximum(peak, jnp.max(peak_S))
        weight_S = jnp.where(there_S, jnp.exp2(peak_S - new_peak), 0.0)
        rescale = jnp.exp2(peak - new_peak)
        out_D = out_D * rescale + jnp.sum(out_SD * weight_S[:, None], axis=0)
        return out_D, new_peak, total * rescale + jnp.sum(total_S * weight_S)

    begin = (jnp.zeros((head_dim,), jnp.float32), jnp.float32(MASK_VALUE), jnp.float32(0.0))
    steps = pl.cdiv(through - before, at_once)
    out_D, _, total = jax.lax.fori_loop(0, steps, step, begin)
    out_D = out_D / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    backend.store(out_ref, (row, token, head, column_D), out_D, column_D >= 0)


def attention(
    inputs: Inputs, *, rule: Rule, config: BlockConfig, num_cores: int, interpret: bool | None
) -> Float[Array, "B T H D"]:
    """Same as `reference.attention`, for few tokens a row.

    Args:
      inputs: queries and cache.
      rule: of the scores.
      config: block sizes.
      num_cores: of the GPU; `config.programs_per_core` programs run on each.
      interpret: run the kernels in plain JAX; None does so where there is no GPU.

    Raises:
      ValueError: a tile does not hold a row's queries.
    """
    batch, length, heads, head_dim = inputs.q_BTHD.shape
    kv_heads, page_size = inputs.k_NGPD.shape[1:3]
    cut = tile.cut(heads // kv_heads, length, config.block_rows)
    if cut.token_tiles > 1 or cut.head_tiles > 1:
        raise ValueError(f"{config.block_rows=} must hold {heads // kv_heads} heads of {length} tokens")
    programs = pl.cdiv(num_cores * config.programs_per_core, kv_heads)
    parts = divide_keys(
        inputs.table_BM,
        inputs.start_B,
        length=length,
        page_size=page_size,
        window=rule.window,
        block=config.block_keys,
        most=PARTS_A_PROGRAM * programs,
    )
    whole = jax.ShapeDtypeStruct((parts.room, length, heads, head_dim), jnp.float32)
    number = jax.ShapeDtypeStruct((parts.room, length, heads), jnp.float32)
    attend = backend.call(
        functools.partial(_attend_kernel, rule=rule, cut=cut, size=parts.size, block_keys=config.block_keys),
        name="paged_decode",
        grid=(min(programs, parts.room), kv_heads),
        inputs=6 + len(inputs.factors),
        out_shape=(whole, number, number),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    merge = backend.call(
        functools.partial(_merge_kernel, at_once=MERGED_AT_ONCE // head_dim),
        name="paged_decode_merge",
        grid=(batch, length, heads),
        inputs=4,
        out_shape=jax.ShapeDtypeStruct(inputs.q_BTHD.shape, inputs.q_BTHD.dtype),
        num_warps=4,
        num_stages=1,
        interpret=interpret,
    )
    return merge(*attend(*inputs.arrays, parts.plan, *inputs.factors), parts.plan)
