"""What the rows of the reproduction hold: the runs of every arm by mode and workload, their metrics, and resamples."""

import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import common
from experiments.depth_verdicts import LEVEL, Interval
from experiments.paper_arms import Arm
from streamserve.bandits.bootstrap import Bootstrap, resampled_means

STUDY = "reproduce_paper"  # how a header says what it is of
ALL = "all"  # the workloads together
RESAMPLES = 1000
Row = Mapping[str, Any]


class Metric(NamedTuple):
    """What is measured of requests: a ratio of two sums over prompts.

    Attributes:
      title: for tables.
      unit: of `scale` times the value.
      scale: from seconds and tokens.
      is_cost: less is better.
      modes: where it means something.
    """

    title: str
    unit: str
    scale: float
    is_cost: bool
    modes: tuple[str, ...] = ("offline", "open")


METRICS: Mapping[str, Metric] = {
    "latency": Metric("latency", "ms", 1e3, True),
    "ttft": Metric("TTFT", "ms", 1e3, True),
    "tpot": Metric("TPOT", "ms", 1e3, True),
    "output_rate": Metric("fleet output", "tokens/s", 1.0, False, ("offline",)),  # in an open loop it is the arrivals'
    "paper_rate": Metric("section 3.6 rate", "tokens/s", 1.0, False),
}


class Study(NamedTuple):
    """A file of rows: its header, the engines by fleet, and the runs."""

    header: Row
    engines: Mapping[str, Row]
    runs: Sequence[Row]

    @property
    def settings(self) -> dict[str, Row]:
        """Settings of the fleets that were built; those that draft come first."""
        built = {name: engine["settings"] for name, engine in self.engines.items() if "settings" in engine}
        return dict(sorted(built.items(), key=lambda item: not drafts(item[1])))

    @property
    def workloads(self) -> list[str]:
        """Those that have runs."""
        return list(dict.fromkeys(run["workload"] for run in self.runs))


class Cell(NamedTuple):
    """All runs on one workload, or the geometric mean over all of them, in one mode.

    Attributes:
      mode: "offline" or "open".
      group: the workload, or `ALL`.
      runs: by arm, in one order of repeats and workloads.
      values: [M] by arm, of `METRICS`.
      drawn: [R, M] by arm, the same of resamples, which all arms share; NaN where there is one run alone.
    """

    mode: str
    group: str
    runs: Mapping[Arm, list[Row]]
    values: Mapping[Arm, np.ndarray]
    drawn: Mapping[Arm, np.ndarray]

    @property
    def num_runs(self) -> int:
        """Runs of the arm that has the fewest."""
        return min(map(len, self.runs.values()))

    @property
    def metrics(self) -> list[str]:
        """What means something in this mode."""
        return [name for name, metric in METRICS.items() if self.mode in metric.modes]


def read_study(path: pathlib.Path) -> Study:
    """Read a file of `experiments.reproduce_paper`.

    Raises:
      RunError: it cannot be read, or is no such file.
    """
    lines = common.read_json_lines(path)
    try:
        kinds = [line["kind"] for line in lines]
    except (KeyError, TypeError) as error:
        raise common.RunError(f"cannot read {str(path)!r}: {type(error).__name__}: {error}") from None
    if not lines or kinds.count("header") != 1 or lines[0].get("study") != STUDY or "run" not in kinds:
        raise common.RunError(f"{str(path)!r} does not hold a header of experiments.reproduce_paper and runs")
    engines = {line["fleet"]: line for line in lines if line["kind"] == "engine"}
    study = Study(lines[0], engines, [line for line in lines if line["kind"] == "run"])
    unknown = {run["fleet"] for run in study.runs} - set(study.settings)
    if unknown:
        raise common.RunError(f"{str(path)!r} has runs of fleets that it does not describe: {sorted(unknown)}")
    return study


def drafts(settings: Row) -> bool:
    """Tell whether a fleet drafts; otherwise it is a baseline."""
    return settings["speculation.method"] != "none"


def arm_of(run: Row) -> Arm:
    """Name the arm of a run."""
    return Arm(run["fleet"], run["router"], run["policy"])


def cells(study: Study) -> Iterator[Cell]:
    """Gather the runs of every mode: on each workload, and on all together where there are several."""
    for mode in dict.fromkeys(run["mode"] for run in study.runs):
        singles = []
        for seed, name in enumerate(study.workloads):
            own = [run for run in study.runs if (run["mode"], run["workload"]) == (mode, name)]
            if own:
                singles.append(_cell(mode, name, sorted(own, key=lambda run: run["repeat"]), seed))
        yield from singles
        if len(singles) > 1:
            yield _together(singles)


def _cell(mode: str, group: str, runs: Sequence[Row], seed: int) -> Cell:
    counts = Counter(run["repeat"] for run in runs)  # a study that was cut short may leave part of a repeat
    by_arm: dict[Arm, list[Row]] = {}
    for run in runs:
        if counts[run["repeat"]] == max(counts.values()):
            by_arm.setdefault(arm_of(run), []).append(run)
    sums = {arm: _sums(own) for arm, own in by_arm.items()}
    steps, num_runs = max(len(one) for one in sums.values()), max(map(len, by_arm.values()))
    whole = [arm for arm, one in sums.items() if len(one) == steps]
    drawn = {arm: np.full((1, len(METRICS)), np.nan) for arm in sums}
    if num_runs > 1:
        # The prompts of a run share its batch and its moment of the machine: a block is as long as a run.
        bootstrap = Bootstrap(mean_block=steps / num_runs, seed=seed, repeats=RESAMPLES, level=LEVEL)
        together = np.stack([sums[arm] for arm in whole], axis=1)
        means = resampled_means(together.reshape(steps, -1), bootstrap).reshape(-1, *together.shape[1:])
        drawn |= {arm: _divided(means[:, index]) for index, arm in enumerate(whole)}
    return Cell(mode, group, by_arm, {arm: _divided(one.mean(axis=0)) for arm, one in sums.items()}, drawn)


def _together(singles: Sequence[Cell]) -> Cell:
    """Take the geometric mean over workloads, so that none outweighs the others by its length."""
    arms = [arm for arm in singles[0].runs if all(arm in cell.runs for cell in singles)]
    return Cell(
        singles[0].mode,
        ALL,
        {arm: [run for cell in singles for run in cell.runs[arm]] for arm in arms},
        {arm: np.exp(np.mean([np.log(cell.values[arm]) for cell in singles], axis=0)) for arm in arms},
        {arm: np.exp(sum(np.log(cell.drawn[arm]) for cell in singles) / len(singles)) for arm in arms},
    )


def _sums(runs: Sequence[Row]) -> np.ndarray:
    """Lay out above and below the line of every metric: [T, M, 2] over the prompts of all runs."""
    inputs, outputs, ttft_s, latency_s, charged_s = (
        np.array([value for run in runs for value in run[name]], np.float64)
        for name in ("input_tokens", "output_tokens", "ttft_s", "latency_s", "charged_s")
    )
    gaps, ones = outputs - 1, np.ones(len(outputs))
    rate = np.divide(inputs + outputs, latency_s, out=np.full(len(outputs), np.nan), where=latency_s > 0)
    columns = {
        "latency": (latency_s, ones),
        "ttft": (ttft_s, ones),
        "tpot": (np.where(gaps > 0, (latency_s - ttft_s) / np.maximum(gaps, 1), 0.0), gaps > 0),
        "output_rate": (outputs, charged_s),
        "paper_rate": (rate, ones),
    }
    return np.array([columns[name] for name in METRICS], np.float64).transpose(2, 0, 1)


def _divided(sums_XM2: np.ndarray) -> np.ndarray:
    below = sums_XM2[..., 1]
    return np.divide(sums_XM2[..., 0], below, out=np.full(below.shape, np.nan), where=below > 0)


def interval(value: float, drawn_R: np.ndarray) -> Interval:
    """Take the percentiles of resamples as the bounds of a value."""
    low, high = np.percentile(drawn_R, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(value), float(low), float(high))


def log_speed(cell: Cell, arm: Arm) -> tuple[np.ndarray, np.ndarray]:
    """Give the logarithm of how good an arm is: [M], and [R, M] of the resamples."""
    signs = np.array([-1.0 if metric.is_cost else 1.0 for metric in METRICS.values()])
    return signs * np.log(cell.values[arm]), signs * np.log(cell.drawn[arm])
