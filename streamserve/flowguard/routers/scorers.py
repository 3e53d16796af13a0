"""Scores of lanes, each in [0, 1], more is better: the building blocks of weighted sums. All are [A].

The family is llm-d's (its endpoint-picker scorers); a score that compares lanes does so among the eligible ones.
"""

import numpy as np

from streamserve.flowguard.predict import Prediction
from streamserve.flowguard.routers.picking import outstanding
from streamserve.flowguard.signals import RouteContext


def prefix(context: RouteContext) -> np.ndarray:
    """Part of the prompt that the prefix cache holds."""
    return np.clip(context.hit_tokens_A / context.prompt_tokens, 0, 1)


def pages(context: RouteContext) -> np.ndarray:
    """Part of the pages of the decode mesh that is free."""
    return np.clip(context.free_pages_A / np.maximum(context.pages_A, 1), 0, 1)


def slots(context: RouteContext) -> np.ndarray:
    """Part of the slots that is neither held nor promised to a request on its way."""
    return np.clip(1 - outstanding(context) / np.maximum(context.slots_A, 1), 0, 1)


def queue(context: RouteContext) -> np.ndarray:
    """How short the queue is, between the longest, 0, and the shortest, 1; 1 where all are alike."""
    waiting_A = context.waiting_A
    of = waiting_A[context.eligible_A]
    least, most = (of.min(), of.max()) if of.size else (0.0, 0.0)
    return np.ones(len(waiting_A)) if most == least else np.clip((most - waiting_A) / (most - least), 0, 1)


def acceptance(context: RouteContext) -> np.ndarray:
    """Tokens of a verification step beside the most that its depth allows: how far speculation can be relied on."""
    return np.clip((1 + context.accepted_A) / (1 + np.maximum(context.depth_A, context.accepted_A)), 0, 1)


def ttft(context: RouteContext, predicted: Prediction) -> np.ndarray:
    """How much of the objective the predicted time to first token leaves: 1/2 where it is just met."""
    limit_s = context.objective.ttft_s
    return limit_s / (limit_s + context.waited_s + predicted.ttft_s_A)


def tpot(context: RouteContext, predicted: Prediction) -> np.ndarray:
    """The same of the predicted time per output token."""
    limit_s = context.objective.tpot_s
    return limit_s / (limit_s + predicted.tpot_s_A)
