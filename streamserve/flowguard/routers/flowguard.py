"""`flowguard`: a guard, a weighted sum of scores, and weights that follow the outcomes.

The guard leaves out the lanes that are predicted to miss the request's objective, as long as there is one that is not.
Among the rest the largest sum of weighted scores wins. Scores are of predicted latencies, which acceptance and depth of
speculation enter by the tokens that a row emits in a tick, and of what predictions do not see. Weights are those of a
linear model of the request's utility (`signals.utility`), fitted by discounted ridge regression on the scores of the
lanes that were chosen: a contextual bandit (Li et al., arXiv 1003.0146) that explores evenly, and rarely, so that
propensities are exact.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from streamserve.bandits import Policy
from streamserve.config import FlowGuardConfig
from streamserve.flowguard.predict import Prediction, predict
from streamserve.flowguard.routers import scorers
from streamserve.flowguard.routers.picking import outstanding
from streamserve.flowguard.signals import Route, RouteContext, RouteOutcome, utility

SCORES = ("ttft", "tpot", "acceptance", "prefix", "slots", "pages")  # F of them, and a constant


class State(NamedTuple):
    """What is known. F scores and a constant.

    Attributes:
      gram_FF: discounted sum of outer products of scores, the prior's included.
      sum_F: discounted sum of scores times utility, likewise.
      weight_F: the weights that fit them.
    """

    gram_FF: np.ndarray
    sum_F: np.ndarray
    weight_F: np.ndarray


def flowguard(num_lanes: int, **coefficients: Any) -> Policy:
    """Build the policy.

    Args:
      num_lanes: A.
      coefficients: fields of `FlowGuardConfig`.
    """
    by = FlowGuardConfig(**coefficients)
    prior_F = np.array([*(getattr(by, name) for name in SCORES), 0.0])
    keep = math.exp(-1 / by.forget)
    prior_FF = by.prior_weight * np.eye(len(prior_F)) / len(prior_F)

    def init() -> State:
        return State(np.zeros_like(prior_FF), np.zeros_like(prior_F), prior_F)

    def choose(state: State, context: RouteContext, noise_A2: np.ndarray) -> tuple[Route, State]:
        predicted, local_A = _best_way(context, by)
        may_A = _guarded(context, predicted, by)
        value_A = np.where(may_A, _scores(context, predicted) @ state.weight_F, -np.inf)
        best = int(value_A.argmax())
        arm, open_to = best, np.flatnonzero(may_A)
        if noise_A2[0, 0] < by.explore:
            arm = int(open_to[int(noise_A2[0, 1] * len(open_to)) % len(open_to)])
        propensity = by.explore / len(open_to) + (1 - by.explore) * (arm == best)
        return Route(arm, propensity, bool(local_A[arm])), state

    def update(state: State, context: RouteContext, route: Route, outcome: RouteOutcome) -> State:
        if not by.learning:
            return state
        predicted = _pick_ways(
            context, np.arange(num_lanes) == route.arm if route.local else np.zeros(num_lanes, bool), by
        )
        score_F = _scores(context, predicted)[route.arm]
        gram_FF = keep * state.gram_FF + np.outer(score_F, score_F)
        sum_F = keep * state.sum_F + score_F * utility(outcome, context.objective)
        weight_F = np.linalg.solve(gram_FF + prior_FF, sum_F + prior_FF @ prior_F)
        return State(gram_FF, sum_F, weight_F)

    return Policy(init=init, choose=choose, update=update)


def _believed(context: RouteContext, by: FlowGuardConfig) -> RouteContext:
    """Let what a lane measured fade while it has nothing to do: one that was slow is tried again."""
    fresh_A = np.exp(-context.idle_s_A / by.stale_s * (outstanding(context) == 0))
    measured = ("prefill_s_A", "transfer_s_A", "tick_s_A", "decode_s_A")
    return context._replace(**{name: getattr(context, name) * fresh_A for name in measured})


def _best_way(context: RouteContext, by: FlowGuardConfig) -> tuple[Prediction, np.ndarray]:
    """Predict, and decide on which lanes the prompt would be computed where it is decoded."""
    if not context.local_A.any():
        return predict(_believed(context, by)), context.local_A
    remote = predict(_believed(context, by)).ttft_s_A
    local = predict(_believed(context, by), local=True).ttft_s_A
    local_A = context.local_A & (local < (1 - by.local_gain) * remote)
    return _pick_ways(context, local_A, by), local_A


def _pick_ways(context: RouteContext, local_A: np.ndarray, by: FlowGuardConfig) -> Prediction:
    """Predict, with the prompt computed where it is decoded on the lanes `local_A`."""
    remote = predict(_believed(context, by))
    if not local_A.any():
        return remote
    local = predict(_believed(context, by), local=True)
    return Prediction(*(np.where(local_A, here, there) for here, there in zip(local, remote, strict=True)))


def _guarded(context: RouteContext, predicted: Prediction, by: FlowGuardConfig) -> np.ndarray:
    """Leave out the lanes that would miss the objective, while there is one that would not."""
    limit = 1 + by.margin
    within_A = context.waited_s + predicted.ttft_s_A <= limit * context.objective.ttft_s
    within_A &= predicted.tpot_s_A <= limit * context.objective.tpot_s
    kept_A = context.eligible_A & within_A
    return kept_A if kept_A.any() else context.eligible_A


def _scores(context: RouteContext, predicted: Prediction) -> np.ndarray:
    """Score every lane, [A, F]."""
    columns = (
        scorers.ttft(context, predicted),
        scorers.tpot(context, predicted),
        scorers.acceptance(context),
        scorers.prefix(context),
        scorers.slots(context),
        scorers.pages(context),
        np.ones(len(context.eligible_A)),
    )
    return np.stack(columns, axis=1)
