"""Drafting by a smaller model with the target's vocabulary. Its cache travels and rolls back with the target's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from streamserve import sampling
from streamserve.kv import cache
from streamserve.specustream.drafters.base import Drafter, DraftRows
from streamserve.types import Draft, ForwardFns, KVCache, KVShape


class _Carry(NamedTuple):
    """Carry of the loop over drafted tokens."""

    tokens_B2: jax.Array  # the two latest tokens
    drafted_BK: jax.Array
    state: KVCache


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

    def propose(params: Any, state: KVCache, rows: DraftRows, key_B: jax.Array, *, depth: int) -> tuple[Draft, KVCache]:
        start_B = jnp.where(rows.active, rows.length - 1, 0)

        def draft_one(carry: _Carry, k: jax.Array) -> tuple[_Carry, jax.Array]:
            hidden_B2E, state = fns.forward(params, carry.tokens_B2, carry.state, start_B + k)
            logits_B1V = fns.logits(params, hidden_B2E[:, -1:])
            logits_B1V = sampling.adjust(logits_B1V, rows.context, carry.drafted_BK, k)
            probs_BV = sampling.probabilities(logits_B1V, rows.context.row)[:, 0]
            token_B = sampling.sample(probs_BV, jax.vmap(jax.random.fold_in, (0, None))(key_B, k))
            tokens_B2 = jnp.stack([carry.tokens_B2[:, 1], token_B], axis=1)
            return _Carry(tokens_B2, carry.drafted_BK.at[:, k].set(token_B), state), probs_BV

        with jax.named_scope("draft"):
            tokens_B2 = jnp.stack([rows.prev_token, rows.last_token], axis=1)
            begin = _Carry(tokens_B2, jnp.zeros((start_B.shape[0], depth), jnp.int32), state)
            end, probs_KBV = jax.lax.scan(draft_one, begin, jnp.arange(depth))
        draft = Draft(
            tokens=end.drafted_BK, probs=jnp.swapaxes(probs_KBV, 0, 1), length=jnp.full_like(rows.length, depth)
        )
        return draft, end.state

    return Drafter(empty=empty, prefill=prefill, insert=cache.insert_row, propose=propose)
