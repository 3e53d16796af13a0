"""What a routing policy sees: one immutable snapshot of all lanes, and of the request that is routed.

Counts are of the moment of the decision; what was measured is an exponential average over a lane's last ten or so
events (`types.LanePace`), 0 before the first one, and `idle_A` says how old it is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from streamserve.types import LaneStats


class Objective(NamedTuple):
    """What a request is to be answered within: its service-level objective.

    Attributes:
      ttft_s: time to first token, seconds from arrival.
      tpot_s: time per output token after the first, seconds.
    """

    ttft_s: float
    tpot_s: float


class Ask(NamedTuple):
    """The request that is routed.

    Attributes:
      request_id: its name.
      prompt_tokens: length of its prompt, at least 1.
      max_tokens: most tokens that it may emit.
      waited_s: seconds since its arrival.
      hit_tokens: for each lane, prompt tokens whose keys and values its prefix cache holds now.
      queue: requests that wait for a lane, this one included.
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    waited_s: float
    hit_tokens: tuple[int, ...]
    queue: int = 1


class RouteContext(NamedTuple):
    """What is known when a request is routed. A lanes; all arrays are float64 [A] unless it is said otherwise.

    Attributes:
      eligible_A: bool: up, and with room before its slots. A router must not choose another lane.
      local_A: bool: it can compute this prompt where it decodes it.
      slots_A: decode slots, at least 1.
      free_slots_A: of them, free ones.
      pages_A: pages of the decode mesh, at least 1.
      free_pages_A: of them, free ones.
      page_tokens_A: tokens that a page holds.
      waiting_A: requests whose prompt is not wholly taken by prefill calls.
      in_transit_A: requests between admission and a slot.
      running_A: requests in slots.
      queued_tokens_A: prompt tokens that are yet to be computed on the prefill mesh,
      local_queued_A: and on the decode mesh, where there are two.
      hit_tokens_A: tokens of this prompt in the lane's prefix cache, in [0, prompt_tokens).
      backlog_bytes_A: bytes of the hand-offs under way.
      prefill_s_A: s a prompt token.
      transfer_s_A: s a byte.
      token_bytes_A: bytes that a hand-off moves a prompt token.
      tick_s_A: s a tick.
      tick_tokens_A: tokens that a row emits in a tick.
      accepted_A: accepted draft tokens of a verification step.
      depth_A: drafted tokens of a verification step.
      decode_s_A: s that a request holds a slot.
      ttft_s_A: s, of requests that were served.
      tpot_s_A: s, likewise.
      idle_s_A: s since a tick was read.
      prompt_tokens: of the request.
      max_tokens: of the request.
      waited_s: s since its arrival.
      queue: requests that wait for a lane, this one included.
      objective: of the request.
    """

    eligible_A: np.ndarray
    local_A: np.ndarray
    slots_A: np.ndarray
    free_slots_A: np.ndarray
    pages_A: np.ndarray
    free_pages_A: np.ndarray
    page_tokens_A: np.ndarray
    waiting_A: np.ndarray
    in_transit_A: np.ndarray
    running_A: np.ndarray
    queued_tokens_A: np.ndarray
    local_queued_A: np.ndarray
    hit_tokens_A: np.ndarray
    backlog_bytes_A: np.ndarray
    prefill_s_A: np.ndarray
    transfer_s_A: np.ndarray
    token_bytes_A: np.ndarray
    tick_s_A: np.ndarray
    tick_tokens_A: np.ndarray
    accepted_A: np.ndarray
    depth_A: np.ndarray
    decode_s_A: np.ndarray
    ttft_s_A: np.ndarray
    tpot_s_A: np.ndarray
    idle_s_A: np.ndarray
    prompt_tokens: int
    max_tokens: int
    waited_s: float
    queue: int
    objective: Objective


class Route(NamedTuple):
    """A router's decision.

    Attributes:
      arm: the lane.
      propensity: probability in (0, 1] with which this lane, in this way, was chosen.
      local: prefill where it decodes, so that nothing has to move.
    """

    arm: int
    propensity: float = 1.0
    local: bool = False


class RouteOutcome(NamedTuple):
    """What came of a request.

    Attributes:
      answered: whether it was; the times below are 0 where it failed or timed out.
      ttft_s: s, from arrival.
      tpot_s: s a token after the first; 0 where there was one token.
      latency_s: s, from arrival to the last token.
      output_tokens: emitted.
    """

    answered: bool
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    latency_s: float = 0.0
    output_tokens: int = 0


def is_good(outcome: RouteOutcome, objective: Objective) -> bool:
    """Whether a request counts for goodput: answered within both limits."""
    return outcome.answered and outcome.ttft_s <= objective.ttft_s and outcome.tpot_s <= objective.tpot_s


def utility(outcome: RouteOutcome, objective: Objective) -> float:
    """Grade an outcome in [0, 1]: 1 for one that is good, else by how many times the worse limit was exceeded."""
    if not outcome.answered:
        return 0.0
    ratios = (outcome.ttft_s / objective.ttft_s, outcome.tpot_s / objective.tpot_s)
    return 1.0 / max(1.0, *ratios)


def context(lanes: Sequence[LaneStats], eligible: Sequence[bool], ask: Ask, objective: Objective) -> RouteContext:
    """Lay out snapshots for a policy.

    Args:
      lanes: one snapshot a lane, taken now.
      eligible: which lanes may take the request.
      ask: the request.
      objective: what it is to be answered within.
    """
    rows = [
        (
            *(lane.num_slots, lane.free_slots, lane.num_pages, lane.free_pages, lane.page_tokens),
            *(lane.waiting, lane.in_transit, lane.running),
            *(lane.queued_prefill_tokens, lane.queued_local_tokens, hit),
            *(lane.transfer_backlog_bytes, lane.pace.prefill_s_per_token, lane.pace.transfer_s_per_byte),
            *(lane.pace.transfer_bytes_per_token, lane.pace.tick_s, lane.pace.tokens_per_tick),
            *(lane.pace.accepted_per_step, lane.pace.drafted_per_step, lane.pace.decode_s),
            *(lane.pace.ttft_s, lane.pace.tpot_s, lane.pace.idle_s),
        )
        for lane, hit in zip(lanes, ask.hit_tokens, strict=True)
    ]
    columns = [
        np.array(eligible, bool),
        np.array([ask.prompt_tokens <= lane.local_tokens for lane in lanes], bool),
        *np.array(rows, np.float64).T,
    ]
    for column in columns:
        column.setflags(write=False)  # a policy that changes what it sees would falsify its own log
    return RouteContext(
        *columns,
        prompt_tokens=ask.prompt_tokens,
        max_tokens=ask.max_tokens,
        waited_s=ask.waited_s,
        queue=ask.queue,
        objective=objective,
    )
