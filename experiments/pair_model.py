"""A model as training and measuring see it: float32, differentiable, whole rows at a time."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from streamserve.kv import cache
from streamserve.models import ModelConfig, forward_fns, from_hf, init_params, kv_shape
from streamserve.types import ForwardFns, KVCache, Params


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainModel:
    """A model that can be differentiated.

    Attributes:
      hf: what its `config.json` will say.
      config: the same, read.
      fns: its pure functions.
    """

    hf: Mapping[str, Any]
    config: ModelConfig
    fns: ForwardFns

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "TrainModel":
        """Build a model from the contents of its `config.json`."""
        config = from_hf(hf)
        return cls(hf=hf, config=config, fns=forward_fns(config, attention_implementation="reference"))

    def init(self, key: jax.Array) -> Params:
        """Make random float32 parameters; `key` is consumed."""
        return init_params(self.config, key, dtype=jnp.float32, std=self.hf["initializer_range"])


def logits_of(model: TrainModel, params: Params, tokens_BS: jax.Array, chunk: int) -> jax.Array:
    """Score every position of whole rows, chunk after chunk over a cache that grows.

    The specification's attention computes scores that it then masks; cut into chunks, nearly half of them never arise.

    Args:
      model: of `params`.
      params: float32.
      tokens_BS: int32; `chunk` divides S.
      chunk: tokens.

    Returns:
      float32 [B, S, V].
    """
    batch, length = tokens_BS.shape
    kv, hidden = cache.rows(kv_shape(model.config, jnp.float32), batch, length, page_size=chunk), []
    for start in range(0, length, chunk):
        seen = KVCache(pool=kv.pool, table=kv.table[:, : start // chunk + 1])
        start_B = jnp.full((batch,), start, jnp.int32)
        part, seen = model.fns.forward(params, tokens_BS[:, start : start + chunk], seen, start_B)
        kv = KVCache(pool=seen.pool, table=kv.table)
        hidden.append(part)
    return model.fns.logits(params, jnp.concatenate(hidden, axis=1))
