"""One tick on the decode mesh: rounds of draft, verify and commit in one jitted program per depth.

This file owns the loop over rounds, what comes before it and how its output is laid out; `round.py` owns a round.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from streamserve import sampling
from streamserve.kv.pages import SCRATCH_PAGE
from streamserve.specustream.drafters import Drafter
from streamserve.specustream.round import Models, run_round
from streamserve.specustream.verify import Verifier
from streamserve.types import (
    EMPTY_TOKEN,
    DecodeState,
    ForwardFns,
    Pools,
    StepOutput,
    StepPlan,
    TokenLogprobs,
)

StepFn = Callable[[Any, Any, Pools, DecodeState, jax.Array, StepPlan], tuple[Pools, DecodeState, StepOutput]]

READ_WIDTH = 16  # tokens of a row that the drafter reads at once where it has to catch up


class _Tick(NamedTuple):
    """Carry of the loop over rounds."""

    round: jax.Array
    pools: Pools
    state: DecodeState
    tokens: jax.Array  # [R, B, T] int32
    accepted: jax.Array  # [R, B] int32
    drafted: jax.Array  # [R, B] int32
    divergence: jax.Array  # [R, B] float32
    logprobs: TokenLogprobs  # leading dimensions [R, B, T]


def make_step(
    target: ForwardFns,
    drafter: Drafter,
    verifier: Verifier,
    *,
    depth: int,
    rounds: int,
    max_logprobs: int,
    synthetic: bool = False,
) -> StepFn:
    """Build the step of one tier.

    Args:
      target: the model that is served.
      drafter: proposes up to `depth` tokens a round; unused at depth 0.
      verifier: the verification rule.
      depth: K, static: one compiled program a depth.
      rounds: R, rounds in one call; the loop ends early when no row is active.
      max_logprobs: top log-probabilities to report.
      synthetic: let the plan's probabilities decide what is accepted. The output is then not the target's.

    Returns:
      `(target_params, draft_params, pools, state, table_BM, plan) -> (pools, state, StepOutput)`, to be jitted with
      `pools` and `state` donated. The table must hold the pages of every position that the tick may emit; what is
      drafted beyond goes to the scratch page.
    """

    def step(
        target_params: Any, draft_params: Any, pools: Pools, state: DecodeState, table_BM: jax.Array, plan: StepPlan
    ) -> tuple[Pools, DecodeState, StepOutput]:
        plan = dataclasses.replace(plan, depth=jnp.minimum(plan.depth, depth))
        models = Models(target, drafter, verifier, synthetic, target_params, draft_params, depth, max_logprobs, plan)
        batch, width = state.active.shape[0], depth + 1
        if depth and state.history.shape[1] and jax.tree.leaves(pools.draft):
            pools, state = _catch_up(models, pools, state, table_BM)
        first_B1 = jnp.where(state.first_pending, state.last_token, EMPTY_TOKEN)[:, None]
        first_logprobs = state.first_logprobs
        state = dataclasses.replace(state, first_pending=jnp.zeros_like(state.first_pending))

        def body(tick: _Tick) -> _Tick:
            pools, state, out = run_round(models, tick.pools, tick.state, table_BM)
            put = lambda whole, part: whole.at[tick.round].set(part)  # noqa: E731
            return _Tick(
                round=tick.round + 1,
                pools=pools,
                state=state,
                tokens=put(tick.tokens, out.tokens),
                accepted=put(tick.accepted, out.accepted),
                drafted=put(tick.drafted, out.drafted),
                divergence=put(tick.divergence, out.divergence),
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
            divergence=jnp.zeros((rounds, batch), jnp.float32),
            logprobs=sampling.empty_logprobs((rounds, batch, width), first_logprobs.top.shape[-1]),
        )
        end = jax.lax.while_loop(lambda tick: (tick.round < rounds) & jnp.any(tick.state.active), body, begin)
        return end.pools, end.state, _collect(end, first_B1, first_logprobs)

    return step


def _catch_up(models: Models, pools: Pools, state: DecodeState, table_BM: jax.Array) -> tuple[Pools, DecodeState]:
    """Let the drafter read what was emitted while nothing was drafted, READ_WIDTH tokens a pass.

    What a pass reads beyond a row's latest token is not there yet; every position is written again before it is read.
    """
    drafts = jnp.any(state.active & (models.plan.depth > 0))

    def behind(length_B: jax.Array) -> jax.Array:
        return state.active & (length_B < state.length - 1) & drafts

    def read(carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        pool, length_B = carry
        behind_B = behind(length_B)
        position_BW = jnp.minimum(length_B[:, None] + jnp.arange(READ_WIDTH)[None], state.history.shape[1] - 1)
        tokens_BW = jnp.take_along_axis(state.history, position_BW, axis=1)
        table = jnp.where(behind_B[:, None], table_BM, SCRATCH_PAGE)
        start_B = jnp.where(behind_B, length_B, 0)
        pool = models.drafter.prefill(models.draft_params, pool, tokens_BW, table, start_B)
        return pool, jnp.where(behind_B, jnp.minimum(length_B + READ_WIDTH, state.length - 1), length_B)

    with jax.named_scope("catch_up"):
        pool, length_B = jax.lax.while_loop(
            lambda carry: jnp.any(behind(carry[1])), read, (pools.draft, state.draft_length)
        )
    return dataclasses.replace(pools, draft=pool), dataclasses.replace(state, draft_length=length_B)


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
        divergence=end.divergence.T,
        finish=end.state.finish,
        logprobs=jax.tree.map(lambda first, rest: columns(first[:, None], rest), first_logprobs, end.logprobs),
    )
