"""What routers share: the shape of one that learns nothing, and picks of the least cost."""

from collections.abc import Callable
from typing import Any

import numpy as np

from streamserve.bandits import Policy
from streamserve.flowguard.signals import Route, RouteContext, RouteOutcome

MakeRouter = Callable[[int], Policy]  # (lanes) -> policy


def outstanding(context: RouteContext) -> np.ndarray:
    """Count the requests that each lane has and has not answered, [A]."""
    return context.in_transit_A + context.running_A


def pick_least(cost_A: np.ndarray, context: RouteContext, noise_A2: np.ndarray) -> Route:
    """Pick the eligible lane of least cost, ties evenly at random.

    Args:
      cost_A: finite numbers.
      context: says who is eligible.
      noise_A2: of the choice.
    """
    cost_A = np.where(context.eligible_A, cost_A, np.inf)
    best = np.flatnonzero(cost_A == cost_A.min())
    return Route(int(best[int(noise_A2[0, 0] * len(best)) % len(best)]), 1.0 / len(best))


def stateless(choose: Callable[[RouteContext, np.ndarray], Route]) -> Policy:
    """Make a policy of a function `(context, noise_A2) -> Route`: it knows nothing and learns nothing."""

    def update(state: Any, context: RouteContext, route: Route, outcome: RouteOutcome) -> Any:
        del context, route, outcome
        return state

    return Policy(
        init=lambda: (),
        choose=lambda state, context, noise_A2: (choose(context, noise_A2), state),
        update=update,
    )


def by_cost(cost: Callable[[RouteContext], np.ndarray]) -> Policy:
    """Make a policy that picks the eligible lane of least `cost(context)`, [A]."""
    return stateless(lambda context, noise_A2: pick_least(cost(context), context, noise_A2))
