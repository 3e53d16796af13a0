"""Effects of the three factors of the paper, each by itself and with the others, from the eight arms that cross them.

The scale is logarithmic, so effects multiply. A main effect is how many times better a factor makes things, on the
geometric mean over the settings of the other two. An interaction of two factors is how many times larger the one's
effect is where the other is on than where it is off, on the geometric mean over the third; that of three compares such
interactions likewise. 1 is no effect; with main effects and interactions alike, above 1 is better.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from experiments.depth_verdicts import Interval
from experiments.paper_arms import BASE_ROUTER, PLAIN, Arm
from experiments.paper_rows import METRICS, Cell, Study, drafts, interval, log_speed
from experiments.paper_verdicts import Comparison, compare, refusal

FACTOR_NAMES = ("routing", "disaggregation", "speculation")  # axes of a cube
SUBSETS = tuple(names for size in (1, 2, 3) for names in itertools.combinations(FACTOR_NAMES, size))
Corner = tuple[int, ...]  # in the order of `FACTOR_NAMES`, 1 where a factor is on


class Effects(NamedTuple):
    """Effects on one workload in one mode; none where any two arms of the cube must not be compared.

    Attributes:
      cell: what they are measured on.
      by_subset: by the factors, and the metric.
      refusals: why there are none.
    """

    cell: Cell
    by_subset: Mapping[tuple[str, ...], Mapping[str, Interval]]
    refusals: tuple[str, ...]


def cube(study: Study, router: str, policy: str) -> dict[Corner, Arm] | None:
    """Name the arms of all settings of the factors; None where a fleet that drafts is missing."""
    fleets = {values["topology.topology"]: name for name, values in study.settings.items() if drafts(values)}
    if len(fleets) < 2:
        return None
    levels = ((BASE_ROUTER, router), (fleets["colocated"], fleets["disaggregated"]), (PLAIN, policy))
    return {
        corner: Arm(levels[1][corner[1]], levels[0][corner[0]], levels[2][corner[2]])
        for corner in itertools.product((0, 1), repeat=3)
    }


def edges(corners: Mapping[Corner, Arm]) -> Iterator[tuple[str, Arm, Arm]]:
    """Name the pairs that differ in one factor: the factor, the arm where it is off, the one where it is on."""
    for axis, factor in enumerate(FACTOR_NAMES):
        for corner, arm in corners.items():
            if not corner[axis]:
                yield factor, arm, corners[(*corner[:axis], 1, *corner[axis + 1 :])]


def contrast(logs_X222: np.ndarray, factors: Collection[str]) -> np.ndarray:
    """Take the difference of on and off along the axes of some factors, and the mean along the others' axes."""
    left = logs_X222
    for factor in reversed(FACTOR_NAMES):  # the last axis is its own
        off, on = left[..., 0], left[..., 1]
        left = on - off if factor in factors else (on + off) / 2
    return left


def effects(study: Study, cell: Cell, corners: Mapping[Corner, Arm]) -> Effects:
    """Estimate all effects with intervals; the resamples are the same for every arm."""
    refusals = dict.fromkeys(refusal(study, cell, *edge) for edge in edges(corners))
    reasons = tuple(reason for reason in refusals if reason is not None)
    if reasons:
        return Effects(cell, {}, reasons)
    logs = {corner: log_speed(cell, arm) for corner, arm in corners.items()}
    value_M222 = np.stack([logs[corner][0] for corner in corners], axis=-1).reshape(-1, 2, 2, 2)
    drawn_RM222 = np.stack([logs[corner][1] for corner in corners], axis=-1)
    drawn_RM222 = drawn_RM222.reshape(*drawn_RM222.shape[:2], 2, 2, 2)
    by_subset = {}
    for factors in SUBSETS:
        value_M, drawn_RM = np.exp(contrast(value_M222, factors)), np.exp(contrast(drawn_RM222, factors))
        by_subset[factors] = {
            name: interval(value_M[index], drawn_RM[:, index])
            for index, name in enumerate(METRICS)
            if name in cell.metrics
        }
    return Effects(cell, by_subset, ())


def simple_effects(study: Study, cell: Cell, corners: Mapping[Corner, Arm]) -> list[Comparison]:
    """Compare every pair of arms that differs in one factor."""
    return [compare(study, cell, *edge) for edge in edges(corners)]
