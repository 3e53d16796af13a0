"""The decoder as two pure functions over a plain tree of parameters.

Owns the order of the layers and the split of the module: outside this file a model is `ForwardFns` and parameters, a
nested dict `{"embedding": ..., "layers": {0: ...}, ...}` with one subtree a layer. Knows no file and no mesh.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from streamserve.models.config import ModelConfig
from streamserve.models.layers import DecoderLayer, RMSNorm, new_param
from streamserve.types import ForwardFns, KVCache, KVPool, KVShape, Params


class Transformer(nnx.Module):
    """A decoder.

    Attributes:
      embedding: [V, E].
      layers: L decoder layers.
      final_norm: over E.
      head: [V, E], or None where the embedding serves.
    """

    def __init__(self, config: ModelConfig, dtype: jax.typing.DTypeLike, attention_implementation: str | None):
        self.embedding = new_param(dtype, config.vocab_size, config.hidden_size)
        self.layers = nnx.List(
            [DecoderLayer(config, window, attention_implementation, dtype) for window in config.windows]
        )
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.head = None if config.tied_head else new_param(dtype, config.vocab_size, config.hidden_size)

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Look tokens up."""
        return self.embedding[...][tokens_BT]

    def logits(self, hidden_XE: Float[Array, "*X E"]) -> Float[Array, "*X V"]:
        """Score the vocabulary, in float32."""
        table = self.embedding if self.head is None else self.head
        return jnp.einsum("...e,ve->...v", hidden_XE, table[...], preferred_element_type=jnp.float32)

    def states(
        self, tokens_BT: Int[Array, "B T"], cache: KVCache, start_B: Int[Array, "B"]
    ) -> tuple[tuple[jax.Array, ...], KVCache]:
        """Residual stream after the embedding and after each layer, then the final norm's output: L + 2 arrays."""
        with jax.named_scope("embed"):
            states, layers = [self.embed(tokens_BT)], []
        for index, (block, layer) in enumerate(zip(self.layers, cache.pool.layers, strict=True)):
            with jax.named_scope(f"layer_{index}"):
                x_BTE, layer = block(states[-1], layer, cache.table, start_B)
            states.append(x_BTE)
            layers.append(layer)
        with jax.named_scope("final_norm"):
            states.append(self.final_norm(states[-1]))
        return tuple(states), KVCache(pool=KVPool(layers=tuple(layers)), table=cache.table)


def forward_fns(config: ModelConfig, *, attention_implementation: str | None = None) -> ForwardFns:
    """Make a model's pure functions; both can be jitted, `forward` differentiated where its attention can be.

    Args:
      config: the model.
      attention_implementation: passed to the attention's door; None takes the best. "reference" is differentiable.

    Returns:
      `forward`, whose hidden states are past the final norm, and `logits`.
    """
    graphdef, _ = nnx.split(_abstract(config, jnp.float32, attention_implementation))

    def forward(params: Params, tokens_BT: jax.Array, cache: KVCache, start_B: jax.Array) -> tuple[jax.Array, KVCache]:
        states, cache = nnx.merge(graphdef, params).states(tokens_BT, cache, start_B)
        return states[-1], cache

    def logits(params: Params, hidden_XE: jax.Array) -> jax.Array:
        with jax.named_scope("logits"):
            return nnx.merge(graphdef, params).logits(hidden_XE)

    return ForwardFns(forward=forward, logits=logits)


def hidden_states(
    config: ModelConfig, params: Params, tokens_BT: jax.Array, cache: KVCache, start_B: jax.Array
) -> tuple[jax.Array, ...]:
    """Step through a model, for comparing it layer by layer.

    Args:
      config: the model.
      params: its parameters.
      tokens_BT: int32.
      cache: with room for `start_B + T` tokens.
      start_B: int32.

    Returns:
      L + 2 arrays [B, T, E]: after the embedding, after each layer, after the final norm.
    """
    graphdef, _ = nnx.split(_abstract(config, jnp.float32, None))
    states, _ = nnx.merge(graphdef, params).states(tokens_BT, cache, start_B)
    return states


def abstract_params(config: ModelConfig, dtype: jax.typing.DTypeLike) -> Params:
    """Describe the parameters without making them: the tree with `jax.ShapeDtypeStruct` leaves."""
    _, state = nnx.split(_abstract(config, dtype, None))
    return nnx.to_pure_dict(state)


def init_params(
    config: ModelConfig, key: jax.Array, *, dtype: jax.typing.DTypeLike, std: float, shardings: Any = None
) -> Params:
    """Make random parameters on the devices, straight into shards; the same on every mesh.

    Args:
      config: the model.
      key: consumed.
      dtype: of the parameters.
      std: standard deviation of kernels; norms are ones and biases zeros.
      shardings: tree of `NamedSharding` as `param_shardings` gives; None for the default device.

    Returns:
      The tree of parameters.
    """

    @functools.cache  # one program for all layers: to compile a single one of the whole model takes seconds a layer
    def maker(name: str, shape: tuple[int, ...], sharding: Any) -> Callable[[jax.Array], jax.Array]:
        def make(key: jax.Array) -> jax.Array:
            if name.endswith("scale"):
                return jnp.ones(shape, dtype)
            return jnp.zeros(shape, dtype) if name.endswith("bias") else std * jax.random.normal(key, shape, dtype)

        return jax.jit(make, out_shardings=sharding)

    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config, dtype))
    places = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    keys = jax.random.split(key, len(leaves))
    rows = zip(leaves, places, keys, strict=True)
    return jax.tree.unflatten(tree, [maker(path[-1].key, leaf.shape, sh)(key) for (path, leaf), sh, key in rows])


def kv_shape(config: ModelConfig, dtype: jax.typing.DTypeLike) -> KVShape:
    """Say what the model's cache needs, in elements of `dtype`."""
    return KVShape(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=jnp.dtype(dtype),
    )


def _abstract(config: ModelConfig, dtype: jax.typing.DTypeLike, implementation: str | None) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, dtype, implementation))
