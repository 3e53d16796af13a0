"""What FlowGuard sees of the lanes: one immutable snapshot per lane, laid out as a float32 array."""

from collections.abc import Sequence

import numpy as np

from streamserve.types import LaneStats

# Columns of the context [A, F], one row a lane. `eligible` comes first: a router must not choose a lane without it.
SIGNALS = (
    "eligible",
    "free_slots",
    "free_pages",
    "running",
    "in_transit",
    "queued_prefill_tokens",
    "accepted_per_step",
)
ELIGIBLE = SIGNALS.index("eligible")


def context(lanes: Sequence[LaneStats], eligible: Sequence[bool]) -> np.ndarray:
    """Lay out the snapshots for a policy.

    Args:
      lanes: one snapshot a lane, taken now.
      eligible: which lanes may take the request.

    Returns:
      float32 [A, F], columns as in `SIGNALS`, each in the unit of its `LaneStats` field.
    """
    rows = [
        [
            may,
            lane.free_slots,
            lane.free_pages,
            lane.running,
            lane.in_transit,
            lane.queued_prefill_tokens,
            lane.accepted_per_step,
        ]
        for lane, may in zip(lanes, eligible, strict=True)
    ]
    return np.asarray(rows, np.float32)
