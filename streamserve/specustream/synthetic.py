"""Known acceptance processes: what probability each drafted position has to be accepted, tick by tick.

With one of these a policy can be judged exactly, since what every depth would have brought is known. A process knows
how many rows run; it must not know what a policy chose. Forms that `parse` reads:

  iid:0.7                 every position is accepted with probability 0.7, always
  positions:0.9,0.7,0.5   by position; the last value continues to the deepest one
  regimes:0.9,0.2@200     all positions at one level, which changes at random; a level lasts 200 ticks in the mean
  drift:0.9,0.3@1000      a cosine between both levels, 1000 ticks from one high to the next
  load:0.9,0.3@8          linear in the rows held: 0.9 with one row, 0.3 with 8 and with more
  replay:PATH             JSON lines, each {"acceptance": [0.9, 0.7, ...]}, one a tick and from the beginning again
"""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

FORMS = (
    "iid:0.7",
    "positions:0.9,0.7,0.5",
    "regimes:0.9,0.2@200",
    "drift:0.9,0.3@1000",
    "load:0.9,0.3@8",
    "replay:PATH",
)


class AcceptanceProcess(NamedTuple):
    """A process of acceptance. It is pure and advances once a tick.

    Attributes:
      init: `() -> state`, a number.
      step: `(state, batch, noise_2) -> (acceptance_K, state)`. `batch` rows are held; `noise_2` are two independent
        uniform numbers in (0, 1). `acceptance_K` is float64, the probability that each position is accepted if those
        before it are; not to be written to.
    """

    init: Callable[[], Any]
    step: Callable[[Any, int, np.ndarray], tuple[np.ndarray, Any]]


def parse(text: str, max_depth: int) -> AcceptanceProcess:
    """Build the process that a text names, in one of the forms of this file's head.

    Args:
      text: for example "regimes:0.9,0.2@200".
      max_depth: positions, K.

    Raises:
      ValueError: unknown form, a probability outside [0, 1], or a file that does not hold what it should.
    """
    name, found, rest = text.partition(":")
    builders = {
        "iid": _iid,
        "positions": _positions,
        "regimes": _regimes,
        "drift": _drift,
        "load": _load,
        "replay": _replay,
    }
    if not found or name not in builders:
        raise ValueError(f"unknown acceptance process {text!r}; known forms: {', '.join(FORMS)}")
    if max_depth < 1:
        raise ValueError(f"{max_depth=} must be 1 or more")
    return builders[name](text, rest, max_depth)


def _iid(text: str, rest: str, max_depth: int) -> AcceptanceProcess:
    """Build a process with one constant level."""
    levels = _probabilities(text, rest.split(","))
    _check(len(levels) == 1, text, "wants one probability")
    return _cycle(np.full((1, max_depth), levels[0]))


def _positions(text: str, rest: str, max_depth: int) -> AcceptanceProcess:
    """Build a constant process with a level for each position."""
    return _cycle(_continued(_probabilities(text, rest.split(",")), max_depth)[None])


def _regimes(text: str, rest: str, max_depth: int) -> AcceptanceProcess:
    """Build a Markov chain over levels; it begins at the first and leaves each with probability 1/dwell a tick."""
    levels, dwell = _levels_at(text, rest)
    _check(len(levels) >= 2, text, "wants two probabilities or more")
    _check(dwell >= 1, text, "wants a dwell of one tick or more")
    table_LK = _frozen(np.repeat(np.array(levels)[:, None], max_depth, axis=1))

    def step(level: int, batch: int, noise_2: np.ndarray) -> tuple[np.ndarray, int]:
        del batch
        hop = 1 + int(noise_2[1] * (len(levels) - 1))  # to one of the others, all alike
        after = (level + min(hop, len(levels) - 1)) % len(levels) if noise_2[0] < 1 / dwell else level
        return table_LK[level], after

    return AcceptanceProcess(init=lambda: 0, step=step)


def _drift(text: str, rest: str, max_depth: int) -> AcceptanceProcess:
    """Build a cosine in time that begins at the first level."""
    levels, period = _levels_at(text, rest)
    _check(len(levels) == 2, text, "wants two probabilities")
    _check(period >= 2, text, "wants a period of two ticks or more")
    middle, swing = (levels[0] + levels[1]) / 2, (levels[0] - levels[1]) / 2

    def step(tick: int, batch: int, noise_2: np.ndarray) -> tuple[np.ndarray, int]:
        del batch, noise_2
        return np.full(max_depth, middle + swing * math.cos(2 * math.pi * tick / period)), tick + 1

    return AcceptanceProcess(init=lambda: 0, step=step)


def _load(text: str, rest: str, max_depth: int) -> AcceptanceProcess:
    """Build a process that depends on the rows held, as where a draft suffers from what else runs."""
    levels, full = _levels_at(text, rest)
    _check(len(levels) == 2, text, "wants two probabilities")
    _check(full > 1, text, "wants more than one row")

    def step(state: int, batch: int, noise_2: np.ndarray) -> tuple[np.ndarray, int]:
        del noise_2
        share = min(max((batch - 1) / (full - 1), 0.0), 1.0)
        return np.full(max_depth, levels[0] + share * (levels[1] - levels[0])), state

    return AcceptanceProcess(init=lambda: 0, step=step)


def _replay(text: str, rest: str, max_depth: int) -> AcceptanceProcess:
    """Build a process that reads a file once and goes round in it."""
    try:
        lines = [json.loads(line) for line in pathlib.Path(rest).read_text().splitlines() if line.strip()]
        rows = [_continued(_probabilities(text, line["acceptance"]), max_depth) for line in lines]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f'{text!r} wants JSON lines of {{"acceptance": [...]}}: {problem}') from error
    _check(bool(rows), text, "wants one line or more")
    return _cycle(np.stack(rows))


def _cycle(table_LK: np.ndarray) -> AcceptanceProcess:
    """Build a process that gives the rows of a table in turn."""
    _frozen(table_LK)

    def step(tick: int, batch: int, noise_2: np.ndarray) -> tuple[np.ndarray, int]:
        del batch, noise_2
        return table_LK[tick], (tick + 1) % len(table_LK)

    return AcceptanceProcess(init=lambda: 0, step=step)


def _continued(levels: list[float], max_depth: int) -> np.ndarray:
    """Cut a list of levels to the positions there are, or continue it with its last one."""
    return np.array((levels + levels[-1:] * max_depth)[:max_depth])


def _levels_at(text: str, rest: str) -> tuple[list[float], float]:
    """Read "0.9,0.2@200"."""
    levels, _, number = rest.partition("@")
    try:
        value = float(number)
    except ValueError as error:
        raise ValueError(f"{text!r} wants probabilities and @number; known forms: {', '.join(FORMS)}") from error
    _check(math.isfinite(value), text, "wants a finite number")
    return _probabilities(text, levels.split(",")), value


def _probabilities(text: str, values: list[Any]) -> list[float]:
    """Read a list of probabilities with one at least."""
    try:
        levels = [float(value) for value in values]
    except ValueError as error:
        raise ValueError(f"{text!r} wants probabilities; known forms: {', '.join(FORMS)}") from error
    _check(bool(levels) and all(0 <= level <= 1 for level in levels), text, "wants probabilities in [0, 1]")
    return levels


def _check(holds: bool, text: str, wants: str) -> None:
    """Raise where a text is not what its form asks for."""
    if not holds:
        raise ValueError(f"{text!r} {wants}; known forms: {', '.join(FORMS)}")


def _frozen(table: np.ndarray) -> np.ndarray:
    """Forbid writing, since rows of the table are handed out."""
    table.flags.writeable = False
    return table
