"""Drafting by a smaller model with the target's vocabulary. Its pages have the numbers of the target's pages."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from streamserve import sampling
from streamserve.kv import cache
from streamserve.specustream.drafters.base import Drafter, DraftRows
from streamserve.types import Draft, ForwardFns, KVCache, KVPool, KVShape, RowContext


class _Carry(NamedTuple):
    """Carry of the loop over drafted tokens."""

    tokens_B2: jax.Array  # the two latest tokens
    drafted_BK: jax.Array
    pool: KVPool


def draft_model(fns: ForwardFns, kv_shape: KVShape) -> Drafter:
    """Build a drafter that samples `depth` tokens one by one from a draft model.

    The draft goes through the same penalties, temperature and filters as the target, so that it aims at the
    distribution it is judged by.

    Args:
      fns: the draft model.
      kv_shape: of its cache.
    """

    def pool(num_pages: int, page_size: int) -> KVPool:
        return cache.zeros(kv_shape, num_pages, page_size)

    def prefill(params: Any, pool: KVPool, tokens_XP: jax.Array, table_XM: jax.Array, start_X: jax.Array) -> KVPool:
        return fns.forward(params, tokens_XP, KVCache(pool=pool, table=table_XM), start_X)[1].pool

    def propose(params: Any, pool: KVPool, table_BM: jax.Array, rows: DraftRows, *, depth: int) -> tuple[Draft, KVPool]:
        start_B = jnp.where(rows.active, rows.length - 1, 0)

        def draft_one(carry: _Carry, k: jax.Array) -> tuple[_Carry, jax.Array]:
            seen = KVCache(pool=carry.pool, table=table_BM)
            hidden_B2E, after = fns.forward(params, carry.tokens_B2, seen, start_B + k)
            logits_B1V = fns.logits(params, hidden_B2E[:, -1:])
            logits_B1V = sampling.adjust(logits_B1V, rows.context, carry.drafted_BK, k)
            probs_BV, token_B = jax.lax.cond(
                sampling.all_greedy(rows.context.row),
                _most_likely,
                functools.partial(_drawn, rows.context, k),
                logits_B1V,
            )
            tokens_B2 = jnp.stack([carry.tokens_B2[:, 1], token_B], axis=1)
            return _Carry(tokens_B2, carry.drafted_BK.at[:, k].set(token_B), after.pool), probs_BV

        with jax.named_scope("draft"):
            tokens_B2 = jnp.stack([rows.prev_token, rows.last_token], axis=1)
            begin = _Carry(tokens_B2, jnp.zeros((start_B.shape[0], depth), jnp.int32), pool)
            end, probs_KBV = jax.lax.scan(draft_one, begin, jnp.arange(depth))
        draft = Draft(
            tokens=end.drafted_BK, probs=jnp.swapaxes(probs_KBV, 0, 1), length=jnp.full_like(rows.length, depth)
        )
        return draft, end.pool

    return Drafter(pool=pool, prefill=prefill, propose=propose)


def _most_likely(logits_B1V: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Choose greedily; the distributions are left out, since nobody reads them."""
    return jnp.zeros_like(logits_B1V[:, 0]), jnp.argmax(logits_B1V[:, 0], axis=-1).astype(jnp.int32)


def _drawn(context: RowContext, k: jax.Array, logits_B1V: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw the k-th token from the distribution that it will be judged by."""
    probs_BV = sampling.probabilities(logits_B1V, context.row)[:, 0]
    key_B = jax.vmap(jax.random.fold_in, (0, None))(sampling.draft_keys(context), k)
    return probs_BV, sampling.sample(probs_BV, key_B)
