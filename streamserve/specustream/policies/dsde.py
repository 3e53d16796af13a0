"""A depth for each slot by how steady the divergence between its models is."""

from typing import NamedTuple

import numpy as np

from streamserve.bandits import Policy
from streamserve.specustream.depth import NOT_RUN, DepthContext, Plan, StepStats
from streamserve.specustream.policies.plans import cover

_UNKNOWN = -1.0  # in the history: divergences are not negative
_MOST = 20.0  # nats; models that are further apart agree on nothing, and exp would overflow
_EPSILON = 1e-9


class DSDEState(NamedTuple):
    """Divergences of each slot, and what calibration found. B slots, W rounds.

    Attributes:
      holder_B: int64, whose history it is.
      history_BW: float64, mean divergence of the latest rounds, nats, newest last; _UNKNOWN before the first.
      calibrated: verifications seen, up to those of the calibration.
      accepted: most tokens accepted in one of them.
      total: sum of their divergences, nats.
      largest: largest of their divergences, nats.
    """

    holder_B: np.ndarray
    history_BW: np.ndarray
    calibrated: int
    accepted: int
    total: float
    largest: float


def _variance(history_BW: np.ndarray, weight_W: np.ndarray) -> np.ndarray:
    """Weighted variance of what is known of each row; 0 of fewer than two values."""
    weight_BW = weight_W * (history_BW != _UNKNOWN)
    sum_B1 = np.maximum(weight_BW.sum(axis=1, keepdims=True), _EPSILON)
    off_BW = history_BW - (weight_BW * history_BW).sum(axis=1, keepdims=True) / sum_B1
    return (weight_BW * off_BW**2).sum(axis=1) / sum_B1[:, 0]


def dsde(
    tiers: tuple[int, ...],
    slots: int,
    *,
    least: int = 2,
    short: int = 10,
    long: int = 30,
    decay: float = 0.85,
    calibration: int = 32,
) -> Policy:
    """Give each slot (1 - SF WVIR) (SL_max - 2) + 2 tokens, 2 if SF WVIR is above 1, and nobody more than the mean.

    DSDE (Yang et al., arXiv 2509.01083, equations 1, 3, 4, 8 and 11). SF = exp(2 x mean divergence of the last round)
    - 1; WVIR is the weighted variance of the divergence over the last 10 rounds to that over the last 30; SL_max =
    most accepted (1 + mean / largest divergence), all three from a calibration at the deepest tier. Depths are rounded
    and held within the tiers; SL_max is at least 2.

    Args:
      tiers: depths of the arms.
      slots: B.
      least: tokens a round, of any slot.
      short: rounds in the short window.
      long: rounds in the long one.
      decay: by which a divergence's weight falls from one round to the next, a fraction.
      calibration: verifications that it takes.
    """
    weight_W = decay ** np.arange(long)[::-1]

    def init() -> DSDEState:
        return DSDEState(np.full(slots, NOT_RUN, np.int64), np.full((slots, long), _UNKNOWN), 0, 0, 0.0, 0.0)

    def choose(state: DSDEState, context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, DSDEState]:
        del noise_A2
        same_B1 = (state.holder_B == context.holder_B)[:, None]
        history_BW = np.where(same_B1, state.history_BW, _UNKNOWN)
        state = state._replace(holder_B=np.array(context.holder_B, np.int64), history_BW=history_BW)
        held_B = context.holder_B != NOT_RUN
        if state.calibrated < calibration or not held_B.any():
            return cover(context, np.full(slots, tiers[-1]))._replace(wants_divergence=True), state
        mean = state.total / state.calibrated
        most = max(state.accepted * (1.0 + mean / (state.largest + _EPSILON)), least)
        scale_B = np.exp(2.0 * np.maximum(history_BW[:, -1], 0.0)) - 1.0
        ratio_B = _variance(history_BW[:, -short:], weight_W[-short:])
        ratio_B /= _variance(history_BW, weight_W) + _EPSILON
        depth_B = np.maximum(1.0 - scale_B * ratio_B, 0.0) * (most - least) + least
        depth_B = np.rint(np.minimum(depth_B, depth_B[held_B].mean())).astype(np.int64)
        return cover(context, depth_B)._replace(wants_divergence=True), state

    def update(state: DSDEState, context: DepthContext, plan: Plan, stats: StepStats) -> DSDEState:
        if not plan.wants_divergence:
            return state
        drew_BR = stats.drafted_BR > 0
        known_BR = np.nan_to_num(stats.divergence_BR, nan=0.0, posinf=_MOST)
        known_BR = np.minimum(np.maximum(known_BR, 0.0), _MOST)
        same_B1 = (state.holder_B == context.holder_B)[:, None]
        all_BX = np.concatenate([state.history_BW, np.where(drew_BR & same_B1, known_BR, _UNKNOWN)], axis=1)
        order_BX = np.argsort(all_BX != _UNKNOWN, axis=1, kind="stable")  # the unknown ones to the front
        state = state._replace(history_BW=np.take_along_axis(all_BX, order_BX, axis=1)[:, -long:])
        if state.calibrated >= calibration or not drew_BR.any():
            return state
        new = known_BR[drew_BR]
        return state._replace(
            calibrated=state.calibrated + len(new),
            accepted=max(state.accepted, int(stats.accepted_BR.max())),
            total=state.total + float(new.sum()),
            largest=max(state.largest, float(new.max())),
        )

    return Policy(init=init, choose=choose, update=update)
