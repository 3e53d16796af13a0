"""The programs that read prompts: tiles of prompts in, pages out; then the first token. Pure functions.

The models run in one program a call size; the first token is sampled in a second one, the same for all sizes, because
sampling costs more to compile than a small model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from streamserve import sampling
from streamserve.specustream.drafters import Drafter
from streamserve.types import (
    ForwardFns,
    KVCache,
    Pools,
    PrefillBatch,
    PrefillOutput,
    Prefix,
    RowContext,
    RowParams,
    TokenLogprobs,
)

PrefillFn = Callable[..., tuple[Pools, PrefillOutput]]
_LOGPROB_CHUNK = 64  # positions whose logits exist at once: all of a long prompt's would not fit in memory


def make_prefill(target: ForwardFns, drafter: Drafter | None, *, largest: int, max_logprobs: int) -> PrefillFn:
    """Build the prefill of target and drafter.

    Args:
      target: the model that is served.
      drafter: reads the prompts too; None where the decode mesh lets it do so.
      largest: Y, tiles of the largest call.
      max_logprobs: top log-probabilities to report.

    Returns:
      `(target_params, draft_params, pools, batch) -> (pools, PrefillOutput)`, to be jitted with `pools` donated. What
      is computed for padding lies beyond the prompt's length and is never read.
    """

    def prefill(
        target_params: Any, draft_params: Any, pools: Pools, batch: PrefillBatch
    ) -> tuple[Pools, PrefillOutput]:
        seen = KVCache(pool=pools.target, table=batch.table)
        hidden_XPE, cache = target.forward(target_params, batch.tokens, seen, batch.start)
        tail_XE = jnp.take_along_axis(hidden_XPE, batch.tail[:, None, None], axis=1)[:, 0]
        draft = pools.draft
        if drafter is not None:
            draft = drafter.prefill(draft_params, draft, batch.tokens, batch.table, batch.start)
        return Pools(target=cache.pool, draft=draft), PrefillOutput(
            tail_hidden=jnp.pad(tail_XE, ((0, largest - tail_XE.shape[0]), (0, 0))),
            prompt_logprobs=_prompt_logprobs(target, target_params, hidden_XPE, batch, max_logprobs),
        )

    return prefill


def make_draft_prefill(drafter: Drafter) -> Callable[[Any, Pools, PrefillBatch], Pools]:
    """Build the prefill of the drafter alone, for a decode mesh that receives no pages of the draft.

    Returns:
      `(draft_params, pools, batch) -> pools`, to be jitted with `pools` donated.
    """

    def prefill(draft_params: Any, pools: Pools, batch: PrefillBatch) -> Pools:
        draft = drafter.prefill(draft_params, pools.draft, batch.tokens, batch.table, batch.start)
        return dataclasses.replace(pools, draft=draft)

    return prefill


def make_first(target: ForwardFns, *, max_logprobs: int) -> Callable[..., Prefix]:
    """Build the sampling of the token after the prompt.

    Returns:
      `(target_params, tail_hidden_YE, tile_1, length_1, prev_token_1, history_1C, prompt_seen_1V, row) -> Prefix`.
    """

    def first(
        target_params: Any,
        tail_hidden_YE: jax.Array,
        tile_1: jax.Array,
        length_1: jax.Array,
        prev_token_1: jax.Array,
        history_1C: jax.Array,
        prompt_seen_1V: jax.Array,
        row: RowParams,
    ) -> Prefix:
        tail_11E = jax.lax.dynamic_slice_in_dim(tail_hidden_YE, tile_1[0], 1)[None]
        logits_11V = target.logits(target_params, tail_11E)
        counts_1V = jnp.zeros(prompt_seen_1V.shape, jnp.int32)
        none = jnp.zeros(1, jnp.int32)
        context = RowContext(row=row, prompt_seen=prompt_seen_1V, output_counts=counts_1V, emitted=none)
        adjusted_11V = sampling.adjust(logits_11V, context, jnp.zeros((1, 0), jnp.int32), 0)
        probs_1V = sampling.probabilities(adjusted_11V, row)[:, 0]
        first_1 = sampling.sample(probs_1V, sampling.round_keys(row.key, none))
        return Prefix(
            length=length_1,
            prev_token=prev_token_1,
            last_token=first_1,
            emitted=none + 1,
            first_pending=jnp.ones(1, bool),
            finite=jnp.isfinite(jnp.max(logits_11V[:, 0], axis=-1)),
            first_logprobs=sampling.token_logprobs(logits_11V[:, 0], first_1, row.wants_logprobs[0], max_logprobs),
            draft_length=length_1,
            history=history_1C.at[jnp.zeros(1, jnp.int32), length_1].set(first_1, mode="drop"),
            prompt_seen=prompt_seen_1V,
            output_counts=sampling.count_tokens(counts_1V, first_1[:, None]),
            row=row,
        )

    return first


def _prompt_logprobs(
    target: ForwardFns, params: Any, hidden_XPE: jax.Array, batch: PrefillBatch, max_logprobs: int
) -> TokenLogprobs:
    """Score each prompt token given those before it."""
    shape = batch.tokens.shape
    size = batch.tokens.size
    chunk = min(_LOGPROB_CHUNK, size)
    pad = -size % chunk
    hidden_SE = jnp.pad(hidden_XPE.reshape(size, -1), ((0, pad), (0, 0)))
    next_S = jnp.pad(batch.next_tokens.reshape(size), (0, pad))

    def score(part: tuple[jax.Array, jax.Array]) -> TokenLogprobs:
        return sampling.token_logprobs(target.logits(params, part[0]), part[1], jnp.bool_(True), max_logprobs)

    def compute() -> TokenLogprobs:
        chunks = jax.lax.map(score, (hidden_SE.reshape(-1, chunk, hidden_SE.shape[1]), next_S.reshape(-1, chunk)))
        whole = jax.tree.map(lambda leaf: leaf.reshape(size + pad, *leaf.shape[2:])[:size], chunks)
        return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), whole)

    return jax.lax.cond(batch.wants_logprobs, compute, lambda: sampling.empty_logprobs(shape, max_logprobs))
