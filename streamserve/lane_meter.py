"""What one stream pair has measured of late: exponential averages over its last ten or so events.

It knows times and counts, never requests or devices. What runs in order on a mesh begins when the one before it has
ended: the time of a call or a tick is counted from its dispatch or from there.
"""

import numpy as np

from streamserve.types import LanePace, StepOutput

_RATE = 0.1  # how much of the newest event an average takes over, once it has seen ten


class _Average:
    """An average of ratios: sums of both sides fade alike, so that large events weigh more."""

    def __init__(self) -> None:
        self._above = self._below = 0.0

    def add(self, above: float, below: float = 1.0) -> None:
        """Take in an event."""
        self._above += above - _RATE * self._above
        self._below += below - _RATE * self._below

    @property
    def value(self) -> float:
        """The average; 0 before the first event."""
        return self._above / self._below if self._below > 0 else 0.0


class LaneMeter:
    """Averages of one lane. Times are seconds of the loop's clock."""

    def __init__(self) -> None:
        """Begin without events."""
        self._last_tick_s: float | None = None
        self._prefill, self._transfer, self._bytes = _Average(), _Average(), _Average()
        self._tick, self._tokens, self._accepted, self._drafted = _Average(), _Average(), _Average(), _Average()
        self._decode, self._ttft, self._tpot = _Average(), _Average(), _Average()

    @property
    def tick_s(self) -> float:
        """Seconds of a tick; 0 before the first."""
        return self._tick.value

    def called(self, tokens: int, seconds: float) -> None:
        """Take in a prefill call of so many tokens."""
        self._prefill.add(seconds, tokens)

    def arrived(self, prompt_tokens: int, num_bytes: int, seconds: float) -> None:
        """Take in a hand-off."""
        self._bytes.add(num_bytes, prompt_tokens)
        if num_bytes:
            self._transfer.add(seconds, num_bytes)

    def ticked(self, output: StepOutput, rows: int, tokens: int, seconds: float, now_s: float) -> None:
        """Take in a tick of `rows` held slots, which emitted `tokens`."""
        self._last_tick_s = now_s
        self._tick.add(seconds)
        if tokens:  # a tick that only found out that its rows had ended says nothing of their pace
            self._tokens.add(tokens, rows)
        ran = output.drafted >= 0
        steps = int(np.count_nonzero(ran))
        if steps:
            self._accepted.add(float(output.accepted[ran].sum()), steps)
            self._drafted.add(float(output.drafted[ran].sum()), steps)

    def held(self, seconds: float) -> None:
        """Take in how long a request has held its slot to its end."""
        self._decode.add(seconds)

    def ended(self, ttft_s: float, tpot_s: float) -> None:
        """Take in a request that was answered; `tpot_s` is 0 where it had one token."""
        self._ttft.add(ttft_s)
        if tpot_s > 0:
            self._tpot.add(tpot_s)

    def pace(self, now_s: float) -> LanePace:
        """Take a snapshot."""
        return LanePace(
            prefill_s_per_token=self._prefill.value,
            transfer_s_per_byte=self._transfer.value,
            transfer_bytes_per_token=self._bytes.value,
            tick_s=self._tick.value,
            tokens_per_tick=self._tokens.value,
            accepted_per_step=self._accepted.value,
            drafted_per_step=self._drafted.value,
            decode_s=self._decode.value,
            ttft_s=self._ttft.value,
            tpot_s=self._tpot.value,
            idle_s=0.0 if self._last_tick_s is None else max(0.0, now_s - self._last_tick_s),
        )
