"""What stream pairs have counted since they were made. Counts outlive the book of a lane, see `Lane`."""

from collections.abc import Iterable
from typing import Any


class LaneCounters:
    """Counts of one lane, or of several together."""

    def __init__(self) -> None:
        self.ticks = 0
        self.prefill_calls = 0
        self.arrivals = 0  # prompts that were sent from the prefill to the decode mesh
        self.local_prefills = 0  # requests that were computed there, though there is a prefill mesh
        self.kv_transfers = 0  # of them, those whose pages had to move
        self.kv_transfer_pages = 0
        self.kv_transfer_bytes = 0
        self.transfer_retries = 0
        self.preemptions = 0
        self.resets = 0

    def sent(self, item: Any) -> None:
        """Count a request that starts for the decode mesh; `item` is what `pair_protocol.Pair` gives for it."""
        local = item.task is not None and item.task.local
        self.arrivals += item.task is not None and not local
        self.local_prefills += local
        self.kv_transfers += bool(item.transfer_pages)
        self.kv_transfer_pages += item.transfer_pages
        self.kv_transfer_bytes += item.transfer_bytes


def total(counters: Iterable[LaneCounters]) -> LaneCounters:
    """Sum counters."""
    together = LaneCounters()
    for one in counters:
        for name, value in vars(one).items():
            setattr(together, name, getattr(together, name) + value)
    return together
