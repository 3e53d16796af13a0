"""SpecuStream: plans every tick of one stream pair, and learns from what came of it.

It stands between the lane, which knows requests, and a depth policy, which is pure. It knows neither devices nor
requests: slots are numbers, and so are their holders.
"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from streamserve.bandits import HostPolicy, Policy
from streamserve.specustream.costs import CostTable
from streamserve.specustream.decision_log import DecisionLog
from streamserve.specustream.depth import NOT_RUN, DepthContext, Plan, StepStats, StopRule
from streamserve.specustream.step import READ_WIDTH
from streamserve.specustream.synthetic import AcceptanceProcess
from streamserve.types import EMPTY_TOKEN, StepOutput, StepPlan

_STALL = 8.0  # times the predicted one: a tick that took longer was not slow, the host was away


class LaneLoad(NamedTuple):
    """What a lane says of itself when it is about to dispatch a tick.

    Attributes:
      holders: who holds each slot that is held, as numbers that are never used again.
      waiting: requests that wait for a lane.
      in_transit: requests of this lane between admission and a slot.
      free_pages: fraction of the decode mesh's pages that nobody owns.
      mean_length: tokens of prompt and output of a running request, the mean.
      cached: fraction of the running requests' prompt tokens that came from the prefix cache.
    """

    holders: Mapping[int, int]
    waiting: int = 0
    in_transit: int = 0
    free_pages: float = 1.0
    mean_length: float = 0.0
    cached: float = 0.0


class Ticket(NamedTuple):
    """A planned tick: what runs, and what is needed to learn from it."""

    tier: int  # depth of the program
    step_plan: StepPlan  # numpy arrays of all slots
    slots: int  # how many the program runs over
    context: DepthContext
    plan: Plan
    chooser: object  # the policy that chose it, as long as it decides; None where the depth was pinned
    logged: int | None  # what the log calls it


class DraftWay(NamedTuple):
    """What the controller must know of the drafter and the verification.

    Attributes:
      catches_up: after ticks without drafts it reads what it missed, which takes time.
      process: draws what is accepted, where outcomes are synthetic; None where they are real.
    """

    catches_up: bool = False
    process: AcceptanceProcess | None = None


class SpecuStream:
    """The control loop over one lane's depth of speculation. The same seed and feedback give the same plans."""

    def __init__(
        self,
        policy: Policy,
        costs: CostTable,
        *,
        slots: int,
        rounds: int,
        seed: int = 0,
        lane: int = 0,
        way: DraftWay | None = None,
        log: DecisionLog | None = None,
    ):
        """Begin without knowledge.

        Args:
          policy: a depth policy over `costs.tiers`.
          costs: predicted times; a copy of them is refreshed with measured ones.
          slots: B.
          rounds: R, of a whole tick.
          seed: of the policy's and the synthetic process's random numbers.
          lane: index of the stream pair, for the log.
          way: of the drafter.
          log: takes every decision.
        """
        self._tiers = np.asarray(costs.tiers, np.int64)
        self._measured, self._slots, self._rounds, self._seed, self._lane = costs, slots, rounds, seed, lane
        self._way, self._log = way or DraftWay(), log
        self._pinned: tuple[int, int] | None = None
        self._tiers.setflags(write=False)
        self._missed: dict[int, int] = {}  # by holder: rounds in which it ran and nothing was drafted
        self.use(policy)

    def use(self, policy: Policy) -> None:
        """Let another policy decide from now on, as if nothing had been learnt; the ticks under way teach nobody."""
        self._policy = HostPolicy(policy, num_arms=len(self._tiers), seed=self._seed + self._lane)
        self._costs, self._previous = copy.deepcopy(self._measured), -1
        self._chooser, self._feedbacks = object(), 0
        if self._way.process is not None:
            self._process_state = self._way.process.init()
            self._process_noise = np.random.default_rng([self._seed, self._lane, 1])

    def stop_logging(self) -> None:
        """Log no further decisions; nobody is told of the ticks under way."""
        self._log, self._chooser = None, object()

    def pin(self, depth: int | None, *, tier: int | None = None) -> None:
        """Run every tick by the program of depth `tier`, drafting `depth` tokens; None lets the policy decide again.

        Raises:
          ValueError: no such program was compiled, or it cannot draft as much.
        """
        if depth is None:
            self._pinned = None
            return
        tier = depth if tier is None else tier
        if tier not in self._tiers:
            raise ValueError(f"no program of depth {tier} was compiled; there are {self._tiers.tolist()}")
        if not 0 <= depth <= tier:
            raise ValueError(f"a program of depth {tier} cannot draft {depth} tokens")
        self._pinned = (int(np.flatnonzero(self._tiers == tier)[0]), depth)

    def plan(self, load: LaneLoad, now_s: float) -> Ticket:
        """Plan the next tick.

        Args:
          load: of the lane; at least one slot is held.
          now_s: reading of the loop's clock, for the log.
        """
        slots = max(load.holders) + 1  # the program runs over all slots up to the last that is held
        context = self._context(load, slots)
        if self._pinned is None:
            plan, logged = self._policy.choose(context), None
            if self._log is not None:
                logged = self._log.choose(self._lane, context, plan, self._feedbacks, now_s)
        else:
            arm, depth = self._pinned
            plan, logged = Plan(arm, 1.0, np.full(self._slots, depth, np.int32)), None
        tier = int(self._tiers[plan.arm])
        self._previous = plan.arm
        if any(plan.depth_B[slot] for slot in load.holders):
            self._missed = dict.fromkeys(self._missed, 0)
        else:
            self._missed = {holder: missed + self._rounds for holder, missed in self._missed.items()}
        step_plan = StepPlan(
            depth=_array(np.int32, plan.depth_B),
            rule=_array(np.int32, plan.rule),
            threshold=_array(np.float32, plan.threshold),
            wants_divergence=_array(np.bool_, plan.wants_divergence),
            acceptance=self._acceptance(context),
        )
        chooser = self._chooser if self._pinned is None else None
        return Ticket(tier, step_plan, slots, context, plan, chooser, logged)

    def learn(self, ticket: Ticket, output: StepOutput, seconds: float, now_s: float) -> None:
        """Learn from a tick.

        Args:
          ticket: of its plan.
          output: on the host, of the slots that the program ran over.
          seconds: what it took.
          now_s: reading of the loop's clock, for the log.
        """
        plan, context = ticket.plan, ticket.context
        stats = _stats(output, self._slots, seconds)
        rounds = stats.rounds
        if len(self._tiers) > 1 and rounds:
            # What a row leaves out would make a round look cheap, and what a drafter catches up dear.
            whole = plan.rule == StopRule.NEVER and not np.count_nonzero(plan.depth_B != ticket.tier)
            if whole and not context.switch_A[plan.arm]:
                self._costs.observe(ticket.slots, context.mean_length, plan.arm, seconds / rounds)
            longest_s = float(_STALL * (rounds * context.cost_A[plan.arm] + context.switch_A[plan.arm]))
            if seconds > longest_s:
                stats = stats._replace(seconds=longest_s)
        if ticket.chooser is not self._chooser:
            return  # it was not this policy's choice
        self._policy.update(context, plan, stats)
        self._feedbacks += 1
        if self._log is not None and ticket.logged is not None:
            self._log.learn(ticket.logged, stats, now_s)

    def _context(self, load: LaneLoad, slots: int) -> DepthContext:
        cost_A, draft_A = self._costs.lookup(slots, load.mean_length)
        holder_B = np.array([load.holders.get(slot, NOT_RUN) for slot in range(self._slots)], np.int64)
        # Whoever comes into a slot brings a drafter that has read all.
        self._missed = {holder: self._missed.get(holder, 0) for holder in load.holders.values()}
        context = DepthContext(
            tiers_A=self._tiers,
            holder_B=holder_B,
            cost_A=cost_A,
            draft_A=draft_A,
            switch_A=self._switch_prices(draft_A),
            previous=self._previous,
            waiting=load.waiting,
            in_transit=load.in_transit,
            free_pages=load.free_pages,
            mean_length=load.mean_length,
            cached=load.cached,
        )
        for array in (holder_B, cost_A, draft_A, context.switch_A):
            array.setflags(write=False)  # a policy that changes what it sees would falsify its own log
        if self._way.process is None:
            return context
        acceptance_K, self._process_state = self._way.process.step(
            self._process_state, context.batch, self._process_noise.random(2)
        )
        return context._replace(acceptance_K=acceptance_K)

    def _switch_prices(self, draft_A: np.ndarray) -> np.ndarray:
        """Price what the drafter has to read before it can draft again: a pass of it costs about two of one token."""
        missed = max(self._missed.values(), default=0)
        if not self._way.catches_up or not missed:
            return np.zeros(len(self._tiers))
        passes = -(-missed // READ_WIDTH)
        return np.where(self._tiers > 0, 2.0 * passes * draft_A / np.maximum(self._tiers, 1), 0.0)

    def _acceptance(self, context: DepthContext) -> Any:
        if context.acceptance_K is None:
            return np.zeros(int(self._tiers[-1]), np.float32)
        return np.asarray(context.acceptance_K[: self._tiers[-1]], np.float32)


def _stats(output: StepOutput, slots: int, seconds: float) -> StepStats:
    """Widen a tick's output to all slots."""
    drafted: Any = output.drafted
    rows, rounds = drafted.shape
    # Column 0 is a first token, which prefill has computed.
    emitted: Any = (np.asarray(output.tokens)[:, 1:] != EMPTY_TOKEN).sum(axis=1)
    if rows == slots:
        accepted, divergence = output.accepted, output.divergence
        return StepStats(drafted, _array(None, accepted), emitted, _array(None, divergence), seconds)
    drafted_BR = np.full((slots, rounds), NOT_RUN, np.int32)
    accepted_BR = drafted_BR.copy()
    divergence_BR = np.zeros((slots, rounds), np.float32)
    emitted_B = np.zeros(slots, np.int64)
    drafted_BR[:rows], accepted_BR[:rows], divergence_BR[:rows] = drafted, output.accepted, output.divergence
    emitted_B[:rows] = emitted
    return StepStats(drafted_BR, accepted_BR, emitted_B, divergence_BR, seconds)


def _array(dtype: Any, value: Any) -> Any:
    return np.asarray(value, dtype)
