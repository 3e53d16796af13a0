"""Runs a depth policy on synthetic acceptance, with what every other depth would have brought known exactly.

It drives a policy as an engine does: through `HostPolicy`, one plan a tick of several rounds, and feedback that is
late. It knows no model and no device: what is accepted comes from an `AcceptanceProcess`, time from a `CostTable`.

Three things are simpler than in an engine. A request ends at the end of a tick, never within, so a round is worth the
same tokens whatever else happens and expectations are exact. Rows are alike: acceptance differs between ticks and
positions only. And a draft has no confidence of its own, so a plan's stop rule never stops it.

The same seed gives every policy the same luck: acceptance, noise in time and ends are drawn apart from what it chooses.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from streamserve.bandits.host import HostPolicy
from streamserve.specustream.costs import CostTable
from streamserve.specustream.depth import (
    NOT_RUN,
    DepthContext,
    MakeDepthPolicy,
    Plan,
    StepStats,
    expected_tokens,
)
from streamserve.specustream.synthetic import AcceptanceProcess

PROMPT_TOKENS = 256  # that every request comes with
MEAN_TOKENS = 64  # that a request emits; how many is geometric
MAX_TOKENS = 1024  # of a slot's pages
_BLOCK = 128  # ticks whose luck is drawn at once


class Trace(NamedTuple):
    """What came of a run. T ticks, A arms.

    Attributes:
      arm_T: int, which arm ran.
      propensity_T: probability with which it was chosen.
      batch_T: int, rows that were held.
      acceptance_TK: the true acceptance.
      tokens_T: int, emitted.
      seconds_T: s, measured.
      mean_tokens_T: expected tokens of the plan.
      mean_seconds_T: s, expected time of the plan, the price of a switch included.
      tokens_TA: expected tokens of each arm at that tick, run at its whole depth.
      seconds_TA: s, expected time of each arm at that tick, had it run before, too.
    """

    arm_T: np.ndarray
    propensity_T: np.ndarray
    batch_T: np.ndarray
    acceptance_TK: np.ndarray
    tokens_T: np.ndarray
    seconds_T: np.ndarray
    mean_tokens_T: np.ndarray
    mean_seconds_T: np.ndarray
    tokens_TA: np.ndarray
    seconds_TA: np.ndarray


class _Luck(NamedTuple):
    """All that is random in a tick, apart from the policy. Uniform numbers in [0, 1), `time` standard normal."""

    process_2: np.ndarray
    accept_BRK: np.ndarray
    end_B: np.ndarray
    time: float


class _Slots:
    """Who holds which slot. Slots fill from the first; a request that ends makes room for the next one."""

    def __init__(self, slots: int):
        self.holder_B = np.full(slots, NOT_RUN)
        self.length_B = np.zeros(slots)  # tokens in the cache
        self._arrivals = 0

    def fill(self, wanted: int) -> int:
        """Hold so many slots, or all; gives how many are held."""
        held = min(wanted, len(self.holder_B))
        self.holder_B[held:] = NOT_RUN
        for slot in np.flatnonzero(self.holder_B[:held] == NOT_RUN):
            self.holder_B[slot], self.length_B[slot] = self._arrivals, PROMPT_TOKENS
            self._arrivals += 1
        return held

    def emit(self, emitted_B: np.ndarray, end_B: np.ndarray) -> None:
        """Let each row emit; it ends by then with probability 1 - (1 - 1/mean)^emitted."""
        self.length_B = np.minimum(self.length_B + emitted_B, MAX_TOKENS)
        self.holder_B = np.where(end_B >= (1 - 1 / MEAN_TOKENS) ** emitted_B, NOT_RUN, self.holder_B)


def simulate(
    make_policy: MakeDepthPolicy,
    process: AcceptanceProcess,
    costs: CostTable,
    *,
    tiers: tuple[int, ...],
    slots: int,
    batch: int | Callable[[int], int],
    rounds: int,
    ticks: int,
    seed: int,
    feedback_delay: int = 1,
    time_noise: float = 0.05,
    believed: CostTable | None = None,
    switch_AA: np.ndarray | None = None,
) -> Trace:
    """Run a policy for some ticks.

    Args:
      make_policy: the policy's factory.
      process: acceptance, of the largest tier's positions at least.
      costs: true time of a round.
      tiers: depths, as those of `costs`.
      slots: B.
      batch: rows that want to run, or a function of the tick that gives them; what is above `slots` waits.
      rounds: of a tick, R.
      ticks: T.
      seed: of everything random.
      feedback_delay: ticks between a tick's end and when its outcome is known; with 1, the choice of tick t knows what
        came of tick t - 2 and before.
      time_noise: standard deviation of the logarithm of measured / true time.
      believed: what the policy is told instead of `costs`; refreshed, hence changed, by what is measured.
      switch_AA: s, price of running an arm (column) after another (row) ran.

    Returns:
      What happened, and what would have.
    """
    host = HostPolicy(make_policy(tiers, slots), num_arms=len(tiers), seed=seed)
    tiers_A, table, state = np.array(tiers), _Slots(slots), process.init()
    free_A, previous = np.zeros(len(tiers)), -1
    luck = _draw(seed, (slots, rounds, max(tiers)))
    late: deque[tuple[DepthContext, Plan, StepStats]] = deque()
    rows = []
    for tick in range(ticks):
        wanted = batch if isinstance(batch, int) else batch(tick)
        held, chance = table.fill(wanted), next(luck)
        acceptance_K, state = process.step(state, held, chance.process_2)
        mean_length = float(table.length_B[:held].mean()) if held else 0.0
        cost_A, draft_A = costs.lookup(held, mean_length)
        told = (cost_A, draft_A) if believed is None else believed.lookup(held, mean_length)
        switch_A = free_A if switch_AA is None or previous < 0 else switch_AA[previous]
        context = DepthContext(
            tiers_A=tiers_A,
            holder_B=table.holder_B.copy(),
            cost_A=told[0],
            draft_A=told[1],
            switch_A=switch_A,
            previous=previous,
            waiting=max(0, wanted - slots),
            free_pages=1 - float(table.length_B[:held].sum()) / (slots * MAX_TOKENS),
            mean_length=mean_length,
            acceptance_K=acceptance_K,
        )
        while len(late) > feedback_delay:
            _tell(host, believed, late.popleft())
        plan = host.choose(context)
        seconds = rounds * cost_A[plan.arm] + switch_A[plan.arm]
        noise = np.exp(time_noise * chance.time - time_noise**2 / 2)  # of mean 1
        stats = _outcome(context, plan, chance, float(seconds * noise))
        late.append((context, plan, stats))
        table.emit(stats.emitted_B, chance.end_B)
        tokens_A = rounds * held * expected_tokens(acceptance_K, tiers_A)
        tokens = rounds * expected_tokens(acceptance_K, plan.depth_B[:held]).sum()
        chosen, came = (plan.arm, plan.propensity), (stats.emitted_B.sum(), stats.seconds)
        rows.append((*chosen, held, acceptance_K, *came, tokens, seconds, tokens_A, rounds * cost_A))
        previous = plan.arm
    return Trace(*(np.array(column) for column in zip(*rows, strict=True)))


def goodput(trace: Trace) -> float:
    """Tokens a second that the plans bring in expectation: no luck but the policy's own.

    A run is as many ticks for every policy, and deep ticks take longer. Where the batch changes, a policy that drafts
    deep while few rows run thus spends more of its time there; compare regret instead.
    """
    return float(trace.mean_tokens_T.sum() / trace.mean_seconds_T.sum())


def measured_goodput(trace: Trace) -> float:
    """Tokens a second as they came."""
    return float(trace.tokens_T.sum() / trace.seconds_T.sum())


def best_fixed(trace: Trace) -> tuple[int, float]:
    """Find the arm that would have been best all the time, in hindsight, and its expected tokens a second."""
    rate_A = trace.tokens_TA.sum(axis=0) / trace.seconds_TA.sum(axis=0)
    return int(rate_A.argmax()), float(rate_A.max())


def regret_T(trace: Trace) -> np.ndarray:
    """Tokens that each tick lost to the best arm of that tick, in the time that it took, in expectation."""
    best_T = (trace.tokens_TA / trace.seconds_TA).max(axis=1)
    return best_T * trace.mean_seconds_T - trace.mean_tokens_T


def regret_to_fixed_T(trace: Trace) -> np.ndarray:
    """Tokens that each tick lost to the best fixed arm in hindsight; negative where it won."""
    arm, _ = best_fixed(trace)
    rate_T = trace.tokens_TA[:, arm] / trace.seconds_TA[:, arm]
    return rate_T * trace.mean_seconds_T - trace.mean_tokens_T


def _draw(seed: int, shape: tuple[int, int, int]) -> Iterator[_Luck]:
    """Draw the luck of one tick after the other; `shape` is slots, rounds, positions."""
    generator = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])
    while True:
        process = generator.random((_BLOCK, 2))
        accept = generator.random((_BLOCK, *shape), np.float32)
        end = generator.random((_BLOCK, shape[0]))
        time = generator.standard_normal(_BLOCK)
        yield from (_Luck(*parts) for parts in zip(process, accept, end, time, strict=True))


def _outcome(context: DepthContext, plan: Plan, chance: _Luck, seconds: float) -> StepStats:
    """Let the process decide what is accepted.

    Where the target is uniform over a share a of the tokens over which the draft is, a draft is accepted with
    probability a, and KL(p || q) = -log a: that is the divergence, varied from row to row by a factor of mean 1.
    """
    held_B1 = (context.holder_B != NOT_RUN)[:, None]
    depth_B1 = plan.depth_B[:, None]
    acceptance_K = context.acceptance_K
    assert acceptance_K is not None, "a simulated context knows the truth"
    run_BRK = np.logical_and.accumulate(chance.accept_BRK < acceptance_K[: chance.accept_BRK.shape[-1]], axis=-1)
    count_BR = np.minimum(run_BRK.sum(axis=-1), depth_B1)
    accepted_BR = np.where(held_B1, count_BR, NOT_RUN)
    drafted_BR = np.where(held_B1, np.broadcast_to(depth_B1, accepted_BR.shape), NOT_RUN)
    divergence_BR = np.zeros(accepted_BR.shape)
    if plan.wants_divergence:
        mean_D = -np.log(np.maximum(acceptance_K, 1e-9)).cumsum() / np.arange(1, len(acceptance_K) + 1)
        each_B1 = np.where(depth_B1 > 0, mean_D[np.maximum(depth_B1, 1) - 1], 0.0)
        divergence_BR = np.where(held_B1, each_B1 * 2 * chance.accept_BRK[..., 0], 0.0)
    emitted_B = np.where(held_B1, count_BR + 1, 0).sum(axis=1)
    return StepStats(drafted_BR, accepted_BR, emitted_B, divergence_BR, seconds)


def _tell(host: HostPolicy, believed: CostTable | None, late: tuple[DepthContext, Plan, StepStats]) -> None:
    """Let the policy, and what is believed of costs, learn from a tick."""
    context, plan, stats = late
    host.update(context, plan, stats)
    if believed is not None and stats.rounds:
        seconds = (stats.seconds - context.switch_A[plan.arm]) / stats.rounds
        believed.observe(context.batch, context.mean_length, plan.arm, seconds)
