"""Acceptance by position, estimated over several horizons at once and averaged by how well each foretold what came.

At each position stands a Beta posterior over discounted counts of the rounds in which that position was verified: what
comes after a refusal is not refused but censored, so that the product over positions is the estimate of survival by
Kaplan and Meier (1958), and every depth informs all depths about the positions that it reaches. A position's prior is
the estimate of the one before it.

Horizons are averaged by fixed share (Herbster and Warmuth, "Tracking the best expert", 1998): a weight is multiplied
by the likelihood that its horizon gave to what came, and a part of all weights is dealt out evenly, so that none
vanishes and another horizon takes over within some ticks of a change. The shortest has soon forgotten, and then says
what the prior says: it is the hypothesis that everything has changed.
"""

import itertools
import math
import operator
from typing import NamedTuple

import numpy as np

from streamserve.specustream.depth import StepStats
from streamserve.specustream.policies.acceptance import observe

_EDGE = 1e-3  # no mean is nearer to 0 and 1, so that one surprise does not decide between horizons


class Horizons(NamedTuple):
    """What is known of acceptance. H horizons, K positions.

    Attributes:
      accepted_HK: discounted number of acceptances.
      tried_HK: discounted number of verifications.
      mean_HK: mean acceptance, of the counts and the prior as they were when a draft was last verified.
      weight_H: how far each horizon is believed; sums to one.
    """

    accepted_HK: np.ndarray
    tried_HK: np.ndarray
    mean_HK: np.ndarray
    weight_H: np.ndarray


class Learning(NamedTuple):
    """How it is learnt.

    Attributes:
      keep: of each horizon, what remains of a count after a tick.
      prior: acceptance of the first position, before anything is known.
      prior_weight: verifications that a prior is worth.
      share: fraction of the weight that is dealt out evenly, at each tick that verified a draft.
      evidence: verifications, the most that a tick counts as when horizons are compared.
    """

    keep: tuple[float, ...]
    prior: float
    prior_weight: float
    share: float
    evidence: float


def unknown(num_positions: int, by: Learning) -> Horizons:
    """Begin without observations."""
    num_horizons = len(by.keep)
    zero_HK, even_H = np.zeros((num_horizons, num_positions)), np.full(num_horizons, 1 / num_horizons)
    return Horizons(zero_HK, zero_HK, np.full(zero_HK.shape, by.prior), even_H)


def drafted_tokens(known: Horizons, tiers_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predict accepted tokens of a round at each depth: the mean over horizons, and their disagreement.

    Returns:
      mean_A and deviation_A, tokens.
    """
    tiers, tokens = tiers_A.tolist(), []
    for mean_K in known.mean_HK.tolist():
        by_depth = [0.0, *itertools.accumulate(itertools.accumulate(mean_K, operator.mul))]
        tokens += [by_depth[tier] for tier in tiers]
    tokens_HA = np.array(tokens).reshape(-1, len(tiers))
    mean_A = known.weight_H @ tokens_HA
    return mean_A, np.sqrt(known.weight_H @ (tokens_HA - mean_A) ** 2)


def learn(known: Horizons, stats: StepStats, by: Learning) -> Horizons:
    """Compare horizons by what came of a tick, then count it.

    Counts fade whether or not the tick drafted, so that after a pause the shortest horizon expects what the prior says.
    But predictions stand until a draft is verified: that time has passed is no evidence.
    """
    kept_BR, tried_BR = observe(stats)
    num_positions = known.mean_HK.shape[1]
    accepted_K, tried_K = _reached(kept_BR, num_positions), _reached(tried_BR, num_positions)
    keep_H1, total = np.array(by.keep)[:, None], sum(tried_K.tolist())
    accepted_HK, tried_HK = keep_H1 * known.accepted_HK, keep_H1 * known.tried_HK
    if not total:
        return known._replace(accepted_HK=accepted_HK, tried_HK=tried_HK)
    before_HK = _posterior(accepted_HK, tried_HK, by)
    score_H = np.log(before_HK) @ accepted_K + np.log1p(-before_HK) @ (tried_K - accepted_K)
    weight_H = _share(known.weight_H.tolist(), score_H.tolist(), min(1.0, by.evidence / total), by.share)
    accepted_HK, tried_HK = accepted_HK + accepted_K, tried_HK + tried_K
    return Horizons(accepted_HK, tried_HK, _posterior(accepted_HK, tried_HK, by), weight_H)


def _reached(count_BR: np.ndarray, num_positions: int) -> np.ndarray:
    """Count in how many rounds each position was among the first `count`, [K]."""
    histogram = np.bincount(count_BR.ravel(), minlength=num_positions + 1)
    return histogram[::-1].cumsum()[::-1][1 : num_positions + 1].astype(np.float64)


def _share(weights: list[float], scores: list[float], temper: float, share: float) -> np.ndarray:
    """Update weights by fixed share."""
    best = max(scores)
    likely = [weight * math.exp(temper * (score - best)) for weight, score in zip(weights, scores, strict=True)]
    scale, floor = (1 - share) / sum(likely), share / len(weights)
    return np.array([scale * weight + floor for weight in likely])


def _posterior(accepted_HK: np.ndarray, tried_HK: np.ndarray, by: Learning) -> np.ndarray:
    """Give each position's mean acceptance; in floats: numpy takes tenfold for a recurrence."""
    means, weight = [], by.prior_weight
    for accepted_K, tried_K in zip(accepted_HK.tolist(), tried_HK.tolist(), strict=True):
        mean = by.prior
        for accepted, tried in zip(accepted_K, tried_K, strict=True):
            mean = (accepted + weight * mean) / (tried + weight)
            means.append(mean)
    return np.array(means).reshape(accepted_HK.shape).clip(_EDGE, 1 - _EDGE)
