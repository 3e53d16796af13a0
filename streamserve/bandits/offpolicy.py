"""What another policy would have earned, estimated from the logged choices of a randomised one.

Each step is a contextual bandit's: a context comes, an arm is chosen with a known probability, a reward follows. The
weight w_t = target(a_t | x_t) / propensity_t makes the logged steps stand for the target's. Contexts are taken as
given: what the target's earlier choices would have done to them is not part of the estimate.

Sources: doubly robust: Dudik, Langford & Li (2011), "Doubly Robust Policy Evaluation and Learning"; self-normalised:
Swaminathan & Joachims (2015), "The Self-Normalized Estimator for Counterfactual Learning"; intervals: `bootstrap`.

Key: T steps, A arms, R resamples.
"""

import math
from typing import NamedTuple

import numpy as np

from streamserve.bandits.bootstrap import Bootstrap, resampled_means


class Estimate(NamedTuple):
    """An estimated value.

    Attributes:
      value: the estimate.
      low: lower end of the interval.
      high: upper end; infinite, as is `low`, where too many resamples hold no step that the target could have made.
      effective_samples: (sum w)^2 / sum w^2, Kish's count of steps that the weights leave.
      unsupported_mass: mean probability with which the target chooses what the logging policy never could: arms that
        are not in the log, and arms other than the logged one where its propensity is 1. The estimates do not see what
        happens there (doubly robust: only the model does), and no interval covers it.
    """

    value: float
    low: float
    high: float
    effective_samples: float
    unsupported_mass: float


class Choices(NamedTuple):
    """Logged choices, and a target policy's in the same contexts.

    Attributes:
      arms_T: int, the logged choice.
      propensities_T: probability with which it was chosen then, given all that came before.
      target_probs_TA: probability with which the target would choose each arm.
    """

    arms_T: np.ndarray
    propensities_T: np.ndarray
    target_probs_TA: np.ndarray


def ips(rewards_T: np.ndarray, choices: Choices, *, bootstrap: Bootstrap, clip: float = math.inf) -> Estimate:
    """Estimate the mean reward by inverse propensities, mean(w r): unbiased, with a variance like that of the weights.

    Args:
      rewards_T: of the logged choices.
      choices: those, and the target's.
      bootstrap: of the interval.
      clip: largest weight; below infinity it trades variance for a bias towards 0.

    Raises:
      ValueError: the input cannot be that of a log.
    """
    weights_T = _weights(choices, clip)
    _check_series(rewards_T=rewards_T, like_T=weights_T)
    return _estimate(weights_T * rewards_T, np.ones(len(weights_T)), weights_T, choices, bootstrap)


def snips(rewards_T: np.ndarray, choices: Choices, *, bootstrap: Bootstrap, clip: float = math.inf) -> Estimate:
    """Estimate the mean reward by self-normalised inverse propensities, sum(w r) / sum(w).

    Consistent, biased by O(1/T); it does not change when a constant is added to all rewards and subtracted again, and
    stays within the range of the rewards. Arguments as for `ips`; clipping biases it towards the logging policy.

    Raises:
      ValueError: the input cannot be that of a log, or the target would have made none of the logged choices.
    """
    weights_T = _weights(choices, clip)
    _check_series(rewards_T=rewards_T, like_T=weights_T)
    return _estimate(weights_T * rewards_T, weights_T, weights_T, choices, bootstrap)


def doubly_robust(
    rewards_T: np.ndarray, choices: Choices, q_TA: np.ndarray, *, bootstrap: Bootstrap, clip: float = math.inf
) -> Estimate:
    """Estimate the mean reward as the model's under the target, plus the weighted residuals of the logged choices.

    mean(sum_a target(a) q(a) + w (r - q(a_t))): unbiased for any model that has not seen the step, since propensities
    are known, and with the less variance the better it is. Clipping trades variance for a bias towards the model.

    Args:
      rewards_T: of the logged choices.
      choices: those, and the target's.
      q_TA: predicted reward of each arm; from `reward_model.fit_linear`, or any model fitted on other steps.
      bootstrap: of the interval.
      clip: largest weight.

    Raises:
      ValueError: the input cannot be that of a log.
    """
    weights_T = _weights(choices, clip)
    terms_T = _robust_terms(rewards_T, weights_T, choices, q_TA)
    return _estimate(terms_T, np.ones(len(terms_T)), weights_T, choices, bootstrap)


def ips_rate(
    tokens_T: np.ndarray, seconds_T: np.ndarray, choices: Choices, *, bootstrap: Bootstrap, clip: float = math.inf
) -> Estimate:
    """Estimate tokens per second, sum(w tokens) / sum(w seconds).

    A server's rate is the ratio of the expectations: the mean of each tick's own rate weighs a short tick like a long
    one. The weights' sum cancels, so this is the self-normalised estimate as well.

    Args:
      tokens_T: that each tick emitted.
      seconds_T: that each tick took.
      choices: the logged ones, and the target's.
      bootstrap: of the interval.
      clip: largest weight.

    Raises:
      ValueError: the input cannot be that of a log, or the target would have made none of the logged choices.
    """
    weights_T = _weights(choices, clip)
    _check_seconds(seconds_T)
    _check_series(tokens_T=tokens_T, seconds_T=seconds_T, like_T=weights_T)
    return _estimate(weights_T * tokens_T, weights_T * seconds_T, weights_T, choices, bootstrap)


def doubly_robust_rate(
    tokens_T: np.ndarray,
    seconds_T: np.ndarray,
    choices: Choices,
    q_tokens_TA: np.ndarray,
    q_seconds_TA: np.ndarray,
    *,
    bootstrap: Bootstrap,
    clip: float = math.inf,
) -> Estimate:
    """Estimate tokens per second as the ratio of two doubly robust estimates; arguments as for those and `ips_rate`.

    Raises:
      ValueError: the input cannot be that of a log, or the estimated seconds are not positive.
    """
    weights_T = _weights(choices, clip)
    _check_seconds(seconds_T)
    tokens_T = _robust_terms(tokens_T, weights_T, choices, q_tokens_TA)
    seconds_T = _robust_terms(seconds_T, weights_T, choices, q_seconds_TA)
    return _estimate(tokens_T, seconds_T, weights_T, choices, bootstrap)


def _robust_terms(rewards_T: np.ndarray, weights_T: np.ndarray, choices: Choices, q_TA: np.ndarray) -> np.ndarray:
    if np.shape(q_TA) != np.shape(choices.target_probs_TA):
        raise ValueError(f"shapes differ: {np.shape(q_TA)=} {np.shape(choices.target_probs_TA)=}")
    _check_series(rewards_T=rewards_T, model_T=q_TA.sum(axis=1), like_T=weights_T)
    residual_T = rewards_T - q_TA[np.arange(len(rewards_T)), choices.arms_T]
    return (choices.target_probs_TA * q_TA).sum(axis=1) + weights_T * residual_T


def _estimate(
    numerator_T: np.ndarray, denominator_T: np.ndarray, weights_T: np.ndarray, choices: Choices, bootstrap: Bootstrap
) -> Estimate:
    """Estimate mean(numerator) / mean(denominator), which all estimators are, with its interval."""
    terms_T2 = np.column_stack([numerator_T, denominator_T])
    top, bottom = terms_T2.mean(axis=0)
    if not bottom > 0:
        raise ValueError(f"nothing to divide by ({bottom}): the target would have made none of the logged choices")
    means_R2 = resampled_means(terms_T2, bootstrap)
    defined_R = means_R2[:, 1] > 0
    values_R = means_R2[:, 0] / np.where(defined_R, means_R2[:, 1], 1.0)
    tail = (1 - bootstrap.level) / 2
    return Estimate(
        value=float(top / bottom),
        low=float(np.quantile(np.where(defined_R, values_R, -np.inf), tail, method="lower")),
        high=float(np.quantile(np.where(defined_R, values_R, np.inf), 1 - tail, method="higher")),
        effective_samples=float(weights_T.sum() ** 2 / max((weights_T**2).sum(), np.finfo(float).tiny)),
        unsupported_mass=_unsupported_mass(choices),
    )


def _weights(choices: Choices, clip: float) -> np.ndarray:
    """Give w_T.

    Raises:
      ValueError: the choices cannot be those of a log, or the clip is not positive.
    """
    arms_T, propensities_T, target_probs_TA = choices
    num_steps, num_arms = np.shape(target_probs_TA)
    if num_steps == 0 or np.shape(arms_T) != (num_steps,) or np.shape(propensities_T) != (num_steps,):
        raise ValueError(f"{np.shape(arms_T)=} {np.shape(propensities_T)=} {np.shape(target_probs_TA)=}")
    if not np.all((propensities_T > 0) & (propensities_T <= 1)):
        raise ValueError("a propensity is not in (0, 1]")
    if arms_T.dtype.kind not in "iu" or not np.all((arms_T >= 0) & (arms_T < num_arms)):
        raise ValueError(f"an arm is not one of {num_arms}")
    if not (np.all(target_probs_TA >= 0) and np.allclose(target_probs_TA.sum(axis=1), 1.0, rtol=0.0, atol=1e-6)):
        raise ValueError("the target's probabilities are not a distribution at every step")
    if not clip > 0:
        raise ValueError(f"{clip=} is not positive")
    return np.minimum(target_probs_TA[np.arange(num_steps), arms_T] / propensities_T, clip)


def _check_series(*, like_T: np.ndarray, **series: np.ndarray) -> None:
    for name, values_T in series.items():
        if np.shape(values_T) != like_T.shape or not np.all(np.isfinite(values_T)):
            raise ValueError(f"{name}: of shape {np.shape(values_T)} instead of {like_T.shape}, or not finite")


def _check_seconds(seconds_T: np.ndarray) -> None:
    if not np.all(seconds_T > 0):
        raise ValueError("a tick took no time")


def _unsupported_mass(choices: Choices) -> float:
    arms_T, propensities_T, target_probs_TA = choices
    absent_A = ~np.isin(np.arange(target_probs_TA.shape[1]), arms_T)
    of_chosen_T = target_probs_TA[np.arange(len(arms_T)), arms_T]
    beyond_T = np.where(propensities_T == 1.0, 1.0 - of_chosen_T, target_probs_TA[:, absent_A].sum(axis=1))
    return float(beyond_T.mean())
