"""What the engine is measured against: the same Llama as a bare loop on the device, with no engine around it.

Prefill of the whole batch at once, then a `fori_loop` of greedy steps over a cache that lies in one piece a row. It
reads the engine's own parameters, and nothing else of the engine but the mathematics of its layers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import append, attention, rotate
from pallas_kernels.attention.xla import BLOCK_KEYS, MAX_ROW_KEYS
from streamserve.models.config import ModelConfig
from streamserve.models.layers import rotary_angles
from streamserve.types import LayerKV

_MASK = -1e30


class CacheOps(NamedTuple):
    """How one layer's cache is written and read.

    Attributes:
      write: `(layer, k_BTGD, v_BTGD, start_B) -> layer`.
      attend: `(q_BTHD, layer, start_B) -> mixed_BTHD`.
    """

    write: Callable[..., LayerKV]
    attend: Callable[..., jax.Array]


def contiguous_cache(scale: float, *, bounded: bool) -> CacheOps:
    """Build a cache of one piece a row, [B, G, C, D]; attention reads it in blocks up to the longest row, or whole."""

    def write(layer: LayerKV, k_BTGD: jax.Array, v_BTGD: jax.Array, start_B: jax.Array) -> LayerKV:
        def put(row_GCD: jax.Array, new_TGD: jax.Array, start: jax.Array) -> jax.Array:
            zero = jnp.zeros_like(start)
            return jax.lax.dynamic_update_slice(row_GCD, jnp.swapaxes(new_TGD, 0, 1), (zero, start, zero))

        return LayerKV(k=jax.vmap(put)(layer.k, k_BTGD, start_B), v=jax.vmap(put)(layer.v, v_BTGD, start_B))

    def attend(q_BTHD: jax.Array, layer: LayerKV, start_B: jax.Array) -> jax.Array:
        batch, length, heads, head_dim = q_BTHD.shape
        kv_heads, capacity = layer.k.shape[1:3]
        block = capacity
        if bounded:
            block = min(max(64, min(BLOCK_KEYS // batch, MAX_ROW_KEYS) // 64 * 64), capacity)
        q = scale * q_BTHD.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
        q_BGXD = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
        position_BX = jnp.tile(start_B[:, None] + jnp.arange(length)[None], (1, heads // kv_heads))

        def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out, peak, total = carry
            first = jnp.minimum(index * block, capacity - block)
            k, v = (jax.lax.dynamic_slice_in_dim(part, first, block, axis=2) for part in (layer.k, layer.v))
            key = (first + jnp.arange(block))[None, None]
            seen = ((key <= position_BX[..., None]) & (key >= index * block))[:, None]
            scores = jnp.where(seen, jnp.einsum("bgxd,bgcd->bgxc", q_BGXD, k), _MASK)
            top = jnp.maximum(peak, scores.max(-1))
            weights, shrink = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0), jnp.exp(peak - top)
            out = out * shrink[..., None] + jnp.einsum("bgxc,bgcd->bgxd", weights, v)
            return out, top, total * shrink + weights.sum(-1)

        begin = (jnp.zeros_like(q_BGXD), jnp.full(q_BGXD.shape[:3], _MASK), jnp.zeros(q_BGXD.shape[:3]))
        num_blocks = (jnp.max(start_B) + length + block - 1) // block
        out, _, total = jax.lax.fori_loop(0, num_blocks, step, begin)
        mixed = (out / total[..., None]).reshape(batch, kv_heads, -1, length, head_dim)
        return mixed.transpose(0, 3, 1, 2, 4).reshape(q_BTHD.shape)

    return CacheOps(write=write, attend=attend)


def paged_cache(scale: float, table_BM: jax.Array) -> CacheOps:
    """Build the engine's own cache over a table of pages."""
    return CacheOps(
        write=lambda layer, k, v, start_B: LayerKV(*append(layer.k, layer.v, k, v, table_BM, start_B)),
        attend=lambda q, layer, start_B: attention(q, layer.k, layer.v, table_BM, start_B, scale=scale),
    )


def forward(
    config: ModelConfig,
    params: Any,
    tokens_BT: jax.Array,
    layers: tuple[LayerKV, ...],
    start_B: jax.Array,
    ops: CacheOps,
) -> tuple[jax.Array, tuple[LayerKV, ...]]:
    """Run a decoder without biases or norms of queries; gives the logits of the last position and the caches."""
    heads, head_dim = config.heads_per_group, config.head_dim
    norm = functools.partial(_rms_norm, eps=config.rms_norm_eps)
    position_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])[None]
    angle = rotary_angles(position_BT, config.rope, head_dim)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, after = params["embedding"][tokens_BT], []
    for index, layer in enumerate(layers):
        weights = params["layers"][index]
        qkv = jnp.einsum(
            "bte,egxd->btgxd", norm(x, weights["attention_norm"]["scale"]), weights["attention"]["qkv_kernel"]
        )
        q = rotate(qkv[..., :heads, :].reshape(*x.shape[:2], -1, head_dim), cos, sin)
        layer = ops.write(layer, rotate(qkv[..., heads, :], cos, sin), qkv[..., heads + 1, :], start_B)
        mixed = ops.attend(q, layer, start_B).reshape(*x.shape[:2], -1)
        x = x + mixed @ weights["attention"]["out_kernel"].reshape(mixed.shape[-1], -1)
        both = jnp.einsum("bte,ezf->btzf", norm(x, weights["mlp_norm"]["scale"]), weights["mlp"]["gate_up_kernel"])
        x = x + (jax.nn.silu(both[:, :, 0]) * both[:, :, 1]) @ weights["mlp"]["down_kernel"]
        after.append(layer)
    last_BE = norm(x[:, -1], params["final_norm"]["scale"])
    head = params["embedding"] if config.tied_head else params["head"]
    return last_BE @ head.T, tuple(after)


def compile_loop(config: ModelConfig, params: Any, *, batch: int, prompt: int, output: int) -> Callable[..., jax.Array]:
    """Compile the bare loop: `(params, tokens [batch, prompt]) -> tokens [batch, output]`, greedy.

    The cache is read whole, which is the fastest for a context of a few hundred tokens.
    """
    ops = contiguous_cache(config.head_dim**-0.5, bounded=False)

    def run(params: Any, tokens_BS: jax.Array) -> jax.Array:
        dims = (batch, config.num_kv_heads, prompt + output, config.head_dim)
        layers = tuple(LayerKV(k=jnp.zeros(dims), v=jnp.zeros(dims)) for _ in range(config.num_layers))
        logits, layers = forward(config, params, tokens_BS, layers, jnp.zeros((batch,), jnp.int32), ops)
        first_B = jnp.argmax(logits, axis=-1).astype(jnp.int32)

        def step(index: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            token_B, layers, out_BN = carry
            start_B = jnp.full((batch,), prompt, jnp.int32) + index - 1
            logits, layers = forward(config, params, token_B[:, None], layers, start_B, ops)
            token_B = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return token_B, layers, out_BN.at[:, index].set(token_B)

        out_BN = jnp.zeros((batch, output), jnp.int32).at[:, 0].set(first_B)
        return jax.lax.fori_loop(1, output, step, (first_B, layers, out_BN))[2]

    return jax.jit(run).lower(params, jax.ShapeDtypeStruct((batch, prompt), jnp.int32)).compile()


def _rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    normal = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return normal * scale[(None,) * (x.ndim - 1)]
