"""Virtual time: a clock that passes only when somebody waits, what runs in order on it, and what that takes.

It knows nothing of requests.
"""

import dataclasses
import heapq


class VirtualClock:
    """Seconds that pass only when somebody waits."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._events: list[float] = []

    def __call__(self) -> float:
        """Tell the time."""
        return self._now_s

    def expect(self, when_s: float) -> None:
        """Let naps end at this moment: something happens then."""
        heapq.heappush(self._events, when_s)

    def nap(self, seconds: float) -> None:
        """Let time pass until the next event, and for so many seconds at most: how a loop waits."""
        while self._events and self._events[0] <= self._now_s:
            heapq.heappop(self._events)
        end_s = self._now_s + seconds
        self._now_s = min(end_s, self._events[0]) if self._events else end_s

    def sleep(self, seconds: float) -> None:
        """Let so many seconds pass, whatever happens meanwhile."""
        self._now_s += seconds

    def wait_until(self, when_s: float) -> None:
        """Let time pass until then; it may have already."""
        self._now_s = max(self._now_s, when_s)


class InOrder:
    """A mesh, or the way between two: one piece of work after the other."""

    def __init__(self, clock: VirtualClock):
        self._clock = clock
        self._end_s = 0.0
        self.busy_s = 0.0  # work so far, that which is dispatched included

    def run(self, seconds: float, *, after_s: float = 0.0) -> float:
        """Dispatch work that cannot begin before `after_s`; gives when it is done."""
        self._end_s = max(self._clock(), self._end_s, after_s) + seconds
        self.busy_s += seconds
        self._clock.expect(self._end_s)
        return self._end_s

    def clear(self) -> None:
        """Lose what is under way."""
        self.busy_s -= max(0.0, self._end_s - self._clock())
        self._end_s = min(self._end_s, self._clock())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LaneCosts:
    """What the work of a stream pair takes; what a round of decoding takes is a `CostTable`'s to say.

    Attributes:
      prefill_fixed_s: seconds of a prefill call,
      prefill_token_s: and for each token that its program has room for.
      tick_fixed_s: seconds of a tick besides its rounds.
      transfer_fixed_s: seconds of a hand-off,
      transfer_bytes_per_s: and bytes a second of it.
      token_bytes: bytes of keys and values of a token.
    """

    prefill_fixed_s: float
    prefill_token_s: float
    tick_fixed_s: float
    transfer_fixed_s: float
    transfer_bytes_per_s: float
    token_bytes: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"costs.{field.name} must not be negative, got {getattr(self, field.name)}")
        if not self.transfer_bytes_per_s > 0:
            raise ValueError(f"costs.transfer_bytes_per_s must be positive, got {self.transfer_bytes_per_s}")

    def call_s(self, tokens: int) -> float:
        """Seconds of a prefill call whose program has room for so many tokens."""
        return self.prefill_fixed_s + self.prefill_token_s * tokens

    def transfer_s(self, num_bytes: float) -> float:
        """Seconds of a hand-off."""
        return self.transfer_fixed_s + num_bytes / self.transfer_bytes_per_s
