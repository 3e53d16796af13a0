"""What the rows of the reproduction say of two arms: how many times better one is, or why nothing may be said.

Two arms are compared on the same prompts and repeats, in the name of one factor. There is no number where they differ
in anything that the factor does not own: a setting, the devices, the slots, the software; nor where a program was
compiled while one ran, prompts failed, their tokens differ, or what the factor is about did not take place.
"""

import json
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import common
from experiments.depth_verdicts import LEVEL, Interval
from experiments.paper_arms import PLAIN, Arm
from streamserve.bandits.bootstrap import Bootstrap, resampled_means

STUDY = "reproduce_paper"  # how a header says what it is of
ALL = "all"  # the workloads together
RESAMPLES, SEED = 1000, 0
Row = Mapping[str, Any]

_DIVISION = ("topology.topology", "topology.prefill_devices", "topology.decode_devices")
_SIZES = ("topology.num_pairs", "pipeserve.max_num_seqs", "pipeserve.max_prefills")
# What two arms may differ in when they are compared in the name of a factor; a dot at the end stands for a section.
FACTORS: Mapping[str, tuple[str, ...]] = {
    "routing": ("router",),
    "disaggregation": _DIVISION,
    "speculation": ("policy",),
    "draft": ("speculation.",),  # plain decoding beside a draft model that reads the prompts, or without one
    "system": ("router", "policy", "speculation.", *_DIVISION, *_SIZES),  # three factors at once: it explains nothing
}


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
    """All runs on one workload, or on all, in one mode.

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
    def metrics(self) -> list[str]:
        """What means something in this mode."""
        return [name for name, metric in METRICS.items() if self.mode in metric.modes]


class Comparison(NamedTuple):
    """How many times better `other` is than `base`, by metric; none where it is refused."""

    cell: Cell
    factor: str
    base: Arm
    other: Arm
    speeds: Mapping[str, Interval]
    refusal: str | None


def read_study(path: pathlib.Path) -> Study:
    """Read a file of `experiments.reproduce_paper`.

    Raises:
      RunError: it cannot be read, or is no such file.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        kinds = [line["kind"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    names = study.workloads
    for mode in dict.fromkeys(run["mode"] for run in study.runs):
        for group, members in [*((name, [name]) for name in names), *([(ALL, names)] if len(names) > 1 else [])]:
            chosen = [run for run in study.runs if run["mode"] == mode and run["workload"] in members]
            if chosen:
                yield _cell(mode, group, sorted(chosen, key=lambda run: (run["repeat"], names.index(run["workload"]))))


def _cell(mode: str, group: str, runs: Sequence[Row]) -> Cell:
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
        bootstrap = Bootstrap(mean_block=steps / num_runs, seed=SEED, repeats=RESAMPLES, level=LEVEL)
        together = np.stack([sums[arm] for arm in whole], axis=1)
        means = resampled_means(together.reshape(steps, -1), bootstrap).reshape(-1, *together.shape[1:])
        drawn |= {arm: _divided(means[:, index]) for index, arm in enumerate(whole)}
    return Cell(mode, group, by_arm, {arm: _divided(one.mean(axis=0)) for arm, one in sums.items()}, drawn)


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


def compare(study: Study, cell: Cell, factor: str, base: Arm, other: Arm) -> Comparison:
    """Compare two arms in the name of a factor."""
    why = refusal(study, cell, factor, base, other)
    if why is not None:
        return Comparison(cell, factor, base, other, {}, why)
    (value_M, drawn_RM), (base_M, base_RM) = log_speed(cell, other), log_speed(cell, base)
    speed_M, speed_RM = np.exp(value_M - base_M), np.exp(drawn_RM - base_RM)
    speeds = {
        name: interval(speed_M[index], speed_RM[:, index]) for index, name in enumerate(METRICS) if name in cell.metrics
    }
    return Comparison(cell, factor, base, other, speeds, None)


def refusal(study: Study, cell: Cell, factor: str, base: Arm, other: Arm) -> str | None:
    """Say why two arms must not be compared in the name of a factor; None if they may.

    Raises:
      RunError: there is no such factor.
    """
    if factor not in FACTORS:
        raise common.RunError(f"unknown factor {factor!r}; known: {', '.join(FACTORS)}")
    for arm in (base, other):
        if "refused" in study.engines.get(arm.fleet, {}):
            return f"{arm.fleet} could not be built: {study.engines[arm.fleet]['refused']}"
        if arm not in cell.runs or arm.fleet not in study.engines:
            return f"there is no run of {arm}"
        if why := _unsound(study, arm, cell.runs[arm]):
            return why
    return _foreign(factor, facts(study, base), facts(study, other)) or _unlike(
        cell.runs[base], cell.runs[other], study.header["max_different"]
    )


def facts(study: Study, arm: Arm) -> dict[str, Any]:
    """Say all that an arm is: its names, its engine's settings, software, devices and slots."""
    engine = study.engines[arm.fleet]
    values = study.settings[arm.fleet]
    return {
        "router": arm.router,
        "policy": arm.policy,
        "devices": engine["devices"],
        "slots": values["topology.num_pairs"] * values["pipeserve.max_num_seqs"],
        **{f"versions.{name}": version for name, version in engine["versions"].items()},
        **values,
    }


def _foreign(factor: str, base: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Say in what two arms differ that the factor does not own, or that they do not differ in what it owns."""
    names = [name for name in {**base, **other} if base.get(name) != other.get(name)]
    owned = tuple(name for name in FACTORS[factor] if name.endswith("."))
    foreign = [name for name in names if name not in FACTORS[factor] and not (owned and name.startswith(owned))]
    if foreign:
        told = ", ".join(f"{name} ({base.get(name)} against {other.get(name)})" for name in foreign)
        return f"they differ in {told}, which {factor} does not mean"
    return None if names else f"they do not differ in {factor}"


def _unsound(study: Study, arm: Arm, runs: Sequence[Row]) -> str | None:
    """Say what is wrong with the runs of one arm by themselves."""
    failed, compiled, drafted, moved = (
        sum(run[name] for run in runs)
        for name in ("failed", "compilations_after_warmup", "draft_tokens", "kv_transfer_bytes")
    )
    values = study.settings[arm.fleet]
    if failed:
        return f"{failed} prompts of {arm} failed"
    if compiled:
        return f"{compiled} programs were compiled while {arm} ran"
    if arm.policy != PLAIN and not drafted:
        return f"{arm} drafted nothing"
    if values["topology.topology"] == "disaggregated" and not values["topology.share_devices"] and not moved:
        return f"{arm} handed nothing over from prefill to decode"
    return None


def _unlike(base: Sequence[Row], other: Sequence[Row], max_different: int) -> str | None:
    """Say in what the runs of two arms did not do the same work."""
    turns = [[(run["repeat"], run["workload"], run["input_tokens"]) for run in runs] for runs in (base, other)]
    if turns[0] != turns[1]:
        return "they were given other prompts"
    different = max(
        sum(a != b for a, b in zip(one["tokens_sha256"], two["tokens_sha256"], strict=True))
        for one, two in zip(base, other, strict=True)
    )
    if different > max_different:
        return f"{different} prompts of a run have other tokens, allowed are {max_different}"
    return None
