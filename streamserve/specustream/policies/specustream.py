"""SpecuStream: the depth of most predicted tokens a second, by a Bayesian model of acceptance and measured times.

Goodput of depth K = E[tokens of a round at K] / seconds of a round at K. The seconds come with the context. The tokens
come from the conditional acceptance by position, about which each depth's outcome teaches all depths: what a bandit
over depths would have to learn arm by arm is known structure (`horizons`). A bandit is left with what is not: measured
over predicted goodput of each arm. Load lowers the depth by the seconds, which grow with the batch; volatility lowers
it by the disagreement of the horizons.

Objective: goodput as in SmartSpec and TurboSpec (arXiv 2406.14066), with a price of switching as in Nightjar
(arXiv 2512.22420). Plain decoding teaches nothing of acceptance, so probes interrupt it, within a budget of time.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from streamserve.bandits import Policy
from streamserve.config import SpecuStreamConfig
from streamserve.specustream.depth import NOT_RUN, DepthContext, Plan, StepStats, whole
from streamserve.specustream.policies import horizons as acceptance
from streamserve.specustream.policies import rewards
from streamserve.specustream.policies.horizons import Horizons, Learning
from streamserve.specustream.policies.plans import SHORTEST_S

_CATCH_UP = 2.0  # plain ticks, the most that catching up counts for in the price of a probe


class State(NamedTuple):
    """What the policy knows. A arms, B slots.

    Attributes:
      known: of acceptance.
      residual_2A: by arm, discounted sum of log(measured / predicted goodput), and number of ticks in it.
      home: arm that runs unless it probes or explores; -1 at the beginning.
      dwell: ticks since home changed.
      idle_s: s, measured since something was drafted.
      plain_s: s, measured of the last tick that did not draft.
      patience: times the shortest interval between two probes that it waits now.
      seen_B: who held the slots at the last probe.
    """

    known: Horizons
    residual_2A: np.ndarray
    home: int
    dwell: int
    idle_s: float
    plain_s: float
    patience: float
    seen_B: np.ndarray


def specustream(tiers: tuple[int, ...], slots: int, **coefficients: Any) -> Policy:
    """Build the policy.

    Args:
      tiers: depths, ascending, one an arm.
      slots: decode slots, B.
      coefficients: fields of `SpecuStreamConfig`.
    """
    by = SpecuStreamConfig(**coefficients)
    keep = tuple(math.exp(-1 / ticks) for ticks in by.horizons)
    learning = Learning(keep, by.prior, by.prior_weight, by.share, by.evidence)

    def init() -> State:
        return State(
            known=acceptance.unknown(max(*tiers, 1), learning),
            residual_2A=np.zeros((2, len(tiers))),
            home=-1,
            dwell=0,
            idle_s=0.0,
            plain_s=0.0,
            patience=0.0,  # the first probe comes at once: of drafts nothing is known yet
            seen_B=np.full(slots, NOT_RUN),
        )

    def choose(state: State, context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, State]:
        goodput_A = predicted_goodput(state, context, by)
        state = _settle(state, goodput_A, by)
        arm, state = _maybe_probe(state, context, by)
        plan = _maybe_explore(arm, goodput_A, context, noise_A2[0], by)
        return plan, state if tiers[plan.arm] == 0 else state._replace(idle_s=0.0)

    def update(state: State, context: DepthContext, plan: Plan, stats: StepStats) -> State:
        known = acceptance.learn(state.known, stats, learning)
        residual_2A = keep[-1] * state.residual_2A
        log_ratio, ticks = _surprise(context, plan, stats, by.clip)
        residual_2A[0, plan.arm] += log_ratio
        residual_2A[1, plan.arm] += ticks
        state = state._replace(known=known, residual_2A=residual_2A)
        if tiers[plan.arm] > 0 or not stats.rounds:
            return state
        return state._replace(plain_s=float(stats.seconds), idle_s=state.idle_s + float(stats.seconds))

    return Policy(init=init, choose=choose, update=update)


def predicted_goodput(state: State, context: DepthContext, by: SpecuStreamConfig) -> np.ndarray:
    """Predict tokens a second and row of each arm, [A]."""
    mean_A, deviation_A = acceptance.drafted_tokens(state.known, context.tiers_A)
    total_A, ticks_A = state.residual_2A
    total, ticks = state.residual_2A.sum(axis=1).tolist()
    pooled = total / (ticks + by.likeness)
    factor_A = np.exp((total_A + by.likeness * pooled) / (ticks_A + by.likeness))
    seconds_A = np.maximum(context.cost_A + context.switch_A / by.amortise, SHORTEST_S)
    return (1 + np.maximum(mean_A - by.caution * deviation_A, 0)) * factor_A / seconds_A


def _settle(state: State, goodput_A: np.ndarray, by: SpecuStreamConfig) -> State:
    """Make the best arm home, unless home is new or nearly as good."""
    best = int(goodput_A.argmax())
    if state.home < 0:
        return state._replace(home=best, dwell=1)
    better = goodput_A[best] > (1 + by.hysteresis) * goodput_A[state.home]
    if better and state.dwell >= by.min_dwell:
        return state._replace(home=best, dwell=1, patience=1.0)
    return state._replace(dwell=state.dwell + 1)


def _maybe_probe(state: State, context: DepthContext, by: SpecuStreamConfig) -> tuple[int, State]:
    """Run the smallest depth for a tick, where home has not drafted for so long that the budget has room for it."""
    home, arm = state.home, state.home + 1
    if context.tiers_A[home] > 0 or arm == len(context.tiers_A) or not state.plain_s:
        return home, state
    if 2 * np.count_nonzero(state.seen_B != context.holder_B) > context.batch:
        state = state._replace(patience=min(state.patience, 1.0))
    extra = float(context.cost_A[arm] / max(context.cost_A[home], SHORTEST_S)) - 1
    # What there is to catch up grows with idle time: it counts for no more than a few rounds, so that a probe comes.
    catch_up_s = min(float(context.switch_A[arm]), _CATCH_UP * state.plain_s)
    price_s = state.plain_s * max(extra, by.probe_budget) + catch_up_s
    if by.probe_budget * state.idle_s < state.patience * price_s:
        return home, state
    return arm, state._replace(patience=min(max(2 * state.patience, 1.0), by.patience), seen_B=context.holder_B)


def _maybe_explore(
    arm: int, goodput_A: np.ndarray, context: DepthContext, noise_2: np.ndarray, by: SpecuStreamConfig
) -> Plan:
    """Run one of those arms that are nearly as good as the best instead, rarely."""
    goodputs = goodput_A.tolist()
    least = (1 - by.margin) * max(goodputs)
    near = [index for index, goodput in enumerate(goodputs) if goodput >= least]
    chosen = arm
    if noise_2[0] < by.explore:
        chosen = near[min(int(noise_2[1] * len(near)), len(near) - 1)]
    return whole(context, chosen, by.explore / len(near) * (chosen in near) + (1 - by.explore) * (chosen == arm))


def _surprise(context: DepthContext, plan: Plan, stats: StepStats, clip: float) -> tuple[float, float]:
    """Compare measured goodput with what was predicted for the tokens that were accepted, so without their luck.

    What remains is time that the table does not know, and tokens verified for a row that had ended.

    Returns:
      Logarithm of the ratio, and 1; zeros where nothing was measured.
    """
    emitted = rewards.tokens(stats)
    verified = int(np.maximum(stats.accepted_BR, 0).sum()) + stats.row_rounds
    predicted_s = stats.rounds * float(context.cost_A[plan.arm]) + float(context.switch_A[plan.arm])
    if not min(emitted, verified, stats.seconds, predicted_s) > 0:
        return 0.0, 0.0
    log_ratio = math.log(emitted / verified * predicted_s / stats.seconds)
    return min(max(log_ratio, -clip), clip), 1.0
