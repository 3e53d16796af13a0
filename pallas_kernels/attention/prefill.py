"""Attention of many query tokens a row (prompts, and chunks of them that continue a cached prefix), bound by products.

A flash-attention kernel over pages: a program takes a tile of queries and runs over the keys that they may see. Those
before the tile's first query are seen by all of it, so that only the last steps compare positions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import backend
from pallas_kernels.attention import tile
from pallas_kernels.attention.config import BlockConfig
from pallas_kernels.attention.tile import Cut, Inputs, KVRefs, Place, Rule


def _kernel(
    q_ref: Any,  # [B, T, H, D]
    k_ref: Any,  # [N, G, P, D]
    v_ref: Any,  # [N, G, P, D]
    table_ref: Any,  # [B, M]
    start_ref: Any,  # [B]
    keys_ref: Any,  # [B]
    *refs: Any,  # two of factors [N, G, P] or none; output [B, T, H, D]
    rule: Rule,
    cut: Cut,
    block_keys: int,
) -> None:
    """Attend from one tile. Grid: tiles of heads of all key/value heads, tiles of tokens from the last, rows."""
    *scale_refs, out_ref = refs
    row = pl.program_id(2)
    start = backend.load(start_ref, (row,))
    # The last tokens see the most keys: their programs start first.
    token = (pl.num_programs(1) - 1 - pl.program_id(1)) * cut.tokens
    kv_head, head = pl.program_id(0) // cut.head_tiles, pl.program_id(0) % cut.head_tiles * cut.heads
    place = Place(row, kv_head, head, token, start)
    queries = tile.load_queries(q_ref, place, cut, tile.product_dtype(k_ref.dtype, q_ref.dtype))
    end = jnp.minimum(start + token + cut.tokens, backend.load(keys_ref, (row,)))
    begin, clear = 0, jnp.minimum(start + token, end) // block_keys * block_keys
    if rule.window is not None:
        begin, clear = jnp.maximum(start + token - rule.window + 1, 0) // block_keys * block_keys, None
    kv = KVRefs(k_ref, v_ref, table_ref, *scale_refs)
    sums = tile.attend(queries, kv, place, (begin, clear, end), rule=rule, block_keys=block_keys)
    column_D = jnp.arange(q_ref.shape[-1])
    index = (row, queries.token_X[:, None], queries.head_X[:, None], column_D[None])
    backend.store(out_ref, index, tile.divide(sums), queries.real_X[:, None])


def attention(inputs: Inputs, *, rule: Rule, config: BlockConfig, interpret: bool | None) -> Float[Array, "B T H D"]:
    """Same as `reference.attention`, for many tokens a row; arguments as those of `decode.attention`."""
    batch, length, heads, _ = inputs.q_BTHD.shape
    kv_heads, page_size = inputs.k_NGPD.shape[1:3]
    cut = tile.cut(heads // kv_heads, length, config.block_rows)
    attend = backend.call(
        functools.partial(_kernel, rule=rule, cut=cut, block_keys=config.block_keys),
        name="paged_prefill",
        grid=(kv_heads * cut.head_tiles, cut.token_tiles, batch),
        inputs=6 + len(inputs.factors),
        out_shape=jax.ShapeDtypeStruct(inputs.q_BTHD.shape, inputs.q_BTHD.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    keys_B = tile.count_keys(inputs.table_BM, inputs.start_B, length, page_size)
    return attend(*inputs.arrays, keys_B, *inputs.factors)
