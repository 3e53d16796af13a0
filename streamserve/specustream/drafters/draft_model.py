"""Drafting by a smaller model with the target's vocabulary. Its pages have the numbers of the target's pages."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from streamserve import sampling
from streamserve.kv import cache
from streamserve.specustream.drafters import stopping
from streamserve.specustream.drafters.base import Drafter, DraftRows
from streamserve.types import Draft, ForwardFns, KVCache, KVPool, KVShape, RowParams


class _Carry(NamedTuple):
    """Carry of the loop over drafted tokens."""

    k: jax.Array  # [] int32, the position that comes next
    going_B: jax.Array  # rows that draft it
    tokens_B2: jax.Array  # the two latest tokens
    draft: Draft
    pool: KVPool


def draft_model(fns: ForwardFns, kv_shape: KVShape) -> Drafter:
    """Build a drafter that samples tokens one by one from a draft model, until no row goes on.

    The draft goes through the same penalties, temperature and filters as the target, so that it aims at the
    distribution it is judged by. Every pass reads two tokens, because the last accepted one may not be in the draft's
    pages yet. A row that has stopped goes along with the others; what it writes then, nobody reads.

    Args:
      fns: the draft model.
      kv_shape: of its cache.
    """

    def pool(num_pages: int, page_size: int) -> KVPool:
        return cache.zeros(kv_shape, num_pages, page_size)

    def prefill(params: Any, pool: KVPool, tokens_XP: jax.Array, table_XM: jax.Array, start_X: jax.Array) -> KVPool:
        return fns.forward(params, tokens_XP, KVCache(pool=pool, table=table_XM), start_X)[1].pool

    def propose(params: Any, pool: KVPool, table_BM: jax.Array, rows: DraftRows, *, depth: int) -> tuple[Draft, KVPool]:
        row = rows.context.row
        start_B = jnp.where(rows.active, rows.length - 1, 0)
        limit_B = jnp.where(rows.active, jnp.minimum(rows.plan.depth, depth), 0)

        def draft_one(carry: _Carry) -> _Carry:
            k, draft = carry.k, carry.draft
            hidden_B2E, after = fns.forward(
                params, carry.tokens_B2, KVCache(pool=carry.pool, table=table_BM), start_B + k
            )
            logits_B1V = fns.logits(params, hidden_B2E[:, -1:])
            logits_B1V = sampling.adjust(logits_B1V, rows.context, draft.tokens, k)
            logits_BV = logits_B1V[:, 0]
            token_B = _choose(logits_B1V, row, rows.keys[:, k])
            counts_B = carry.going_B & ~stopping.stops_before(rows.plan, logits_BV, row.temperature)
            stops_B = stopping.stops_after(rows.plan, logits_BV, row.temperature, token_B)
            draft = Draft(
                tokens=draft.tokens.at[:, k].set(jnp.where(counts_B, token_B, 0)),
                logits=draft.logits.at[:, k].set(jnp.where(counts_B[:, None], logits_BV, 0.0)),
                length=draft.length + counts_B.astype(jnp.int32),
            )
            going_B = counts_B & ~stops_B & (k + 1 < limit_B)
            return _Carry(k + 1, going_B, jnp.stack([carry.tokens_B2[:, 1], token_B], axis=1), draft, after.pool)

        with jax.named_scope("draft"):
            tokens_B2 = jnp.stack([rows.prev_token, rows.last_token], axis=1)
            empty = _empty(limit_B.shape[0], depth, rows.context.output_counts.shape[1])
            begin = _Carry(jnp.zeros((), jnp.int32), limit_B > 0, tokens_B2, empty, pool)
            end = jax.lax.while_loop(lambda carry: jnp.any(carry.going_B), draft_one, begin)
        return end.draft, end.pool

    return Drafter(pool=pool, prefill=prefill, propose=propose)


def _empty(batch: int, depth: int, vocab: int) -> Draft:
    """What positions hold that do not count."""
    return Draft(
        tokens=jnp.zeros((batch, depth), jnp.int32),
        logits=jnp.zeros((batch, depth, vocab), jnp.float32),
        length=jnp.zeros((batch,), jnp.int32),
    )


def _choose(logits_B1V: jax.Array, row: RowParams, key_B: jax.Array) -> jax.Array:
    """Draw each row's token from the distribution that it will be judged by; greedily where no row samples."""
    return jax.lax.cond(
        sampling.all_greedy(row),
        lambda: jnp.argmax(logits_B1V[:, 0], axis=-1).astype(jnp.int32),
        lambda: sampling.sample(sampling.probabilities(logits_B1V, row)[:, 0], key_B),
    )
