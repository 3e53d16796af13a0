"""Confidence intervals for correlated series: Politis & Romano (1994), "The Stationary Bootstrap"."""

from typing import NamedTuple

import numpy as np


class Bootstrap(NamedTuple):
    """How an interval is made: resample blocks of consecutive steps (Politis & Romano 1994), take percentiles.

    Consecutive ticks share their requests, batch and caches, so their rewards are correlated; resampling single steps
    would pretend that they are not and give intervals that are too narrow.

    Attributes:
      mean_block: steps, mean length of a block, geometrically distributed; several times the correlation's length, and
        small beside T. 1 resamples single steps.
      seed: of the resamples.
      repeats: resamples.
      level: probability that the interval covers the value.
    """

    mean_block: float
    seed: int
    repeats: int = 1000
    level: float = 0.95


def resampled_means(terms_TC: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
    """Give the means of resamples made of blocks; blocks begin anywhere, and the last step is followed by the first.

    Args:
      terms_TC: T steps of C series, resampled together.
      bootstrap: how.

    Returns:
      float [R, C], a row a resample.

    Raises:
      ValueError: impossible settings.
    """
    num_steps = len(terms_TC)
    if not (bootstrap.mean_block >= 1 and bootstrap.repeats >= 1 and 0 < bootstrap.level < 1):
        raise ValueError(f"impossible: {bootstrap}")
    generator = np.random.default_rng(np.random.SeedSequence(bootstrap.seed))
    steps_T = np.arange(num_steps)
    means_RC = np.empty((bootstrap.repeats, terms_TC.shape[1]))
    for repeat in range(bootstrap.repeats):
        begins_T = generator.random(num_steps) * bootstrap.mean_block < 1
        begins_T[0] = True
        begin_T = np.maximum.accumulate(np.where(begins_T, steps_T, 0))  # of the block that each step is in
        source_T = generator.integers(num_steps, size=num_steps)[begin_T] + steps_T - begin_T
        means_RC[repeat] = terms_TC[source_T % num_steps].mean(axis=0)
    return means_RC
