"""Routers that look at nothing, or at the number of requests alone."""

import numpy as np

from streamserve.bandits import Policy
from streamserve.flowguard.routers.picking import by_cost, outstanding, stateless
from streamserve.flowguard.signals import Route, RouteContext, RouteOutcome


def round_robin(num_lanes: int) -> Policy:
    """Take the lanes in turn, passing over those that may not take the request."""

    def init() -> int:
        return 0  # the lane whose turn it is

    def choose(turn: int, context: RouteContext, noise_A2: np.ndarray) -> tuple[Route, int]:
        del noise_A2
        order_A = (turn + np.arange(num_lanes)) % num_lanes
        arm = int(order_A[np.argmax(context.eligible_A[order_A])])
        return Route(arm), (arm + 1) % num_lanes

    def update(turn: int, context: RouteContext, route: Route, outcome: RouteOutcome) -> int:
        del context, route, outcome
        return turn

    return Policy(init=init, choose=choose, update=update)


def uniform(num_lanes: int) -> Policy:
    """Take any eligible lane, all with the same probability."""
    del num_lanes

    def choose(context: RouteContext, noise_A2: np.ndarray) -> Route:
        eligible = np.flatnonzero(context.eligible_A)
        return Route(int(eligible[int(noise_A2[0, 0] * len(eligible)) % len(eligible)]), 1.0 / len(eligible))

    return stateless(choose)


def least_outstanding(num_lanes: int) -> Policy:
    """Take the lane with the fewest requests that are not answered."""
    del num_lanes
    return by_cost(outstanding)


def power_of_two(num_lanes: int) -> Policy:
    """Look at two eligible lanes at random, and take the one with fewer outstanding requests.

    Mitzenmacher, "The power of two choices in randomized load balancing", 2001.
    """
    del num_lanes

    def choose(context: RouteContext, noise_A2: np.ndarray) -> Route:
        eligible, load_A = np.flatnonzero(context.eligible_A), outstanding(context)
        count = len(eligible)
        if count == 1:
            return Route(int(eligible[0]))
        first = int(noise_A2[0, 0] * count) % count
        second = (first + 1 + int(noise_A2[0, 1] * (count - 1)) % (count - 1)) % count
        one, other = eligible[first], eligible[second]
        arm = int(one if load_A[one] <= load_A[other] else other)  # of two alike, the one that was drawn first
        # Of count (count - 1) ordered pairs, the arm wins those with a busier one, and half of those with one alike.
        rest = eligible[eligible != arm]
        wins = 2 * np.count_nonzero(load_A[rest] > load_A[arm]) + np.count_nonzero(load_A[rest] == load_A[arm])
        return Route(arm, wins / (count * (count - 1)))

    return stateless(choose)
