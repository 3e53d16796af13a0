"""What the StreamServe paper is reported to claim, and what the rows say of each claim.

The text of the paper was not at hand: the abstract is public, the rest is what readers of the full text report. Nothing
of it was verified. These are the only numbers of a report that do not come from its rows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.depth_verdicts import Interval
from experiments.paper_arms import BASE_ROUTER, PLAIN, Arm
from experiments.paper_rows import ALL, METRICS, Cell, Row, Study, drafts
from experiments.paper_verdicts import Comparison, compare

ABSTRACT, READER, DOUBTFUL = "its abstract", "a reader of the full text", "a reader, less reliable"
HOLDS, FAILS, UNSURE = "holds here", "does not hold here", "cannot be told here"
UNDEFINED, NOT_RUN, REFUSED = "no criterion is given", "not run here", "refused"

# What was evaluated: what, as reported, by whom.
SETTING: Sequence[tuple[str, str, str]] = (
    ("model", "Llama-2-7B in FP16", READER),
    ("devices", "four A800 40 GB GPUs as two stream pairs", ABSTRACT),
    ("prompts", "320: ALPACA, GSM8K, HUMANEVAL and SUM, 80 each", ABSTRACT),
    ("lengths, arrivals, objectives", "not disclosed", READER),
    ("throughput", "section 3.6: (input + output tokens) / latency of a single request", READER),
    ("comparison", "disaggregation, routing and speculation change at once", READER),
)


class Board(NamedTuple):
    """What claims are held against.

    Attributes:
      study: the rows.
      cells: by mode and group.
      system: the arm that is StreamServe.
      baseline: the tensor-parallel arm that it is compared with; None where none could be built.
    """

    study: Study
    cells: Mapping[tuple[str, str], Cell]
    system: Arm
    baseline: Arm | None

    def compared(self, mode: str, group: str) -> Comparison | None:
        """Compare the system with the baseline; None where there is nothing to compare."""
        cell = self.cells.get((mode, group))
        if cell is None or self.baseline is None:
            return None
        return compare(self.study, cell, "system", self.baseline, self.system)

    @property
    def modes(self) -> list[str]:
        """Those that were run."""
        return list(dict.fromkeys(mode for mode, _ in self.cells))


class Finding(NamedTuple):
    """What the rows say of a claim, whether it holds, and how many runs on a workload say so."""

    here: str
    verdict: str
    runs: int = 0


class Claim(NamedTuple):
    """A claim as it is reported, by whom, and how it is held against rows."""

    about: str
    reported: str
    source: str
    find: Callable[[Board], Finding]


def make_board(study: Study, cells: Iterable[Cell]) -> Board:
    """Choose the system and the baseline: of those that were built, the one with the largest tensor-parallel mesh."""
    built = study.settings
    width = {name: values["topology.decode_devices"] for name, values in built.items()}
    plain = [name for name, values in built.items() if not drafts(values) and width[name] > 1]
    fleet = next(name for name, values in built.items() if values["topology.topology"] == "disaggregated")
    return Board(
        study=study,
        cells={(cell.mode, cell.group): cell for cell in cells},
        system=Arm(fleet, study.header["routers"][0], study.header["policies"][0]),
        baseline=Arm(max(plain, key=lambda name: width[name]), BASE_ROUTER, PLAIN) if plain else None,
    )


def judge(speeds: Sequence[Interval], bounds: Sequence[float]) -> str:
    """Say whether every speed-up reaches its bound, by the intervals."""
    if all(speed.low >= bound for speed, bound in zip(speeds, bounds, strict=True)):
        return HOLDS
    return FAILS if any(speed.high < bound for speed, bound in zip(speeds, bounds, strict=True)) else UNSURE


def ratio_text(speed: Interval) -> str:
    """Show a ratio with its interval."""
    return f"{speed.value:.2f}" + ("" if np.isnan(speed.low) else f" [{speed.low:.2f}, {speed.high:.2f}]")


def _reaches(bounds: Mapping[str, float], groups: Callable[[Board], Sequence[str]]) -> Callable[[Board], Finding]:
    """Hold the system's speed-ups over the baseline, by metric, against bounds, in every mode and group."""

    def find(board: Board) -> Finding:
        comparisons = [board.compared(mode, group) for mode in board.modes for group in groups(board)]
        found = [comparison for comparison in comparisons if comparison is not None]
        if not found:
            return Finding("-", NOT_RUN)
        reasons = dict.fromkeys(one.refusal for one in found if one.refusal is not None)
        if reasons:
            return Finding("; ".join(reasons), REFUSED)
        told = [
            f"{one.cell.mode}, {one.cell.group}: {METRICS[name].title} {ratio_text(one.speeds[name])}"
            for one in found
            for name in bounds
        ]
        speeds = [one.speeds[name] for one in found for name in bounds]
        runs = min(one.cell.num_runs for one in found)
        return Finding("; ".join(told), judge(speeds, [*bounds.values()] * len(found)), runs)

    return find


def _of(*names: str) -> Callable[[Board], Sequence[str]]:
    return lambda board: [name for name in names if any(group == name for _, group in board.cells)]


def _each(board: Board) -> Sequence[str]:
    return board.study.workloads


def _baseline_leads(board: Board) -> Finding:
    """Hold the claim that the baseline is the faster one on ALPACA, by the rate of section 3.6."""
    finding = _reaches({"paper_rate": 1.0}, _of("alpaca"))(board)
    if finding.verdict in (HOLDS, FAILS):
        return finding._replace(verdict=FAILS if finding.verdict == HOLDS else HOLDS)
    return finding


def _sum_is_fastest(board: Board) -> Finding:
    """Show the rates on SUM; the claim is taken to be that it has the highest rate of section 3.6."""
    told, verdicts = [], []
    for mode in board.modes:
        rates = {
            name: cell.values[board.system][list(METRICS).index("paper_rate")]
            for name in board.study.workloads
            if (cell := board.cells.get((mode, name))) is not None and board.system in cell.runs
        }
        if "sum" not in rates or len(rates) == 1:
            continue
        told.append(", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()) + f" tokens/s ({mode})")
        verdicts.append(max(rates, key=lambda name: rates[name]) == "sum")
    if not told:
        return Finding("-", NOT_RUN)
    text = f"{METRICS['paper_rate'].title} of {board.system}: " + "; ".join(told)
    return Finding(text, "the highest, here too" if all(verdicts) else "not the highest here")


def _steadiness(board: Board) -> Finding:
    """Show how far the slowest requests are from the middle one, by time per output token."""
    told = []
    for mode in board.modes:
        cell = board.cells.get((mode, ALL), board.cells.get((mode, board.study.workloads[0])))
        for arm in (board.system, board.baseline):
            if cell is not None and arm is not None and arm in cell.runs:
                values = tpots_s(cell.runs[arm])
                if len(values) and np.median(values) > 0:
                    spread = np.percentile(values, 99) / np.median(values)
                    told.append(f"{mode}, {arm}: p99 over p50 of TPOT {spread:.2f}")
    return Finding("; ".join(told), UNDEFINED) if told else Finding("-", NOT_RUN)


def tpots_s(runs: Sequence[Row]) -> np.ndarray:
    """Gather the times per output token of all requests with more than one, seconds."""
    names = ("output_tokens", "ttft_s", "latency_s")
    entries = [entry for run in runs for entry in zip(*(run[name] for name in names), strict=True)]
    return np.array([(end - first) / (count - 1) for count, first, end in entries if count is not None and count > 1])


CLAIMS: Sequence[Claim] = (
    Claim(
        "latency, tensor-parallel vLLM over StreamServe",
        "11 to 18 times",
        ABSTRACT,
        _reaches({"latency": 11.0}, _each),
    ),
    Claim("throughput", "up to 2,235 tokens/s, on SUM", ABSTRACT, _sum_is_fastest),
    Claim("time per output token", "stable", ABSTRACT, _steadiness),
    Claim(
        "ALPACA: the baseline has the higher rate", "171 tokens/s against StreamServe's 137", READER, _baseline_leads
    ),
    Claim(
        "GSM8K: rate and latency against the baseline's",
        "264 against 241 tokens/s, 0.30 against 3.50 s",
        DOUBTFUL,
        _reaches({"paper_rate": 264 / 241, "latency": 3.50 / 0.30}, _of("gsm8k")),
    ),
    Claim(
        "average over workloads",
        "latency 15.75 times, throughput 4.4 times",
        DOUBTFUL,
        _reaches({"latency": 15.75, "paper_rate": 4.4}, _of(ALL)),
    ),
)
