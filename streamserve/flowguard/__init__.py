"""FlowGuard: routing over stream pairs."""

from streamserve.flowguard.policies import round_robin
from streamserve.flowguard.router import FlowGuard

__all__ = ["FlowGuard", "round_robin"]
