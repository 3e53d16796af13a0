"""Drafting by a smaller model with the target's vocabulary. Its cache travels and rolls back with the target's."""

from typing import Any

import jax
import jax.numpy as jnp

from streamserve import sampling
from streamserve.kv import cache
from streamserve.specustream.drafters.base import Drafter, DraftRows
from streamserve.types import Draft, ForwardFns, KVCache, KVShape


def draft_model(fns: ForwardFns, kv_shape: KVShape) -> Drafter:
    """Build a drafter that samples `depth` tokens one by one from a draft model.

    The draft goes through the same penalties, temperature and filters as the target, so that it aims at the
    distribution it is judged by.

    Args:
      fns: the draft model.
      kv_shape: of its cache.
    """

    def empty(batch: int, capacity: int) -> KVCache:
        return cache.zeros(kv_shape, batch, capacity)

    def prefill(params: Any, tokens_1S: jax.Array) -> KVCache:
        start_1 = jnp.zeros((1,), jnp.int32)
        return fns.forward(params, tokens_1S, cache.zeros(kv_shape, 1, tokens_1S.shape[1]), start_1)[1]

    def propose(
        params: Any, state: KVCache, rows: DraftRows, key_B: jax.Array, *, depth: int
    ) -> tuple[Draft, KVCache]:
        # A round that accepted everything has left the position before `last_token` unwritten: the model never read
        # its own last draft. So the first pass reads two tokens, which costs less than one more pass a round.
        tokens_BT = jnp.stack([rows.prev_token, rows.last_token], axis=1)
        start_B = jnp.where(rows.active, rows.length - 1, 0)
        drafted, probs = [], []
        for k in range(depth):
            with jax.named_scope(f"draft_{k}"):
                hidden_BTE, state = fns.forward(params, tokens_BT, state, start_B)
                logits_B1V = fns.logits(params, hidden_BTE[:, -1:])
                before_BX = jnp.stack(drafted, axis=1) if drafted else jnp.zeros((len(start_B), 0), jnp.int32)
                logits_B1V = sampling.adjust(logits_B1V, rows.context, before_BX, k)
                probs.append(sampling.probabilities(logits_B1V, rows.context.row)[:, 0])
                drafted.append(sampling.sample(probs[-1], jax.vmap(jax.random.fold_in, (0, None))(key_B, k)))
                start_B = start_B + tokens_BT.shape[1]
                tokens_BT = drafted[-1][:, None]
        length_B = jnp.full_like(rows.length, depth)
        return Draft(tokens=jnp.stack(drafted, axis=1), probs=jnp.stack(probs, axis=1), length=length_B), state

    return Drafter(empty=empty, prefill=prefill, insert=cache.insert_row, propose=propose)
