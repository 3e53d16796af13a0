"""Sections of a report about several runs: throughput and goodput against latency, over rates of requests."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.report_charts import Axis, Chart, Kind, Series, distribution
from experiments.report_html import Block, Note, Section, Table
from experiments.report_latency import goodput
from experiments.report_run import Run
from experiments.report_summary import flat, synthetic_warning

_NOT_A_WAY = ("seed", "compilation_cache_dir")  # settings by which two runs may differ and still be of one way
_ONE_WAY = "all runs"
_MOST_SETTINGS = 3  # that name a way
_MOST_CURVES = 8  # distributions in one chart


class _Point(NamedTuple):
    """A run among others."""

    run: Run
    way: str  # the settings in which it differs from others, its rate aside
    rate: float | None  # requests a second that arrived


def throughput_section(runs: Sequence[Run]) -> Section:
    """Show throughput against latency; a single run is a single point."""
    title = "Throughput against latency"
    synthetic = any(run.synthetic is not None for run in runs)
    if len(runs) == 1:
        return Section(title, (Note(_one_point(runs[0])), *_load(runs[0])), synthetic)
    points = _points(runs)
    alarms = {run.synthetic: Note(synthetic_warning(run.synthetic), alarm=True) for run in runs if run.synthetic}
    blocks: list[Block] = [*alarms.values(), _table(points), *_charts(points)]
    return Section(title, tuple(blocks), synthetic)


def distributions_section(runs: Sequence[Run]) -> Section:
    """Compare the runs' distributions of latencies."""
    shown = runs[:_MOST_CURVES]
    blocks: list[Block] = []
    if len(shown) < len(runs):
        blocks.append(Note(f"The first {len(shown)} of {len(runs)} runs; each run has its own charts below."))
    for name in ("ttft", "tpot", "e2el"):
        values = {run.name: _values(run, f"{name}_ms") for run in shown}
        series = [distribution(label, own, color) for color, (label, own) in enumerate(values.items()) if own]
        if not series:
            blocks.append(Note(f"{name.upper()}: no run has any in its requests.jsonl."))
            continue
        blocks.append(
            Chart(
                title=f"{name.upper()} of each run",
                caption=f"Share of answered requests that took at most so long, n = {sum(map(len, values.values()))}.",
                x=Axis(f"{name.upper()} (ms)", low=0.0),
                y=Axis("share of requests (%)", low=0.0, high=102.0),
                series=tuple(series),
            )
        )
    return Section("Latencies of the runs", tuple(blocks), any(run.synthetic is not None for run in runs))


def _values(run: Run, field: str) -> list[float]:
    return [value for row in run.requests or () if row.error is None and (value := getattr(row, field)) is not None]


def _one_point(run: Run) -> str:
    told = []
    for value, unit in ((run.number("output_throughput"), "output tokens/s"), (goodput(run), "good requests/s")):
        if value is not None:
            told.append(f"{value:.4g} {unit}")
    median = run.number("median_e2el_ms")
    told += [] if median is None else [f"{median:.4g} ms end to end in the median"]
    point = ", ".join(told) or "nothing was measured"
    return f"This run is one point: {point}. Several workdirs give the curve over rates."


def _load(run: Run) -> Iterator[Block]:
    """Show what arrived, where requests came by themselves."""
    arrivals = run.results.get("arrivals")
    if not isinstance(arrivals, Mapping):
        yield Note(
            "results.json has no arrivals: requests did not come by themselves, but were pulled as there was room."
        )
    else:
        facts = {name: round(value, 3) if isinstance(value, float) else value for name, value in arrivals.items()}
        caption = "What arrived, and how late the loop took it in."
        yield Table(caption, ("arrivals", "value"), tuple(flat(facts)), text=True)


def _points(runs: Sequence[Run]) -> list[_Point]:
    """Tell the runs' ways apart by the settings that differ; one that a run does not have tells nothing."""
    flat = [dict(_settings(run.config or {})) for run in runs]
    common = sorted(set.intersection(*(set(settings) for settings in flat)))
    differing = [name for name in common if len({settings[name] for settings in flat}) > 1]
    ways = [tuple(f"{name}={settings[name]}" for name in differing) for settings in flat]
    numbers = {way: number for number, way in enumerate(dict.fromkeys(ways), start=1)}
    return [_Point(run, _named(way, numbers[way]), run.rate) for run, way in zip(runs, ways, strict=True)]


def _named(way: tuple[str, ...], number: int) -> str:
    """Name a way by its first settings; by its number, too, if there are more."""
    if len(way) > _MOST_SETTINGS:
        return f"way {number}: {', '.join(way[:_MOST_SETTINGS])} and {len(way) - _MOST_SETTINGS} more settings"
    return ", ".join(way) or _ONE_WAY


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """List the settings that make a way of serving."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in _NOT_A_WAY:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)


def _table(points: Sequence[_Point]) -> Block:
    """Lay out each run's numbers."""
    columns = ("run", "rate (requests/s)", "answered", "failed", "output (tokens/s)", "goodput (requests/s)")
    columns += ("attained (%)", "TTFT p99 (ms)", "TPOT p99 (ms)", "E2EL median (ms)")
    rows = []
    for run, way, rate in points:
        attained = run.number("slo_attainment")
        numbers = [rate, *(run.number(key) for key in ("completed", "failed", "output_throughput")), goodput(run)]
        numbers += [None if attained is None else 100 * attained]
        numbers += [run.number(key) for key in ("p99_ttft_ms", "p99_tpot_ms", "median_e2el_ms")]
        rows.append((f"{run.name} ({way})" if way != _ONE_WAY else run.name, *map(_number, numbers)))
    return Table(f"{len(points)} runs.", columns, tuple(rows))


def _number(value: float | None) -> str:
    """Four digits, or all of a large number."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _charts(points: Sequence[_Point]) -> Iterator[Block]:
    """Draw each pair of measures for which runs have both."""
    ms: dict[str, tuple[str, Callable[[_Point], float | None]]] = {
        "median_e2el_ms": ("median E2EL (ms)", lambda point: point.run.number("median_e2el_ms")),
        "p99_ttft_ms": ("99th percentile of TTFT (ms)", lambda point: point.run.number("p99_ttft_ms")),
        "p99_tpot_ms": ("99th percentile of TPOT (ms)", lambda point: point.run.number("p99_tpot_ms")),
    }
    output = ("output (tokens/s)", lambda point: point.run.number("output_throughput"))
    good = ("goodput (requests/s)", lambda point: goodput(point.run))
    rate = ("rate of arrivals (requests/s)", lambda point: point.rate)
    yield _chart(points, "Output against end-to-end latency", ms["median_e2el_ms"], output)
    yield _chart(points, "Output against TTFT", ms["p99_ttft_ms"], output)
    yield _chart(points, "Goodput against TTFT", ms["p99_ttft_ms"], good)
    yield _chart(points, "Goodput against TPOT", ms["p99_tpot_ms"], good)
    yield _chart(points, "Output over rates", rate, output)
    yield _chart(points, "Goodput over rates", rate, good)
    yield _chart(points, "TTFT over rates", rate, ms["p99_ttft_ms"])


def _chart(points: Sequence[_Point], title: str, x: Any, y: Any) -> Block:
    """Join the runs of each way in the order of their rates, or of their output where no rate is known."""
    series = []
    for color, way in enumerate(dict.fromkeys(point.way for point in points)):
        own = sorted((point for point in points if point.way == way), key=_order)
        pairs = [(x[1](point), y[1](point)) for point in own]
        known = np.array([pair for pair in pairs if None not in pair], np.float64).reshape(-1, 2)
        if len(known):
            series.append(Series(way, known[:, 0], known[:, 1], Kind.JOINED, color))
    if not series:
        return Note(f"{title}: no run has both {x[0]} and {y[0]}.")
    count = sum(len(one.x) for one in series)
    caption = f"Each point is a run, joined in the order of the rate at which requests came, n = {count} runs."
    return Chart(title=title, caption=caption, x=Axis(x[0], low=0.0), y=Axis(y[0], low=0.0), series=tuple(series))


def _order(point: _Point) -> float:
    return point.rate if point.rate is not None else point.run.number("request_throughput") or 0.0
