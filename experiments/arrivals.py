"""When requests arrive: drawn from a process, or as a trace recorded it. Pure functions of their arguments.

Times are seconds from the first arrival, which is at 0. Gaps between arrivals are gamma distributed as in `vllm bench
serve`: the shape is called burstiness, 1 makes a Poisson process, less makes bursts, and their coefficient of variation
is 1 / sqrt(burstiness). Unlike there, times are not stretched afterwards to fit the rate: the mean gap is 1 / rate in
expectation, and `measure` says what came out.
"""

import dataclasses
import enum
import math
from collections.abc import Sequence

import numpy as np


class RampUp(enum.Enum):
    """How the rate of arrivals grows over the requests of a run."""

    NONE = "none"
    LINEAR = "linear"
    EXPONENTIAL = "exponential"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pacing:
    """A process of arrivals.

    Attributes:
      request_rate: requests a second; infinite for all at once. Unused where the rate ramps up.
      burstiness: shape of the gamma distribution of gaps.
      ramp_up: how the rate grows.
      start_rps: rate of the first gap where it does, requests a second.
      end_rps: rate of the last one.
    """

    request_rate: float = math.inf
    burstiness: float = 1.0
    ramp_up: RampUp = RampUp.NONE
    start_rps: float | None = None
    end_rps: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
          ValueError: a value that makes no process; the message names it.
        """
        if not self.request_rate > 0:
            raise ValueError(f"request_rate must be positive, got {self.request_rate}")
        if not 0 < self.burstiness < math.inf:
            raise ValueError(f"burstiness must be positive and finite, got {self.burstiness}")
        given = [rate for rate in (self.start_rps, self.end_rps) if rate is not None]
        if self.ramp_up is RampUp.NONE:
            if given:
                raise ValueError("ramp_up_start_rps and ramp_up_end_rps need a ramp_up of linear or exponential")
            return
        if self.request_rate != math.inf:
            raise ValueError("ramp_up and request_rate exclude each other")
        if len(given) < 2 or not 0 < given[0] < given[1] < math.inf:
            raise ValueError(
                "ramp_up needs ramp_up_start_rps and ramp_up_end_rps, positive, finite and growing, "
                f"got {self.start_rps} and {self.end_rps}"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a sequence of arrivals turned out to be.

    Attributes:
      rate: requests a second between the first and the last arrival; None where they come at one moment.
      cv: coefficient of variation of the gaps; None where there is none, or all are 0.
    """

    rate: float | None
    cv: float | None


def draw(count: int, pacing: Pacing, seed: int) -> np.ndarray:
    """Draw arrivals; the first ones do not depend on how many follow, unless the rate ramps up.

    Args:
      count: how many.
      pacing: their process.
      seed: of the gaps.

    Returns:
      [count] float64, seconds, ascending from 0.
    """
    shapes = np.random.default_rng(seed).standard_gamma(pacing.burstiness, max(count - 1, 0))
    gaps_s = shapes / pacing.burstiness / _rates(len(shapes), pacing)
    return np.concatenate([np.zeros(min(count, 1)), np.cumsum(gaps_s)])


def replay(at_s: Sequence[float], time_scale: float) -> np.ndarray:
    """Take recorded arrivals.

    Args:
      at_s: recorded times in seconds, ascending, from any moment.
      time_scale: what they are multiplied by, positive; 2 halves the rate.

    Returns:
      float64, seconds, ascending from 0.
    """
    times_s = np.asarray(at_s, np.float64)
    return (times_s - times_s[:1]) * time_scale


def measure(arrivals_s: np.ndarray) -> Measured:
    """Measure the rate and the burstiness of arrivals, in ascending order."""
    gaps_s = np.diff(arrivals_s)
    total_s = float(gaps_s.sum())
    if not total_s > 0:
        return Measured(rate=None, cv=None)
    return Measured(rate=len(gaps_s) / total_s, cv=float(gaps_s.std() / gaps_s.mean()))


def _rates(gaps: int, pacing: Pacing) -> np.ndarray:
    """Rate at each gap, requests a second."""
    if pacing.ramp_up is RampUp.NONE:
        return np.full(gaps, pacing.request_rate)
    assert pacing.start_rps is not None, "the pacing has checked it"
    assert pacing.end_rps is not None, "the pacing has checked it"
    if pacing.ramp_up is RampUp.LINEAR:
        return np.linspace(pacing.start_rps, pacing.end_rps, gaps)
    return np.geomspace(pacing.start_rps, pacing.end_rps, gaps)
