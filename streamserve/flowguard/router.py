"""FlowGuard: sends each request to one stream pair. It sees snapshots, never the lanes themselves."""

from collections.abc import Callable, Sequence

from streamserve.bandits import HostPolicy, Policy
from streamserve.flowguard import signals
from streamserve.types import LaneStats


class FlowGuard:
    """A routing policy behind a guard."""

    def __init__(self, make_policy: Callable[[int], Policy], *, num_lanes: int, seed: int):
        """Build the policy.

        Args:
          make_policy: `num_lanes -> Policy` over the context of `signals.context`.
          num_lanes: stream pairs, one arm each.
          seed: of the policy.
        """
        self._policy = HostPolicy(make_policy(num_lanes), num_arms=num_lanes, seed=seed)

    def route(self, lanes: Sequence[LaneStats], eligible: Sequence[bool]) -> int:
        """Choose a lane for the next request.

        Args:
          lanes: a snapshot of each lane.
          eligible: which of them may take it; at least one.

        Returns:
          Index of the lane.

        Raises:
          ValueError: no lane is eligible, or the policy chose one that is not.
        """
        if not any(eligible):
            raise ValueError("no lane can take a request; the scheduler has to wait")
        if len(eligible) == 1:
            return 0
        arm = int(self._policy.choose(signals.context(lanes, eligible)).arm)
        if not 0 <= arm < len(eligible) or not eligible[arm]:
            raise ValueError(f"the routing policy chose lane {arm}, which may not take the request ({eligible=})")
        return arm
