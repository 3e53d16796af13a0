"""Charts of a report as plain data. Their titles, legends and captions are text of the page; axes have units.

It knows nothing of how charts are drawn.
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_COLORS = 8  # of series; further ones repeat them, dashed
MAX_POINTS = 200  # of a curve: more cannot be told apart in a card, and make the page slow


class Kind(enum.Enum):
    """How a series is drawn. STACK is bars on top of those before."""

    LINE = "line"
    STEP = "step"
    DOTS = "dots"
    JOINED = "joined"
    BARS = "bars"
    STACK = "stack"


class Axis(NamedTuple):
    """An axis.

    Attributes:
      label: what it measures, and the unit in parentheses.
      log: logarithmic.
      low: where it begins; None to fit.
      high: where it ends; None to fit.
      whole: only whole numbers are marked.
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    whole: bool = False


class Series(NamedTuple):
    """A curve.

    Attributes:
      label: for the legend.
      x: float [n].
      y: float [n].
      kind: how it is drawn.
      color: its place in the palette; from `NUM_COLORS` on dashed.
      right: it belongs to the axis on the right.
      width: of bars.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    kind: Kind = Kind.LINE
    color: int = 0
    right: bool = False
    width: float = 0.8


class Mark(NamedTuple):
    """A straight dashed line across a chart: a limit.

    Attributes:
      label: for the legend.
      value: where.
      vertical: at that x, not at that y.
    """

    label: str
    value: float
    vertical: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A chart as data.

    Attributes:
      title: what it shows.
      caption: one sentence: what is plotted, and of how many.
      x: its axis.
      y: the axis on the left.
      right: the axis on the right, if there is one.
      series: curves; at least one with a point.
      marks: limits.
    """

    title: str
    caption: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    right: Axis | None = None


def distribution(label: str, values: Sequence[float], color: int = 0) -> Series:
    """Draw the share of values, in percent, that are at most x; only quantiles where there are many."""
    ordered = np.sort(np.asarray(values, np.float64))
    share = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
    if len(ordered) > MAX_POINTS:
        kept = np.unique(np.linspace(0, len(ordered) - 1, MAX_POINTS).round().astype(int))
        ordered, share = ordered[kept], share[kept]
    return Series(label, np.concatenate([ordered[:1], ordered]), np.concatenate([[0.0], share]), Kind.STEP, color)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbours, as many together everywhere, so that at most `MAX_POINTS` points are left."""
    together = -(-len(x) // MAX_POINTS)
    if together <= 1:
        return x, y
    begins = np.arange(0, len(x), together)
    counts = np.diff(begins, append=len(x))
    return np.add.reduceat(x, begins) / counts, np.add.reduceat(y, begins) / counts
