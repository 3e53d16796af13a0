"""One round of draft, verify and commit: which tokens are emitted, when a row stops, and what the caches then hold.

It knows models and drafters as pure functions only, and nothing of requests, meshes or scheduling.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from streamserve import sampling
from streamserve.kv.pages import SCRATCH_PAGE
from streamserve.sampling import RoundKeys
from streamserve.specustream import verify
from streamserve.specustream.drafters import Drafter, DraftRows
from streamserve.specustream.verify import Verifier
from streamserve.types import (
    EMPTY_TOKEN,
    DecodeState,
    Draft,
    FinishCode,
    ForwardFns,
    KVCache,
    Pools,
    RowContext,
    StepPlan,
    TokenLogprobs,
    Verdict,
)

_MIN_PROB = 1e-9  # a draft's probability in a divergence is no smaller: a point mass would make it infinite


class Models(NamedTuple):
    """What a round runs, with its parameters and its plan."""

    target: ForwardFns
    drafter: Drafter
    verifier: Verifier
    synthetic: bool
    target_params: Any
    draft_params: Any
    depth: int
    max_logprobs: int
    plan: StepPlan


class Round(NamedTuple):
    """What one round emitted."""

    tokens: jax.Array  # [B, T] int32
    accepted: jax.Array  # [B] int32
    drafted: jax.Array  # [B] int32
    divergence: jax.Array  # [B] float32
    logprobs: TokenLogprobs  # leading dimensions [B, T]


def run_round(
    models: Models, pools: Pools, state: DecodeState, table_BM: jax.Array
) -> tuple[Pools, DecodeState, Round]:
    """Draft, verify, commit. Inactive rows go along at position 0 of the scratch page, whatever their table says."""
    context, was_active_B = state.context, state.active
    table_BM = jnp.where(was_active_B[:, None], table_BM, SCRATCH_PAGE)
    keys = _keys(models, context)
    draft, draft_pool = _draft(models, pools, state, table_BM, keys)
    with jax.named_scope("verify"):
        tokens_BT = jnp.concatenate([state.last_token[:, None], draft.tokens], axis=1)
        start_B = jnp.where(was_active_B, state.length, 0)
        seen = KVCache(pool=pools.target, table=table_BM)
        hidden_BTE, cache = models.target.forward(models.target_params, tokens_BT, seen, start_B)
        logits_BTV = models.target.logits(models.target_params, hidden_BTE)
        adjusted_BTV = sampling.adjust(logits_BTV, context, draft.tokens, 0)
        verdict = _verdict(models, adjusted_BTV, draft, context, keys)
        divergence_B = jax.lax.cond(
            models.plan.wants_divergence,
            lambda: _divergence(adjusted_BTV, draft, context),
            lambda: jnp.zeros(draft.length.shape, jnp.float32),
        )
    with jax.named_scope("commit"):
        finite_BT = jnp.isfinite(jnp.max(logits_BTV, axis=-1))
        drafts = jnp.any(was_active_B & (models.plan.depth > 0))
        state, emitted_BT = commit(state, draft, verdict, finite_BT)
        # The last drafted token is in no page of the drafter; each round it reads its two latest tokens anew.
        state = dataclasses.replace(state, draft_length=jnp.where(drafts, state.length - 1, state.draft_length))
        wanted = jnp.any(context.row.wants_logprobs & was_active_B)
        logprobs = sampling.token_logprobs(logits_BTV, emitted_BT, wanted, models.max_logprobs)
    ran = lambda count_B: jnp.where(was_active_B, count_B, EMPTY_TOKEN)  # noqa: E731
    # Of the accepted tokens those count that were emitted: a stop or the length may have cut the run.
    num_emitted_B = jnp.sum(emitted_BT != EMPTY_TOKEN, axis=1, dtype=jnp.int32)
    accepted_B = jnp.minimum(verdict.num_accepted, num_emitted_B)
    pools = Pools(target=cache.pool, draft=draft_pool)
    return pools, state, Round(emitted_BT, ran(accepted_B), ran(draft.length), divergence_B, logprobs)


def _keys(models: Models, context: RowContext) -> RoundKeys:
    """Give a round its random numbers; zeros where every row is greedy and nobody will draw."""
    make = lambda: models.verifier.keys(context, models.depth + 1)  # noqa: E731
    if models.synthetic:
        return make()
    blank = lambda key: jax.random.wrap_key_data(  # noqa: E731
        jnp.zeros((*key.shape, 2), jnp.uint32), impl=sampling.KEY_IMPL
    )
    return jax.lax.cond(sampling.all_greedy(context.row), lambda: jax.tree.map(blank, jax.eval_shape(make)), make)


def _draft(models: Models, pools: Pools, state: DecodeState, table_BM: jax.Array, keys: RoundKeys) -> tuple[Draft, Any]:
    """Ask the drafter, where there is anything to draft."""
    if not models.depth:
        return _no_draft(len(state.active), state.context.output_counts.shape[1]), pools.draft
    rows = DraftRows(
        active=state.active,
        length=state.length,
        prev_token=state.prev_token,
        last_token=state.last_token,
        history=state.history,
        keys=keys.token[:, : models.depth],
        plan=models.plan,
        context=state.context,
    )
    return models.drafter.propose(models.draft_params, pools.draft, table_BM, rows, depth=models.depth)


def _verdict(models: Models, adjusted_BTV: jax.Array, draft: Draft, context: RowContext, keys: RoundKeys) -> Verdict:
    """Judge the draft."""

    def sampled() -> Verdict:
        target_BTV = sampling.probabilities(adjusted_BTV, context.row)
        if models.synthetic or not models.depth:  # without a draft the next token is all there is, under any rule
            return verify.forced(num_accepted_B, sampling.sample_each(target_BTV, keys.token))
        draft_BKV = sampling.probabilities(draft.logits, context.row)
        return models.verifier.verify(target_BTV, draft_BKV, _sound(draft, draft_BKV), keys)

    def greedy() -> Verdict:
        if models.synthetic:
            return verify.forced(num_accepted_B, jnp.argmax(adjusted_BTV, axis=-1).astype(jnp.int32))
        return verify.greedy(adjusted_BTV, draft)

    num_accepted_B = draft.length
    if models.synthetic:
        num_accepted_B = verify.drawn_counts(models.plan.acceptance[: models.depth], draft.length, keys.verify)
    return jax.lax.cond(sampling.all_greedy(context.row), greedy, sampled)


def _sound(draft: Draft, probs_BKV: jax.Array) -> Draft:
    """End a draft where its distribution is none: with all its tokens banned, a drafter has nothing to draw from."""
    sound_BK = jnp.isfinite(jnp.sum(probs_BKV, axis=-1))
    length_B = jnp.sum(jnp.cumprod(sound_BK, axis=1, dtype=jnp.int32), axis=1)
    return dataclasses.replace(draft, length=jnp.minimum(draft.length, length_B))


def _divergence(adjusted_BTV: jax.Array, draft: Draft, context: RowContext) -> jax.Array:
    """Mean of KL(p || q) over each row's drafted positions, nats; at temperature 1 for greedy rows."""
    temperature_B = context.row.temperature
    heat_B11 = jnp.where(temperature_B == 0, 1.0, temperature_B)[:, None, None]
    depth = draft.tokens.shape[1]
    log_p_BKV = jax.nn.log_softmax(adjusted_BTV[:, :depth] / heat_B11, axis=-1)
    log_q_BKV = jnp.maximum(jax.nn.log_softmax(draft.logits / heat_B11, axis=-1), jnp.log(_MIN_PROB))
    p_BKV = jnp.exp(log_p_BKV)
    kl_BK = jnp.sum(jnp.where(p_BKV > 0, p_BKV * (log_p_BKV - log_q_BKV), 0.0), axis=-1)
    counts_BK = jnp.arange(depth)[None] < draft.length[:, None]
    total_B = jnp.sum(jnp.where(counts_BK & jnp.isfinite(kl_BK), kl_BK, 0.0), axis=1)
    return total_B / jnp.maximum(draft.length, 1).astype(jnp.float32)


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
        history=_note(state.history, state.length + 1, tokens_BT),
        finish=jnp.where(ended_B, code_B.astype(jnp.int32), state.finish),
        context=dataclasses.replace(
            context,
            emitted=context.emitted + num_B,
            output_counts=sampling.count_tokens(context.output_counts, tokens_BT),
        ),
    )
    return state, tokens_BT


def _note(history_BC: jax.Array, start_B: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Write emitted tokens into the history; EMPTY_TOKEN writes nothing."""
    if not history_BC.shape[1]:
        return history_BC
    position_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])[None]
    position_BT = jnp.where(tokens_BT == EMPTY_TOKEN, history_BC.shape[1], position_BT)
    return history_BC.at[jnp.arange(len(start_B))[:, None], position_BT].set(tokens_BT, mode="drop")


def _no_draft(batch: int, vocab: int) -> Draft:
    return Draft(
        tokens=jnp.zeros((batch, 0), jnp.int32),
        logits=jnp.zeros((batch, 0, vocab), jnp.float32),
        length=jnp.zeros((batch,), jnp.int32),
    )
