"""`flowguard_paper`: FlowGuard as the StreamServe paper (arXiv 2604.09562) is reported to have it, defects included.

No code was released, and its weights and thresholds are not public. Reported are the signals, queue depth, memory
pressure and violations of the TTFT objective; that equation 3 divides the memory signal by 100 although it lies in
[0, 1], so that memory counts for next to nothing; and that nothing is learnt. The weights are ours.
"""

import numpy as np

from streamserve.bandits import Policy
from streamserve.flowguard.routers.picking import by_cost, outstanding
from streamserve.flowguard.signals import RouteContext

_PERCENT = 100.0  # equation 3 takes M for a percentage


def flowguard_paper(
    num_lanes: int, *, queue_weight: float = 0.4, memory_weight: float = 0.3, violation_weight: float = 0.3
) -> Policy:
    """Take the lane of the least load score.

    Args:
      num_lanes: A.
      queue_weight: of outstanding requests a slot.
      memory_weight: of the fraction of pages in use, over 100.
      violation_weight: of whether the recent time to first token exceeds the objective.
    """
    del num_lanes

    def cost(context: RouteContext) -> np.ndarray:
        depth_A = outstanding(context) / np.maximum(context.slots_A, 1)
        memory_A = 1 - context.free_pages_A / np.maximum(context.pages_A, 1)
        violated_A = context.ttft_s_A > context.objective.ttft_s
        return queue_weight * depth_A + memory_weight * memory_A / _PERCENT + violation_weight * violated_A

    return by_cost(cost)
