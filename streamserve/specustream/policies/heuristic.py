"""Two more after a success, one fewer after a failure."""

from typing import NamedTuple

import numpy as np

from streamserve.bandits import Policy
from streamserve.specustream.depth import NOT_RUN, DepthContext, Plan, StepStats
from streamserve.specustream.policies.plans import cover


class HeuristicState(NamedTuple):
    """Depth of each slot.

    Attributes:
      holder_B: int64, whose depth it is.
      depth_B: int64, tokens a round.
    """

    holder_B: np.ndarray
    depth_B: np.ndarray


def heuristic(tiers: tuple[int, ...], slots: int, *, start: int = 5, up: int = 2, down: int = 1) -> Policy:
    """Change each slot's depth by how its rounds went: K + up if all was accepted, else max(1, K - down).

    The `heuristic` schedule of Hugging Face's assisted generation, which is for one row. A tick changes K by the sum
    over its rounds; K stays within the deepest tier, and a new request begins anew.

    Args:
      tiers: depths of the arms.
      slots: B.
      start: tokens a round of a new request.
      up: tokens more after a round that accepted all it drafted.
      down: tokens fewer after one that did not.
    """
    most = tiers[-1]
    least = min(1, most)

    def init() -> HeuristicState:
        return HeuristicState(np.full(slots, NOT_RUN, np.int64), np.full(slots, start, np.int64))

    def choose(state: HeuristicState, context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, HeuristicState]:
        del noise_A2
        depth_B = np.where(state.holder_B == context.holder_B, state.depth_B, start)
        depth_B = np.minimum(np.maximum(depth_B, least), most)
        return cover(context, depth_B), HeuristicState(np.array(context.holder_B, np.int64), depth_B)

    def update(state: HeuristicState, context: DepthContext, plan: Plan, stats: StepStats) -> HeuristicState:
        del plan
        drew_BR = stats.drafted_BR > 0
        all_BR = stats.accepted_BR >= stats.drafted_BR
        change_B = up * (drew_BR & all_BR).sum(axis=1) - down * (drew_BR & ~all_BR).sum(axis=1)
        depth_B = state.depth_B + change_B * (state.holder_B == context.holder_B)
        return state._replace(depth_B=np.minimum(np.maximum(depth_B, least), most))

    return Policy(init=init, choose=choose, update=update)
