"""Routers of other systems, as far as their sources are public, with their defaults unless it is said otherwise."""

import numpy as np

from streamserve.bandits import Policy
from streamserve.flowguard.predict import predict
from streamserve.flowguard.routers import scorers
from streamserve.flowguard.routers.picking import by_cost, outstanding, pick_least, stateless
from streamserve.flowguard.signals import Route, RouteContext


def prefix_aware(
    num_lanes: int, *, threshold: float = 0.5, balance_abs: float = 32, balance_rel: float = 1.1
) -> Policy:
    """Follow SGLang's cache-aware rule: balance when loads differ much, else go where the prompt is known best.

    The numbers are those of `CacheAwareConfig` in its Rust gateway; later documents have 0.3, 64 and 1.5. SGLang keeps
    an approximate tree in the router, and goes to the smallest one where a prompt is hardly known; here the caches
    themselves are asked, and then the least loaded lane is taken. With few slots a lane the loads hardly ever differ by
    32, so that it is mostly the prefix that decides.

    Args:
      num_lanes: A.
      threshold: fraction of the prompt that must be known for its place to count.
      balance_abs: requests by which loads must differ,
      balance_rel: and times, for them to be balanced.
    """
    del num_lanes

    def choose(context: RouteContext, noise_A2: np.ndarray) -> Route:
        load_A, match_A = outstanding(context), scorers.prefix(context)
        most, least = load_A[context.eligible_A].max(), load_A[context.eligible_A].min()
        uneven = most - least > balance_abs and most > balance_rel * least
        if uneven or not match_A[context.eligible_A].max() > threshold:
            return pick_least(load_A, context, noise_A2)
        return pick_least(-match_A, context, noise_A2)

    return stateless(choose)


def kv_cost(
    num_lanes: int, *, prefill_scale: float = 1.0, request_weight: float = 0.0, block_tokens: float = 64.0
) -> Policy:
    """Follow Dynamo's KV router: prompt blocks to be computed, plus blocks that decoding holds.

    Args:
      num_lanes: A.
      prefill_scale: of the blocks that are to be computed, what is queued included.
      request_weight: blocks that a request on the lane counts for.
      block_tokens: of a block.
    """
    del num_lanes

    def cost(context: RouteContext) -> np.ndarray:
        new_A = np.maximum(context.prompt_tokens + context.queued_tokens_A - context.hit_tokens_A, 0)
        held_A = (context.pages_A - context.free_pages_A) * context.page_tokens_A
        return (prefill_scale * new_A + held_A) / block_tokens + request_weight * outstanding(context)

    return by_cost(cost)


def min_latency(num_lanes: int) -> Policy:
    """Follow Mooncake (arXiv 2407.00079, algorithm 1): least queue + prefill + transfer.

    Where a lane has measured nothing yet, its part counts as nothing, and of lanes alike the less loaded one is taken.
    Mooncake's copies of hot prefixes and its early rejection are left out: neither is routing.
    """
    del num_lanes

    def cost(context: RouteContext) -> np.ndarray:
        of = predict(context)
        return of.queue_s_A + of.prefill_s_A + of.transfer_s_A + 1e-9 * outstanding(context)

    return by_cost(cost)


def weighted_scorers(num_lanes: int, *, queue: float = 2.0, pages: float = 2.0, prefix: float = 3.0) -> Policy:
    """Follow llm-d's endpoint picker: the largest weighted sum of scores.

    Args:
      num_lanes: A.
      queue: weight of the score of the queue,
      pages: of free pages,
      prefix: of the known part of the prompt.
    """
    del num_lanes

    def cost(context: RouteContext) -> np.ndarray:
        score_A = queue * scorers.queue(context) + pages * scorers.pages(context) + prefix * scorers.prefix(context)
        return -score_A

    return by_cost(cost)
