"""FlowGuard: sends each request to one stream pair, and learns from what became of it.

It sees snapshots and outcomes, never the lanes or the requests themselves.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from streamserve.bandits import HostPolicy, Policy
from streamserve.flowguard import signals
from streamserve.flowguard.route_log import RouteLog
from streamserve.flowguard.signals import Ask, Objective, Route, RouteContext, RouteOutcome
from streamserve.types import LaneStats


class _Open(NamedTuple):
    """A decision whose outcome is not known."""

    context: RouteContext
    route: Route
    logged: int | None


class FlowGuard:
    """A routing policy behind a guard. The same seed, snapshots and outcomes give the same routes."""

    def __init__(
        self,
        make_policy: Callable[[int], Policy],
        *,
        num_lanes: int,
        seed: int,
        objective: Objective | None = None,
        log: RouteLog | None = None,
    ):
        """Build the policy.

        Args:
          make_policy: `num_lanes -> Policy` over `RouteContext`, `Route` and `RouteOutcome`.
          num_lanes: stream pairs, one arm each.
          seed: of the policy's random numbers.
          objective: what requests are to be answered within; None for a second and a tenth of one.
          log: takes every decision that stood.
        """
        self._make_policy, self._num_lanes, self._seed = make_policy, num_lanes, seed
        self._objective = Objective(ttft_s=1.0, tpot_s=0.1) if objective is None else objective
        self._log = log
        self.use(make_policy)

    def use(self, make_policy: Callable[[int], Policy]) -> None:
        """Let another policy decide from now on; the requests under way teach nobody."""
        self._policy = HostPolicy(make_policy(self._num_lanes), num_arms=self._num_lanes, seed=self._seed)
        self._proposed: tuple[str, RouteContext, Route] | None = None
        self._open: dict[str, _Open] = {}
        self._feedbacks = self._skipped = 0

    def stop_logging(self) -> None:
        """Log no further decisions."""
        self._log = None
        self._open = {name: one._replace(logged=None) for name, one in self._open.items()}

    def route(self, ask: Ask, lanes: Sequence[LaneStats], eligible: Sequence[bool]) -> Route:
        """Propose a lane for a request; the proposal stands when `begun` is called.

        Args:
          ask: the request.
          lanes: a snapshot of each lane.
          eligible: which of them may take it: up, and not full; at least one.

        Raises:
          ValueError: no lane is eligible, or the policy chose what it may not.
        """
        if not any(eligible):
            raise ValueError("no lane can take a request; the scheduler has to wait")
        context = signals.context(lanes, eligible, ask, self._objective)
        told = self._policy.propose(context)
        route = Route(int(told.arm), float(told.propensity), bool(told.local))
        if not 0 < route.propensity <= 1:
            raise ValueError(f"the routing policy chose lane {route.arm} with a propensity of {route.propensity}")
        if not 0 <= route.arm < len(eligible) or not eligible[route.arm]:
            may = ", ".join(str(lane) for lane, free in enumerate(eligible) if free)
            raise ValueError(
                f"the routing policy chose lane {route.arm}, which may not take the request (lanes that may: {may})"
            )
        if route.local and not context.local_A[route.arm]:
            raise ValueError(f"the routing policy chose lane {route.arm} to prefill where it decodes, but it cannot")
        self._skipped += self._proposed is not None
        self._proposed = (ask.request_id, context, route)
        return route

    def begun(self, now_s: float) -> None:
        """Let the latest proposal stand: the lane has taken the request.

        Args:
          now_s: reading of the loop's clock, for the log.
        """
        assert self._proposed is not None, "nothing was proposed"
        (request_id, context, route), self._proposed = self._proposed, None
        self._policy.commit()
        logged = None
        if self._log is not None:
            logged = self._log.choose(request_id, context, route, self._feedbacks, self._skipped, now_s)
        self._skipped = 0
        self._open[request_id] = _Open(context, route, logged)  # a request that is routed anew has one decision open

    def learn(self, request_id: str, outcome: RouteOutcome, now_s: float) -> None:
        """Learn what became of a request; one that was never routed teaches nothing.

        Args:
          request_id: whose.
          outcome: the end of it.
          now_s: reading of the loop's clock, for the log.
        """
        one = self._open.pop(request_id, None)
        if one is None:
            return
        self._policy.update(one.context, one.route, outcome)
        self._feedbacks += 1
        if self._log is not None and one.logged is not None:
            self._log.learn(one.logged, outcome, now_s)

    def withdraw(self, request_id: str) -> None:
        """Forget a request that was cancelled: its end says nothing of its lane."""
        self._open.pop(request_id, None)
