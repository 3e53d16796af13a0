"""SpecuStream: the depth of most predicted tokens a second, by a Bayesian model of acceptance and measured times.

Goodput of depth K = E[tokens of a round at K] / seconds of a round at K. The seconds come with the context. The tokens
come from the conditional acceptance by position, which every depth informs about the positions that it reaches, so one
depth's outcome teaches about all of them: what a bandit over depths would have to learn arm by arm is known structure.

Acceptance: at each position a Beta posterior over discounted counts, of the rounds in which that position was verified
and no other (Kaplan and Meier 1958: what comes after a refusal is censored, not refused). Its prior is the estimate of
the position before. This is kept for some horizons at once, and they are averaged by how well each has foretold what
came (Herbster and Warmuth 1998, fixed share: weights never vanish, so another horizon takes over within some ticks
of a change). The shortest horizon has soon forgotten and then says what the prior says: it is the hypothesis of a change.

Objective: goodput as in SmartSpec/TurboSpec (arXiv 2406.14066), with a price of switching as in Nightjar (2512.22420).
"""

from typing import NamedTuple

import numpy as np

from streamserve.bandits import Policy
from streamserve.specustream.depth import NOT_RUN, DepthContext, Plan, StepStats, whole


class State(NamedTuple):
    """What the policy knows. H horizons, K positions, A arms, B slots.

    Attributes:
      accepted_HK: discounted number of acceptances.
      tried_HK: discounted number of verifications.
      mean_HK: the posterior's mean acceptance, of these counts.
      weight_H: how far each horizon is believed.
      kept_2A: discounted tokens that rows kept, and that were verified for them, by arm.
      home: arm that it runs unless it probes or explores; -1 at the beginning.
      dwell: ticks since home changed.
      idle_s: measured time since something was drafted.
      plain_s: measured time of the last tick that did not draft.
      patience: times the shortest interval between two probes that it waits now.
      seen_B: who held the slots at the last probe.
    """

    accepted_HK: np.ndarray
    tried_HK: np.ndarray
    mean_HK: np.ndarray
    weight_H: np.ndarray
    kept_2A: np.ndarray
    home: int
    dwell: int
    idle_s: float
    plain_s: float
    patience: float
    seen_B: np.ndarray


class _Coefficients(NamedTuple):
    """Arguments of `specustream`."""

    keep_H1: np.ndarray
    prior: tuple[float, float]
    share: float
    evidence: float
    caution: float
    hysteresis: float
    min_dwell: int
    amortise: float
    probe_budget: float
    patience: float
    explore: float
    margin: float


def specustream(
    tiers: tuple[int, ...],
    slots: int,
    *,
    horizons: tuple[float, ...] = (4.0, 25.0, 150.0),
    prior: tuple[float, float] = (0.6, 3.0),
    share: float = 0.02,
    evidence: float = 32.0,
    caution: float = 0.0,
    hysteresis: float = 0.01,
    min_dwell: int = 2,
    amortise: float = 64.0,
    probe_budget: float = 0.01,
    patience: float = 4.0,
    explore: float = 0.01,
    margin: float = 0.05,
) -> Policy:
    """Build the policy.

    Args:
      tiers: depths, ascending, one an arm.
      slots: decode slots, B.
      horizons: ticks after which a count weighs 1/e, ascending; one estimate each.
      prior: acceptance of the first position before anything is known, in (0, 1), and how many verifications that and
        each position's likeness to the one before it are worth.
      share: fraction of the belief that is dealt out evenly among horizons at each tick with verifications.
      evidence: verifications, the most that one tick counts as when horizons are compared; rows of a tick are alike.
      caution: standard deviations, by how many of the horizons' disagreement a prediction is lowered.
      hysteresis: fraction by which another arm must be predicted to be better before it becomes home.
      min_dwell: ticks that an arm stays home at least; feedback of its first one takes two.
      amortise: rounds among which the price of a switch is divided.
      probe_budget: fraction of the time that probes may cost while home is plain decoding, were nothing accepted.
      patience: the most by which intervals between probes grow; each that changes nothing doubles the next one. A
        change of the batch, or of half of those who run, makes it 1 again.
      explore: probability of a tick to run an arm at random, of those that are near the best.
      margin: fraction of the best predicted goodput by which an arm may be worse and still be near.
    """
    num_positions, num_horizons = max(tiers), len(horizons)
    keep_H1 = np.exp(-1 / np.array(horizons))[:, None]
    settings = _Coefficients(
        keep_H1,
        prior,
        share,
        evidence,
        caution,
        hysteresis,
        min_dwell,
        amortise,
        probe_budget,
        patience,
        explore,
        margin,
    )

    def init() -> State:
        zero_HK = np.zeros((num_horizons, num_positions))
        return State(
            accepted_HK=zero_HK,
            tried_HK=zero_HK,
            mean_HK=_posterior(zero_HK, zero_HK, prior),
            weight_H=np.full(num_horizons, 1 / num_horizons),
            kept_2A=np.zeros((2, len(tiers))),
            home=-1,
            dwell=min_dwell,
            idle_s=0.0,
            plain_s=0.0,
            patience=1.0,
            seen_B=np.full(slots, NOT_RUN),
        )

    def choose(state: State, context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, State]:
        goodput_A = predicted_goodput(state, context, caution=caution, amortise=amortise)
        state = _settle(state, goodput_A, settings)
        arm, state = _maybe_probe(state, context, settings)
        plan = _maybe_explore(arm, goodput_A, context, noise_A2[0], settings)
        return plan, state if tiers[plan.arm] == 0 else state._replace(idle_s=0.0)

    def update(state: State, context: DepthContext, plan: Plan, stats: StepStats) -> State:
        state = _learn_tokens(state, plan, stats, settings)
        if tiers[plan.arm] == 0:
            state = state._replace(plain_s=stats.seconds, idle_s=state.idle_s + stats.seconds)
        del context
        return _learn_acceptance(state, stats, settings)

    return Policy(init=init, choose=choose, update=update)


def predicted_goodput(state: State, context: DepthContext, *, caution: float, amortise: float) -> np.ndarray:
    """Predict tokens a second and row of each arm, [A]."""
    survival_HK = np.cumsum(np.cumprod(state.mean_HK, axis=1), axis=1)
    survival_HA = np.where(context.tiers_A > 0, survival_HK[:, np.maximum(context.tiers_A, 1) - 1], 0.0)
    extra_A = state.weight_H @ survival_HA
    if caution:
        extra_A = extra_A - caution * np.sqrt(state.weight_H @ (survival_HA - extra_A) ** 2)
    kept, verified = state.kept_2A
    pooled = (kept.sum() + 1.0) / (verified.sum() + 1.0)
    kept_A = (kept + _KEPT_PRIOR * pooled) / (verified + _KEPT_PRIOR)
    return (1 + extra_A) * kept_A / (context.cost_A + context.switch_A / amortise)


_KEPT_PRIOR = 64.0  # tokens


def _settle(state: State, goodput_A: np.ndarray, settings: _Coefficients) -> State:
    """Make the best arm home, unless home is new or nearly as good."""
    best = int(goodput_A.argmax())
    if state.home < 0:
        return state._replace(home=best, dwell=1)
    better = goodput_A[best] > (1 + settings.hysteresis) * goodput_A[state.home]
    if better and state.dwell >= settings.min_dwell:
        return state._replace(home=best, dwell=1, patience=1.0)
    return state._replace(dwell=state.dwell + 1)


def _maybe_probe(state: State, context: DepthContext, settings: _Coefficients) -> tuple[int, State]:
    """Run the smallest depth for a tick where home has not drafted for so long that it costs next to nothing."""
    tiers_A, home = context.tiers_A, state.home
    if tiers_A[home] > 0 or len(tiers_A) == 1 or not state.plain_s:
        return home, state
    arm = home + 1
    if 2 * np.count_nonzero(state.seen_B != context.holder_B) > context.batch:
        state = state._replace(patience=1.0)
    extra = context.cost_A[arm] / context.cost_A[home] - 1
    price_s = state.plain_s * max(extra, settings.probe_budget) + context.switch_A[arm] * 2
    if state.idle_s * settings.probe_budget < price_s * state.patience:
        return home, state
    patience = min(2 * state.patience, settings.patience)
    return arm, state._replace(patience=patience, seen_B=context.holder_B)


def _maybe_explore(
    arm: int, goodput_A: np.ndarray, context: DepthContext, noise_2: np.ndarray, settings: _Coefficients
) -> Plan:
    """Replace an arm by one that is nearly as good as the best, rarely."""
    near = np.flatnonzero(goodput_A >= (1 - settings.margin) * goodput_A.max())
    each = settings.explore / len(near)
    if noise_2[0] < settings.explore:
        chosen = int(near[min(int(noise_2[1] * len(near)), len(near) - 1)])
    else:
        chosen = arm
    propensity = each * bool((near == chosen).any()) + (1 - settings.explore) * (chosen == arm)
    return whole(context, chosen, propensity)


def _learn_tokens(state: State, plan: Plan, stats: StepStats, settings: _Coefficients) -> State:
    """Learn what share of an arm's tokens rows keep; those after a stop are lost, and deep arms lose more."""
    verified = int(stats.accepted_BR[stats.ran_BR].sum()) + stats.row_rounds
    kept_2A = state.kept_2A * settings.keep_H1[-1]
    kept_2A[:, plan.arm] += min(int(stats.emitted_B.sum()), verified), verified
    return state._replace(kept_2A=kept_2A)


def _learn_acceptance(state: State, stats: StepStats, settings: _Coefficients) -> State:
    """Compare horizons by what came, then count it."""
    accepted_K, refused_K = _outcomes(stats, state.mean_HK.shape[1])
    tried_K = accepted_K + refused_K
    total = tried_K.sum()
    weight_H = state.weight_H
    if total:
        score_H = np.log(state.mean_HK) @ accepted_K + np.log1p(-state.mean_HK) @ refused_K
        weight_H = weight_H * np.exp((score_H - score_H.max()) * min(1.0, settings.evidence / total))
        weight_H = (1 - settings.share) * weight_H / weight_H.sum() + settings.share / len(weight_H)
    accepted_HK = settings.keep_H1 * state.accepted_HK + accepted_K
    tried_HK = settings.keep_H1 * state.tried_HK + tried_K
    mean_HK = _posterior(accepted_HK, tried_HK, settings.prior)
    return state._replace(accepted_HK=accepted_HK, tried_HK=tried_HK, mean_HK=mean_HK, weight_H=weight_H)


def _outcomes(stats: StepStats, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Count acceptances and refusals by position: a row's first refusal is seen, what comes after it is not."""
    ran_BR = stats.ran_BR
    accepted, drafted = stats.accepted_BR[ran_BR], stats.drafted_BR[ran_BR]
    reached = np.bincount(accepted, minlength=num_positions + 1)
    refused_K = np.bincount(accepted[accepted < drafted], minlength=num_positions)[:num_positions]
    accepted_K = reached[::-1].cumsum()[::-1][1 : num_positions + 1]  # rounds that accepted more than k
    return accepted_K.astype(float), refused_K.astype(float)


def _posterior(accepted_HK: np.ndarray, tried_HK: np.ndarray, prior: tuple[float, float]) -> np.ndarray:
    """Give each position's mean acceptance, that of the position before being its prior."""
    first, strength = prior
    rows = []
    for accepted_K, tried_K in zip(accepted_HK.tolist(), tried_HK.tolist(), strict=True):
        before, row = first, []
        for accepted, tried in zip(accepted_K, tried_K, strict=True):
            before = (accepted + strength * before) / (tried + strength)
            row.append(before)
        rows.append(row)
    return np.clip(np.array(rows), _EDGE, 1 - _EDGE)


_EDGE = 1e-3  # no mean is nearer to 0 and 1, so that one surprise does not decide between horizons
