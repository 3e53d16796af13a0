"""What a depth policy sees, decides and learns from. Numpy only; it knows nothing of devices, requests or clocks.

A depth policy is a `bandits.Policy` with one arm a compiled depth: `choose(state, DepthContext, noise_A2) -> (Plan,
state)` and `update(state, DepthContext, Plan, StepStats) -> state`. One plan holds for a tick of several rounds. Since
one tick runs while the next is planned, feedback is one tick old at best.
"""

import enum
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from streamserve.bandits import Policy

NOT_RUN = -1  # in the counts of a `StepStats`: the row did not take part in that round


class StopRule(enum.IntEnum):
    """When a row stops drafting within a round, by what its draft knows; never by a token it decides about.

    With q the draft's softmax at a position (temperature 1 for greedy rows):
      CONFIDENCE: after a drafted token whose probability q(token) is below the threshold: the next one is not drafted
        (the rule of Hugging Face's assisted generation).
      ENTROPY: before a position where 1 - sqrt(0.2 H(q)) is below the threshold, H in nats (AdaEDL, arXiv 2410.18351).
    """

    NEVER = 0
    CONFIDENCE = 1
    ENTROPY = 2


class DepthContext(NamedTuple):
    """What is known when a tick is planned. A arms, B decode slots.

    Attributes:
      tiers_A: int, ascending: arm a drafts at most `tiers_A[a]` tokens a round; 0 is plain decoding.
      holder_B: int, who holds each slot, as a number that is never used again; NOT_RUN where nobody does.
      cost_A: s, predicted time of one round at each arm, at the present batch and context length.
      draft_A: s, the part of it that is drafting.
      switch_A: s, predicted one-off price of running each arm now, given which one ran last.
      previous: arm of the plan before; -1 at the beginning.
      waiting: requests that wait for a lane.
      in_transit: requests of this lane between admission and a slot.
      free_pages: fraction of the decode mesh's pages that nobody owns.
      mean_length: tokens in the cache of a running request, the mean.
      cached: fraction of the running requests' prompt tokens that came from the prefix cache.
      acceptance_K: true probability that each drafted position is accepted if those before it are. Only where outcomes
        are synthetic, and only for the oracle; None otherwise.
    """

    tiers_A: np.ndarray
    holder_B: np.ndarray
    cost_A: np.ndarray
    draft_A: np.ndarray
    switch_A: np.ndarray
    previous: int = -1
    waiting: int = 0
    in_transit: int = 0
    free_pages: float = 1.0
    mean_length: float = 0.0
    cached: float = 0.0
    acceptance_K: np.ndarray | None = None

    @property
    def batch(self) -> int:
        """Slots that are held."""
        return int(np.count_nonzero(self.holder_B != NOT_RUN))


class Plan(NamedTuple):
    """How a tick drafts: a depth policy's decision.

    Attributes:
      arm: which compiled depth runs.
      propensity: probability in (0, 1] with which this arm was chosen.
      depth_B: int32, most tokens that each slot drafts a round, at most the depth of the arm.
      rule: when a row stops drafting earlier.
      threshold: of the rule.
      wants_divergence: measure the divergence between target and draft, which costs a softmax of both.
    """

    arm: int
    propensity: float
    depth_B: np.ndarray
    rule: StopRule = StopRule.NEVER
    threshold: float = 0.0
    wants_divergence: bool = False


class StepStats(NamedTuple):
    """What came of a tick. B slots, R rounds; rows and rounds that did not run hold NOT_RUN.

    Attributes:
      drafted_BR: int, drafted tokens.
      accepted_BR: int, accepted ones.
      emitted_B: int, tokens that each slot emitted: what the tick was for.
      divergence_BR: mean KL(p || q) over the drafted positions, nats; 0 unless the plan wants it.
      seconds: what the tick took, measured.
    """

    drafted_BR: np.ndarray
    accepted_BR: np.ndarray
    emitted_B: np.ndarray
    divergence_BR: np.ndarray
    seconds: float

    @property
    def ran_BR(self) -> np.ndarray:
        """Which rounds of which rows ran."""
        return self.drafted_BR != NOT_RUN

    @property
    def rounds(self) -> int:
        """Rounds that ran, of any row."""
        return sum(map(any, self.ran_BR.T.tolist()))

    @property
    def row_rounds(self) -> int:
        """Verifications: rounds, summed over the rows that took part."""
        return int(np.count_nonzero(self.ran_BR))


MakeDepthPolicy = Callable[[tuple[int, ...], int], Policy]  # (tiers, slots) -> policy


def whole(context: DepthContext, arm: int, propensity: float = 1.0) -> Plan:
    """Plan the whole depth of an arm for every slot.

    Args:
      context: of the choice.
      arm: the choice.
      propensity: probability with which it was chosen.

    Raises:
      ValueError: there is no such arm.
    """
    if not 0 <= arm < len(context.tiers_A):
        raise ValueError(f"the depth policy chose arm {arm}; there are {len(context.tiers_A)}, from 0")
    depth_B = np.array([int(context.tiers_A[arm])] * len(context.holder_B), np.int32)
    return Plan(arm=int(arm), propensity=float(propensity), depth_B=depth_B)


def expected_tokens(acceptance_K: np.ndarray, tiers_A: np.ndarray) -> np.ndarray:
    """Expected tokens of one round of one row at each depth, the token after the draft included.

    1 + sum over k <= K of the product of the first k acceptances; (1 - a^(K+1)) / (1 - a) where all equal a (Leviathan
    et al., arXiv 2211.17192, equation 1).

    Args:
      acceptance_K: probability that each position is accepted if those before it are, up to the largest depth at least.
      tiers_A: depths.

    Returns:
      float [A].
    """
    survival = np.concatenate([[0.0], np.cumsum(np.cumprod(acceptance_K))])
    return 1.0 + survival[tiers_A]
