"""Test doubles: a model small enough to enumerate, and requests for it."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import attention
from streamserve import SamplingParams
from streamserve.kv import cache
from streamserve.types import ForwardFns, KVCache, KVShape, Request

VOCAB = 13
KV_SHAPE = KVShape(num_layers=1, num_kv_heads=2, head_dim=8, dtype=jnp.float32)


def tiny_params(seed: int) -> dict[str, jax.Array]:
    """Random weights of one attention layer; large, so that the next token depends on the whole context."""
    keys = jax.random.split(jax.random.key(seed), 5)
    width = 16
    return {
        "embed": jax.random.normal(keys[0], (VOCAB, width)),
        "position": 0.5 * jax.random.normal(keys[1], (512, width)),
        "qkv": jax.random.normal(keys[2], (3, width, 2, 8)) / 2,
        "out": jax.random.normal(keys[3], (2, 8, width)) / 2,
        "head": jax.random.normal(keys[4], (width, VOCAB)) / 2,
    }


def _forward(params, tokens_BT, kv: KVCache, start_B):
    position_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])
    x_BTE = params["embed"][tokens_BT] + params["position"][position_BT]
    q, k, v = (jnp.einsum("bte,ehd->bthd", x_BTE, weight) for weight in params["qkv"])
    layer = cache.append(kv.layers[0], k, v, start_B)
    mixed_BTHD = attention(q, layer.k, layer.v, start_B, scale=8**-0.5)
    return x_BTE + jnp.einsum("bthd,hde->bte", mixed_BTHD, params["out"]), KVCache(layers=(layer,))


TINY_FNS = ForwardFns(forward=_forward, logits=lambda params, hidden: hidden @ params["head"])


def make_request(name: str, prompt: tuple[int, ...], *, seed: int = 0, stop_ids: tuple[int, ...] = (), **params) -> Request:
    """Build a request as the LLM would."""
    params.setdefault("temperature", 0.0)
    return Request(
        request_id=name, prompt_token_ids=prompt, params=SamplingParams(**params), seed=seed, stop_ids=stop_ids
    )


def plain_greedy(params, prompt: tuple[int, ...], count: int) -> list[int]:
    """Decode greedily by the whole sequence anew for every token: the law that everything else is held to."""
    tokens = list(prompt)
    for _ in range(count):
        empty = cache.zeros(KV_SHAPE, 1, len(tokens))
        hidden, _ = _forward(params, jnp.asarray([tokens]), empty, jnp.zeros((1,), jnp.int32))
        tokens.append(int(jnp.argmax(hidden[0, -1] @ params["head"])))
    return tokens[len(prompt) :]
