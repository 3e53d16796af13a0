"""One tick on the decode mesh: rounds of draft, verify and commit in one jitted program per depth.

This file owns the rules of commitment: which tokens of a round are emitted, when a row stops, and what the caches then
hold. It knows models and drafters as pure functions only, and nothing of requests, meshes or scheduling.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from streamserve import sampling
from streamserve.kv.pages import SCRATCH_PAGE
from streamserve.specustream.drafters import Drafter, DraftRows
from streamserve.specustream.verify import VerifyFn, greedy
from streamserve.types import (
    EMPTY_TOKEN,
    DecodeState,
    Draft,
    FinishCode,
    ForwardFns,
    KVCache,
    Pools,
    StepOutput,
    TokenLogprobs,
    Verdict,
)

StepFn = Callable[[Any, Any, Pools, DecodeState, jax.Array], tuple[Pools, DecodeState, StepOutput]]


class _Tick(NamedTuple):
    """Carry of the loop over rounds."""

    round: jax.Array
    pools: Pools
    state: DecodeState
    tokens: jax.Array  # [R, B, T] int32
    accepted: jax.Array  # [R, B] int32
    drafted: jax.Array  # [R, B] int32
    logprobs: TokenLogprobs  # leading dimensions [R, B, T]


class _Models(NamedTuple):
    """What a round runs, with its parameters."""

    target: ForwardFns
    drafter: Drafter
    verify: VerifyFn
    target_params: Any
    draft_params: Any
    depth: int
    max_logprobs: int


class _Round(NamedTuple):
    """What one round emitted."""

    tokens: jax.Array  # [B, T] int32
    accepted: jax.Array  # [B] int32
    drafted: jax.Array  # [B] int32
    logprobs: TokenLogprobs  # leading dimensions [B, T]


def make_step(
    target: ForwardFns, drafter: Drafter, verify: VerifyFn, *, depth: int, rounds: int, max_logprobs: int
) -> StepFn:
    """Build the step of one tier.

    Args:
      target: the model that is served.
      drafter: proposes `depth` tokens a round; unused at depth 0.
      verify: the verification rule.
      depth: K, static: one compiled program a depth.
      rounds: R, rounds in one call; the loop ends early when no row is active.
      max_logprobs: top log-probabilities to report.

    Returns:
      `(target_params, draft_params, pools, state, table_BM) -> (pools, state, StepOutput)`, to be jitted with `pools`
      and `state` donated. The table must hold the pages of every position that the tick may emit; what is drafted
      beyond goes to the scratch page.
    """

    def step(
        target_params: Any, draft_params: Any, pools: Pools, state: DecodeState, table_BM: jax.Array
    ) -> tuple[Pools, DecodeState, StepOutput]:
        models = _Models(target, drafter, verify, target_params, draft_params, depth, max_logprobs)
        batch, width = state.active.shape[0], depth + 1
        first_B1 = jnp.where(state.first_pending, state.last_token, EMPTY_TOKEN)[:, None]
        first_logprobs = state.first_logprobs
        state = dataclasses.replace(state, first_pending=jnp.zeros_like(state.first_pending))

        def body(tick: _Tick) -> _Tick:
            pools, state, out = _run_round(models, tick.pools, tick.state, table_BM)
            put = lambda whole, part: whole.at[tick.round].set(part)  # noqa: E731
            return _Tick(
                round=tick.round + 1,
                pools=pools,
                state=state,
                tokens=put(tick.tokens, out.tokens),
                accepted=put(tick.accepted, out.accepted),
                drafted=put(tick.drafted, out.drafted),
                logprobs=jax.tree.map(put, tick.logprobs, out.logprobs),
            )

        none_RB = jnp.full((rounds, batch), EMPTY_TOKEN, jnp.int32)
        begin = _Tick(
            round=jnp.zeros((), jnp.int32),
            pools=pools,
            state=state,
            tokens=jnp.full((rounds, batch, width), EMPTY_TOKEN, jnp.int32),
            accepted=none_RB,
            drafted=none_RB,
            logprobs=sampling.empty_logprobs((rounds, batch, width), first_logprobs.top.shape[-1]),
        )
        end = jax.lax.while_loop(lambda tick: (tick.round < rounds) & jnp.any(tick.state.active), body, begin)
        return end.pools, end.state, _collect(end, first_B1, first_logprobs)

    return step


def commit(state: DecodeState, draft: Draft, verdict: Verdict, finite_BT: jax.Array) -> tuple[DecodeState, jax.Array]:
    """Emit the accepted tokens and the one after them, up to the first that ends the row.

    Refused tokens stay in the pages beyond `length`, where nothing reads them. A row that would emit a token from
    logits that are not finite emits nothing and ends as INVALID; the others do not notice.

    Args:
      state: before the round.
      draft: what was proposed.
      verdict: what was accepted.
      finite_BT: whether the logits of each verified position are finite.

    Returns:
      The state after the round and the emitted tokens [B, T], EMPTY_TOKEN where none.
    """
    context, row = state.context, state.context.row
    width = draft.tokens.shape[1] + 1
    index_T = jnp.arange(width)[None]
    padded_BT = jnp.pad(draft.tokens, ((0, 0), (0, 1)))
    tokens_BT = jnp.where(index_T < verdict.num_accepted[:, None], padded_BT, verdict.next_token[:, None])
    stops_BT = jnp.any(tokens_BT[..., None] == row.stop_ids[:, None], axis=-1)
    full_BT = context.emitted[:, None] + index_T + 1 >= row.max_tokens[:, None]
    ends_BT = stops_BT | full_BT
    before_BT = jnp.cumsum(ends_BT, axis=1, dtype=jnp.int32) - ends_BT.astype(jnp.int32)  # ends strictly before
    emit_BT = (index_T <= verdict.num_accepted[:, None]) & (before_BT == 0) & state.active[:, None]
    invalid_B = jnp.any(emit_BT & ~finite_BT, axis=1)
    emit_BT = emit_BT & ~invalid_B[:, None]
    num_B = jnp.sum(emit_BT, axis=1, dtype=jnp.int32)
    tokens_BT = jnp.where(emit_BT, tokens_BT, EMPTY_TOKEN)

    stopped_B = jnp.any(emit_BT & stops_BT, axis=1)
    ended_B = jnp.any(emit_BT & ends_BT, axis=1) | invalid_B
    code_B = jnp.where(stopped_B, FinishCode.STOP, jnp.where(invalid_B, FinishCode.INVALID, FinishCode.LENGTH))
    history_BT = jnp.concatenate([state.last_token[:, None], tokens_BT], axis=1)
    at = lambda index_B: jnp.take_along_axis(history_BT, index_B[:, None], axis=1)[:, 0]  # noqa: E731
    state = dataclasses.replace(
        state,
        active=state.active & ~ended_B,
        length=state.length + num_B,
        prev_token=jnp.where(state.active, at(jnp.maximum(num_B - 1, 0)), state.prev_token),
        last_token=at(num_B),
        finish=jnp.where(ended_B, code_B.astype(jnp.int32), state.finish),
        context=dataclasses.replace(
            context,
            emitted=context.emitted + num_B,
            output_counts=sampling.count_tokens(context.output_counts, tokens_BT),
        ),
    )
    return state, tokens_BT


def _run_round(
    models: _Models, pools: Pools, state: DecodeState, table_BM: jax.Array
) -> tuple[Pools, DecodeState, _Round]:
    """Draft, verify, commit. Inactive rows go along at position 0 of the scratch page, whatever their table says."""
    context, was_active_B = state.context, state.active
    table_BM = jnp.where(was_active_B[:, None], table_BM, SCRATCH_PAGE)
    if models.depth:
        rows = DraftRows(was_active_B, state.length, state.prev_token, state.last_token, context)
        draft, draft_pool = models.drafter.propose(models.draft_params, pools.draft, table_BM, rows, depth=models.depth)
    else:
        draft, draft_pool = _no_draft(len(was_active_B), context.output_counts.shape[1]), pools.draft
    with jax.named_scope("verify"):
        tokens_BT = jnp.concatenate([state.last_token[:, None], draft.tokens], axis=1)
        start_B = jnp.where(was_active_B, state.length, 0)
        seen = KVCache(pool=pools.target, table=table_BM)
        hidden_BTE, cache = models.target.forward(models.target_params, tokens_BT, seen, start_B)
        logits_BTV = models.target.logits(models.target_params, hidden_BTE)
        adjusted_BTV = sampling.adjust(logits_BTV, context, draft.tokens, 0)
        verdict = jax.lax.cond(
            sampling.all_greedy(context.row),
            lambda: greedy(adjusted_BTV, draft),
            lambda: models.verify(
                sampling.probabilities(adjusted_BTV, context.row), draft, sampling.verify_keys(context)
            ),
        )
    with jax.named_scope("commit"):
        finite_BT = jnp.isfinite(jnp.max(logits_BTV, axis=-1))
        state, emitted_BT = commit(state, draft, verdict, finite_BT)
        wanted = jnp.any(context.row.wants_logprobs & was_active_B)
        logprobs = sampling.token_logprobs(logits_BTV, emitted_BT, wanted, models.max_logprobs)
    ran = lambda count_B: jnp.where(was_active_B, count_B, EMPTY_TOKEN)  # noqa: E731
    # Of the accepted tokens those count that were emitted: a stop or the length may have cut the run.
    num_emitted_B = jnp.sum(emitted_BT != EMPTY_TOKEN, axis=1, dtype=jnp.int32)
    accepted_B = jnp.minimum(verdict.num_accepted, num_emitted_B)
    pools = Pools(target=cache.pool, draft=draft_pool)
    return pools, state, _Round(emitted_BT, ran(accepted_B), ran(draft.length), logprobs)


def _no_draft(batch: int, vocab: int) -> Draft:
    return Draft(
        tokens=jnp.zeros((batch, 0), jnp.int32),
        probs=jnp.zeros((batch, 0, vocab), jnp.float32),
        length=jnp.zeros((batch,), jnp.int32),
    )


def _collect(end: _Tick, first_B1: jax.Array, first_logprobs: TokenLogprobs) -> StepOutput:
    """Lay the rounds of a tick out as emission columns [B, N], the pending first token before them."""

    def columns(first_BX: jax.Array, rounds_RBTX: jax.Array) -> jax.Array:
        rounds, batch, width = rounds_RBTX.shape[:3]
        moved = jnp.moveaxis(rounds_RBTX, 0, 1).reshape(batch, rounds * width, *rounds_RBTX.shape[3:])
        return jnp.concatenate([first_BX, moved], axis=1)

    return StepOutput(
        tokens=columns(first_B1, end.tokens),
        accepted=end.accepted.T,
        drafted=end.drafted.T,
        finish=end.state.finish,
        logprobs=jax.tree.map(lambda first, rest: columns(first[:, None], rest), first_logprobs, end.logprobs),
    )
