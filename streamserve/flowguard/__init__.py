"""FlowGuard: routing over stream pairs."""

from streamserve.flowguard import routers
from streamserve.flowguard.route_log import LoggedRoute, RouteLog, read_routes, replay_routes
from streamserve.flowguard.router import FlowGuard
from streamserve.flowguard.routers import MakeRouter
from streamserve.flowguard.signals import (
    Ask,
    Objective,
    Route,
    RouteContext,
    RouteOutcome,
    is_good,
    utility,
)

__all__ = [
    "Ask",
    "FlowGuard",
    "LoggedRoute",
    "MakeRouter",
    "Objective",
    "Route",
    "RouteContext",
    "RouteLog",
    "RouteOutcome",
    "is_good",
    "read_routes",
    "replay_routes",
    "routers",
    "utility",
]
