"""Linear models of what an arm earns in a context, for doubly robust estimates. T steps, A arms, D features."""

import numpy as np


def fit_linear(
    features_TD: np.ndarray, arms_T: np.ndarray, rewards_T: np.ndarray, *, num_arms: int, ridge: float, folds: int
) -> np.ndarray:
    """Fit a ridge regression an arm, and predict each step by the ones fitted without it (cross-fitting).

    Folds are runs of consecutive steps: a step's neighbours, correlated with it, are mostly left out together with it.
    Features are scaled to unit variance; intercepts are not penalised. An arm that no step of a fit chose gets the mean
    reward.

    Args:
      features_TD: of the contexts.
      arms_T: int, chosen arms.
      rewards_T: of these.
      num_arms: A.
      ridge: penalty of the squared coefficients, positive.
      folds: at least 2.

    Returns:
      q_TA, float, predicted rewards.

    Raises:
      ValueError: shapes differ, or there are fewer steps than folds.
    """
    num_steps = len(rewards_T)
    if not (ridge > 0 and 2 <= folds <= num_steps):
        raise ValueError(f"impossible fit: {ridge=} {folds=} {num_steps=}")
    if np.shape(arms_T) != (num_steps,) or len(features_TD) != num_steps:
        raise ValueError(f"shapes differ: {np.shape(features_TD)=} {np.shape(arms_T)=} {num_steps=}")
    spread_D = features_TD.std(axis=0)
    scaled_TD = (features_TD - features_TD.mean(axis=0)) / np.where(spread_D > 0, spread_D, 1.0)
    inputs_TD = np.column_stack([np.ones(num_steps), scaled_TD])
    q_TA = np.empty((num_steps, num_arms))
    for held_out in np.array_split(np.arange(num_steps), folds):
        seen_T = np.ones(num_steps, bool)
        seen_T[held_out] = False
        for arm in range(num_arms):
            rows_T = seen_T & (arms_T == arm)
            if rows_T.any():
                q_TA[held_out, arm] = inputs_TD[held_out] @ _ridge(inputs_TD[rows_T], rewards_T[rows_T], ridge)
            else:
                q_TA[held_out, arm] = rewards_T[seen_T].mean()
    return q_TA


def _ridge(inputs_TD: np.ndarray, outputs_T: np.ndarray, ridge: float) -> np.ndarray:
    """Fit coefficients [D]; the first is the intercept."""
    penalty_D = np.full(inputs_TD.shape[1], ridge)
    penalty_D[0] = 0.0
    return np.linalg.solve(inputs_TD.T @ inputs_TD + np.diag(penalty_D), inputs_TD.T @ outputs_T)
