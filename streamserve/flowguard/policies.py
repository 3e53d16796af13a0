"""Routing policies: pure `Policy` triples over the context of `signals.context`, one arm a lane."""

import numpy as np

from streamserve.bandits import Decision, Policy
from streamserve.flowguard.signals import ELIGIBLE


def round_robin(num_lanes: int) -> Policy:
    """Take the lanes in turn, passing over those that may not take the request."""

    def init() -> int:
        return 0  # the lane whose turn it is

    def choose(turn: int, context_AF: np.ndarray, noise_A2: np.ndarray) -> tuple[Decision, int]:
        del noise_A2
        order_A = (turn + np.arange(num_lanes)) % num_lanes
        arm = int(order_A[np.argmax(context_AF[order_A, ELIGIBLE] > 0)])
        return Decision(arm=arm, propensity=1.0), (arm + 1) % num_lanes

    def update(turn: int, context_AF: np.ndarray, decision: Decision, reward: float) -> int:
        del context_AF, decision, reward
        return turn

    return Policy(init=init, choose=choose, update=update)
