"""Depth by the number of rows, from a table."""

import bisect

import numpy as np

from streamserve.bandits import Policy
from streamserve.specustream.depth import DepthContext, Plan, StepStats
from streamserve.specustream.policies.plans import cover


def batch_table(
    tiers: tuple[int, ...],
    slots: int,
    *,
    batches: tuple[int, ...] = (1, 5, 17, 33),
    depths: tuple[int, ...] = (5, 3, 1, 0),
) -> Policy:
    """Look the depth up by how many slots are held, as vLLM's table of speculative tokens by batch size does.

    vLLM takes the table from its user; these defaults are ours.

    Args:
      tiers: depths of the arms.
      slots: B.
      batches: rows from which each entry holds, ascending, the first one 1.
      depths: tokens a round at each entry; at most the deepest tier is drafted.

    Raises:
      ValueError: the table is not one.
    """
    del tiers
    if len(batches) != len(depths) or batches[:1] != (1,) or list(batches) != sorted(set(batches)):
        raise ValueError(f"a depth for each of ascending batches from 1, got {batches=} {depths=}")

    def init() -> tuple[()]:
        return ()

    def choose(state: tuple[()], context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, tuple[()]]:
        del noise_A2
        row = max(bisect.bisect_right(batches, context.batch) - 1, 0)
        return cover(context, np.full(slots, depths[row])), state

    def update(state: tuple[()], context: DepthContext, plan: Plan, stats: StepStats) -> tuple[()]:
        del context, plan, stats
        return state

    return Policy(init=init, choose=choose, update=update)
