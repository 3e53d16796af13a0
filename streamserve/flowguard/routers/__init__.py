"""Routing policies: each is a file, or a function of one, and a line in `streamserve.parts.ROUTERS`.

A router is a `bandits.Policy` with one arm a lane: `choose(state, RouteContext, noise_A2) -> (Route, state)` and
`update(state, RouteContext, Route, RouteOutcome) -> state`. It must choose an eligible lane.
"""

from streamserve.flowguard.routers.flowguard import flowguard
from streamserve.flowguard.routers.paper import flowguard_paper
from streamserve.flowguard.routers.picking import MakeRouter, by_cost
from streamserve.flowguard.routers.published import kv_cost, min_latency, prefix_aware, weighted_scorers
from streamserve.flowguard.routers.simple import least_outstanding, power_of_two, round_robin, uniform

__all__ = [
    "MakeRouter",
    "by_cost",
    "flowguard",
    "flowguard_paper",
    "kv_cost",
    "least_outstanding",
    "min_latency",
    "power_of_two",
    "prefix_aware",
    "round_robin",
    "uniform",
    "weighted_scorers",
]
