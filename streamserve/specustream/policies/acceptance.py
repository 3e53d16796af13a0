"""Estimates of conditional acceptance from censored counts, per slot and pooled over a lane.

A position is observed only if every one before it was accepted: a round that accepted `a` of `d` drafted tokens says
"accepted" of positions 1..a, "refused" of position a + 1 where a < d, and nothing of those beyond. A round in which
the row ended says "accepted" of what was emitted and nothing else.
"""

from typing import NamedTuple

import numpy as np

from streamserve.specustream.depth import NOT_RUN, DepthContext, StepStats


class Counts(NamedTuple):
    """Discounted counts of observations, per slot and over the lane. B slots, K positions.

    Attributes:
      holder_B: int64, whose counts these are.
      kept_BK: float64, times that the position was accepted.
      tried_BK: float64, times that it was observed.
      lane_kept_K: float64, the same for all requests there have been.
      lane_tried_K: float64.
    """

    holder_B: np.ndarray
    kept_BK: np.ndarray
    tried_BK: np.ndarray
    lane_kept_K: np.ndarray
    lane_tried_K: np.ndarray


class Watched(NamedTuple):
    """What a policy knows that predicts goodput from counts, and probes after too long without a draft.

    Attributes:
      counts: observations of acceptance.
      idle: plans without drafts in a row.
    """

    counts: Counts
    idle: int


def observe(stats: StepStats) -> tuple[np.ndarray, np.ndarray]:
    """Count leading positions of each round that were accepted, and those observed.

    Returns:
      kept_BR and tried_BR, int; tried is kept, or one more where a refusal was seen; 0 where nothing ran.
    """
    ran_BR = stats.ran_BR
    kept_BR = np.maximum(stats.accepted_BR, 0)
    verified_BR = kept_BR + 1
    tried_BR = np.minimum(np.maximum(stats.drafted_BR, 0), verified_BR)
    lost_B = np.vecdot(verified_BR, ran_BR) - stats.emitted_B
    if np.count_nonzero(lost_B > 0):
        ended = np.flatnonzero((lost_B > 0) & ran_BR.any(axis=1))
        last = ran_BR.shape[1] - 1 - np.argmax(ran_BR[ended, ::-1], axis=1)
        kept_BR[ended, last] = np.maximum(kept_BR[ended, last] + 1 - lost_B[ended], 0)
        tried_BR[ended, last] = kept_BR[ended, last]
    return kept_BR, tried_BR


def nothing(slots: int, positions: int) -> Counts:
    """Begin with empty slots and no observations."""
    zero_BK, zero_K = np.zeros((slots, positions)), np.zeros(positions)
    return Counts(np.full(slots, NOT_RUN, np.int64), zero_BK, zero_BK, zero_K, zero_K)


def seat(counts: Counts, context: DepthContext) -> Counts:
    """Forget slots that have changed hands."""
    same_B = counts.holder_B == context.holder_B
    if same_B.all():
        return counts
    holder_B = np.array(context.holder_B, np.int64)
    kept_BK, tried_BK = counts.kept_BK * same_B[:, None], counts.tried_BK * same_B[:, None]
    return counts._replace(holder_B=holder_B, kept_BK=kept_BK, tried_BK=tried_BK)


def learn(counts: Counts, context: DepthContext, stats: StepStats, discount: float) -> Counts:
    """Add what a tick has shown; a slot that has changed hands since its plan teaches the lane only.

    Args:
      counts: before.
      context: of the plan that the tick ran.
      stats: of the tick.
      discount: what remains of a count after a tick, whether or not anything was observed.
    """
    kept_BR, tried_BR = observe(stats)
    position_K = np.arange(1, counts.kept_BK.shape[1] + 1)
    kept_BK = (kept_BR[:, :, None] >= position_K).sum(axis=1)
    tried_BK = (tried_BR[:, :, None] >= position_K).sum(axis=1)
    same_B1 = (counts.holder_B == context.holder_B)[:, None]
    return Counts(
        counts.holder_B,
        discount * counts.kept_BK + kept_BK * same_B1,
        discount * counts.tried_BK + tried_BK * same_B1,
        discount * counts.lane_kept_K + kept_BK.sum(axis=0),
        discount * counts.lane_tried_K + tried_BK.sum(axis=0),
    )


def over_positions(counts: Counts) -> Counts:
    """Take all positions for one: counts with K = 1."""
    kept_B1, tried_B1 = counts.kept_BK.sum(axis=1, keepdims=True), counts.tried_BK.sum(axis=1, keepdims=True)
    lane_kept_1, lane_tried_1 = counts.lane_kept_K.sum(keepdims=True), counts.lane_tried_K.sum(keepdims=True)
    return Counts(counts.holder_B, kept_B1, tried_B1, lane_kept_1, lane_tried_1)


def estimate(counts: Counts, prior: float, prior_weight: float) -> np.ndarray:
    """Estimate conditional acceptance [B, K]: the slot's rate drawn towards the lane's, and that towards a prior.

    Args:
      counts: observations.
      prior: acceptance where nothing is known.
      prior_weight: observations that the lane's rate is worth to a slot, and the prior to the lane.
    """
    lane_K = (counts.lane_kept_K + prior_weight * prior) / (counts.lane_tried_K + prior_weight)
    return (counts.kept_BK + prior_weight * lane_K) / (counts.tried_BK + prior_weight)
