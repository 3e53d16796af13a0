"""SpecuStream as its paper is reported to be, defects included: our reading, not the authors' code.

The paper (StreamServe, arXiv 2604.09562, SpecuStream, equations 8 to 12) gives neither code nor constants, and what is
public of its text is second-hand. What follows is what is reported; every constant is ours.

  - A running mean of accepted tokens a verification moves the depth: up over a threshold, down under a floor.
  - The history holds changes of acceptance, not the acceptance that the text speaks of.
  - The volatility term, the deviation of that history, raises the depth, which the text calls conservative.
  - Throughput follows a recurrence of its own and is never measured.
  - Speculation never stops: the smallest depth is 1. Load does not enter.

The last four are what `specustream` does otherwise.
"""

from typing import NamedTuple

import numpy as np

from streamserve.bandits import Policy
from streamserve.specustream.depth import DepthContext, Plan, StepStats, whole


class PaperState(NamedTuple):
    """What the policy knows. W changes.

    Attributes:
      depth: tokens, before volatility and throughput move it and rounding.
      mean: accepted tokens a verification, the running mean; -1 before the first tick.
      change_W: acceptance of each of the last ticks less that of the one before, as a fraction of the drafted tokens.
      fraction: accepted fraction of the drafted tokens at the last tick; -1 before the first.
      throughput: tokens a verification, by the recurrence.
    """

    depth: float
    mean: float
    change_W: np.ndarray
    fraction: float
    throughput: float


def specustream_paper(
    tiers: tuple[int, ...],
    slots: int,
    *,
    start: int = 4,
    window: int = 10,
    memory: float = 0.9,
    up: float = 0.8,
    down: float = 0.4,
    step: float = 1.0,
    volatility_gain: float = 2.0,
    throughput_gain: float = 0.1,
) -> Policy:
    """Build the policy.

    Args:
      tiers: depths, one an arm.
      slots: unused.
      start: tokens, the first depth.
      window: ticks in the history of changes, W.
      memory: fraction of the running means that a tick leaves.
      up: fraction of the depth; the depth rises where the mean of accepted tokens is above.
      down: fraction of the depth; it falls where the mean is below.
      step: tokens, by which it rises and falls.
      volatility_gain: tokens of depth that a standard deviation of 1 in the history adds.
      throughput_gain: tokens of depth that a token a verification of the recurrence adds.
    """
    del slots

    def init() -> PaperState:
        return PaperState(float(start), -1.0, np.zeros(window), -1.0, 1.0)

    def choose(state: PaperState, context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, PaperState]:
        del noise_A2
        volatility = float(state.change_W.std())
        wanted = state.depth + volatility_gain * volatility + throughput_gain * (state.throughput - 1)
        wanted = min(max(round(wanted), 1), tiers[-1])
        arm = int(np.searchsorted(context.tiers_A, wanted, side="right")) - 1
        smallest = min(int(np.searchsorted(context.tiers_A, 1)), len(tiers) - 1)
        return whole(context, max(arm, smallest)), state

    def update(state: PaperState, context: DepthContext, plan: Plan, stats: StepStats) -> PaperState:
        del context, plan
        drafted = int(stats.drafted_BR[stats.ran_BR].sum())
        if not drafted:
            return state
        accepted = int(stats.accepted_BR[stats.ran_BR].sum())
        fraction, each = accepted / drafted, accepted / stats.row_rounds
        mean = each if state.mean < 0 else memory * state.mean + (1 - memory) * each
        change = 0.0 if state.fraction < 0 else fraction - state.fraction
        depth = state.depth + step * ((mean > up * state.depth) - (mean < down * state.depth))
        return PaperState(
            depth=float(min(max(depth, 1.0), max(tiers[-1], 1))),
            mean=mean,
            change_W=np.append(state.change_W[1:], change),
            fraction=fraction,
            throughput=memory * state.throughput + (1 - memory) * (1 + mean),
        )

    return Policy(init=init, choose=choose, update=update)
