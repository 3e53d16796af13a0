"""Sections of a report about single requests: latencies, hand-offs, and whether the objective was met."""

from collections.abc import Sequence

import numpy as np

from experiments.report_charts import Axis, Chart, Kind, Mark, Series, distribution
from experiments.report_html import Block, Note, Section, Table
from experiments.report_run import RequestRow, Run
from streamserve.metrics import ServiceLevels

NO_REQUESTS = "requests.jsonl is absent, so nothing is known of single requests."
NO_OBJECTIVE = "No objective is recorded: results.json, routes.jsonl and the routing of config.json have none."
_LATENCIES = (
    ("ttft", "Time to first token (TTFT)"),
    ("tpot", "Time per output token after the first (TPOT)"),
    ("itl", "Gap between deliveries of tokens (ITL)"),
    ("e2el", "End-to-end latency (E2EL)"),
)
_STAGES = ("queue", "prefill", "page_wait", "transfer", "decode")
_STATISTICS = ("mean", "median", "p90", "p99")
_LONG_TAIL = 50.0  # largest over median from which an axis is logarithmic
_MOST_MULTIPLES = 10.0  # of the objective that are drawn
_MOST_DOTS = 500  # each takes a hundred bytes of the page
_MIB = 2.0**20


def latency_section(run: Run) -> Section:
    """Show the distributions of all four latencies, and the table of their quantiles."""
    blocks: list[Block] = [_quantiles(run)]
    if run.requests is None:
        return Section("Latency", (*blocks, Note(NO_REQUESTS)), run.synthetic is not None)
    answered = [row for row in run.requests if row.error is None]
    values: dict[str, Sequence[float]] = {
        "ttft": [row.ttft_ms for row in answered if row.ttft_ms is not None],
        "tpot": [row.tpot_ms for row in answered if row.tpot_ms is not None],
        "itl": [gap_ms for row in answered for gap_ms in row.itls_ms],
        "e2el": [row.e2el_ms for row in answered if row.e2el_ms is not None],
    }
    levels = run.levels
    if levels is None:
        blocks.append(Note(NO_OBJECTIVE))
    limits_s = {} if levels is None else levels.limits_s
    blocks += [_latency_chart(title, key, values[key], limits_s.get(key)) for key, title in _LATENCIES]
    return Section("Latency", tuple(blocks), run.synthetic is not None)


def _latency_chart(title: str, key: str, values: Sequence[float], limit_s: float | None) -> Block:
    if not values:
        return Note(f"{title}: no answered request has one.")
    ordered = np.sort(values)
    log = bool(ordered[0] > 0 and ordered[-1] > _LONG_TAIL * np.median(ordered))
    what = "gaps of all answered requests" if key == "itl" else "answered requests"
    marks = () if limit_s is None else (Mark(f"objective {1000 * limit_s:.6g} ms", 1000 * limit_s, vertical=True),)
    return Chart(
        title=title,
        caption=f"Share of {what} that took at most so long, n = {len(values)}.",
        x=Axis(f"{key.upper()} (ms)", log=log, low=None if log else 0.0),
        y=Axis(f"share of {'gaps' if key == 'itl' else 'requests'} (%)", low=0.0, high=102.0),
        series=(distribution(key.upper(), values),),
        marks=marks,
    )


def _quantiles(run: Run) -> Block:
    """Lay out the latencies and stages of results.json."""
    rows = []
    for key, title in (*_LATENCIES, *((stage, f"stage: {stage.replace('_', ' ')}") for stage in _STAGES)):
        numbers = [run.number(f"{statistic}_{key}_ms") for statistic in _STATISTICS]
        if any(number is not None for number in numbers):
            rows.append((title, *("-" if number is None else f"{number:.1f}" for number in numbers)))
    if not rows:
        return Note("results.json has no latencies: nothing was answered.")
    caption = "Milliseconds, over completions. The five stages follow one another and add up to the end-to-end latency."
    return Table(caption, ("latency (ms)", *_STATISTICS), tuple(rows))


def attainment_section(run: Run) -> Section:
    """Show how many requests were answered within the service levels, and within multiples of them."""
    title, levels = "Attainment of the objective", run.levels
    if levels is None:
        return Section(title, (Note(NO_OBJECTIVE),))
    if run.requests is None:
        return Section(title, (Note(NO_REQUESTS),))
    sent = [row for row in run.requests if row.is_sent]
    judged = [row for row in sent if is_good(row, levels) is not None]
    if not judged:
        return Section(title, (Note(f"None of {len(sent)} requests can be judged."),))
    limits = ", ".join(f"{name.upper()} {1000 * limit_s:.6g} ms" for name, limit_s in levels.limits_s.items())
    good = sum(bool(is_good(row, levels)) for row in judged)
    told = (
        f"{good} of {len(judged)} requests ({100 * good / len(judged):.1f} %) are within {limits}; failed ones are not."
    )
    if len(judged) < len(sent):
        told += f" {len(sent) - len(judged)} of several completions have no TPOT of their own, and are left out."
    blocks = [Note(told), _attainment_bars(judged, levels), _scaled_chart([excess(row, levels) for row in judged])]
    return Section(title, tuple(blocks), run.synthetic is not None)


def excess(row: RequestRow, levels: ServiceLevels) -> float | None:
    """Give how many times the worst limit was taken: good up to 1, infinite if it failed, None if that is not known.

    Args:
      row: of the request. A single token has no time per output token and meets that limit.
      levels: the limits.
    """
    if row.error is not None:
        return np.inf
    ratios = [_ratio(row, name, limit_s) for name, limit_s in levels.limits_s.items()]
    return None if None in ratios else max(ratio for ratio in ratios if ratio is not None)


def is_good(row: RequestRow, levels: ServiceLevels) -> bool | None:
    """Tell whether a request met all limits; None if that is not known."""
    met = [_meets(row, *limit) for limit in levels.limits_s.items()]
    return None if None in met else all(met)


def _meets(row: RequestRow, name: str, limit_s: float) -> bool | None:
    """Tell whether a request met a limit: as its line says, else by its times; None if neither does."""
    if row.error is not None or name in row.met:
        return row.error is None and bool(row.met[name])
    ratio = _ratio(row, name, limit_s)
    return None if ratio is None else ratio <= 1


def _ratio(row: RequestRow, name: str, limit_s: float) -> float | None:
    """Divide what an answered request took by a limit; None where it does not say."""
    taken_ms = {"ttft": row.ttft_ms, "tpot": row.tpot_ms, "e2el": row.e2el_ms}[name]
    if name == "tpot" and taken_ms is None and (row.num_output_tokens or 0) <= max(1, len(row.lanes)):
        taken_ms = 0.0  # no completion has a second token
    return None if taken_ms is None else taken_ms / (1000 * limit_s)


def attainment(run: Run) -> float | None:
    """Give the share of the requests sent that met the objective, a fraction; None where that is not known."""
    told, levels = run.number("slo_attainment"), run.levels
    sent = [row for row in run.requests or () if row.is_sent]
    if told is not None or levels is None or not sent:
        return told
    good = [is_good(row, levels) for row in sent]
    return None if None in good else sum(map(bool, good)) / len(good)


def goodput(run: Run) -> float | None:
    """Give the requests a second that met the objective; None where that is not known."""
    told, seconds, share = run.number("request_goodput"), run.number("duration"), attainment(run)
    if told is not None or not seconds or share is None:
        return told
    return share * sum(row.is_sent for row in run.requests or ()) / seconds


def _attainment_bars(rows: Sequence[RequestRow], levels: ServiceLevels) -> Block:
    """Compare lanes; a request that failed was on none."""
    answered = [row for row in rows if row.lanes]
    lanes = sorted({lane for row in answered for lane in row.lanes})
    if not lanes:
        return Note("No request was answered, so no lane met any limit.")
    names = [*levels.limits_s, "all"]
    width = 0.8 / len(names)
    series = []
    for index, name in enumerate(names):
        limits = levels.limits_s.items() if name == "all" else [(name, levels.limits_s[name])]
        met = [all(_meets(row, *limit) for limit in limits) for row in answered]
        groups = [[one for row, one in zip(answered, met, strict=True) if lane in row.lanes] for lane in lanes]
        place, share = np.array(lanes) + width * (index - (len(names) - 1) / 2), [100 * np.mean(own) for own in groups]
        series.append(
            Series(
                f"{'all' if name == 'all' else name.upper()} met",
                place,
                np.array(share),
                Kind.BARS,
                index,
                width=0.9 * width,
            )
        )
    return Chart(
        title="Limits met, by lane",
        caption=f"Share of the requests that each lane answered which met each limit, n = {len(answered)}.",
        x=Axis("lane (index)", whole=True),
        y=Axis("share of requests (%)", low=0.0, high=102.0),
        series=tuple(series),
    )


def _scaled_chart(ratios: Sequence[float | None]) -> Block:
    """Show what share a looser or tighter objective would have let pass."""
    ratios = [ratio for ratio in ratios if ratio is not None]
    finite = [ratio for ratio in ratios if np.isfinite(ratio)]
    if not finite:
        return Note("No request was answered, so no multiple of the objective was met.")
    curve = distribution("all limits met", finite)
    return Chart(
        title="Attainment of multiples of the objective",
        caption="Share of requests that would have met all limits, had they been so many times as long, "
        f"n = {len(ratios)}, failed ones included.",
        x=Axis("multiple of all limits (ratio)", low=0.0, high=min(max(2.0, 1.02 * max(finite)), _MOST_MULTIPLES)),
        y=Axis("share of requests (%)", low=0.0, high=102.0),
        series=(curve._replace(y=curve.y * len(finite) / len(ratios)),),
        marks=(Mark("the objective", 1.0, vertical=True),),
    )


def transfer_section(run: Run) -> Section:
    """Show bytes and seconds of the hand-offs from prefill to decode meshes."""
    title = "Hand-off from prefill to decode"
    if run.requests is None:
        return Section(title, (Note(NO_REQUESTS),))
    rows = [row for row in run.requests if row.transfer_ms is not None and row.kv_transfer_bytes is not None]
    moved = [row for row in rows if row.kv_transfer_bytes]
    if not moved:
        return Section(
            title, (Note(f"No bytes moved in {len(rows)} answered requests: prefill and decode share their devices."),)
        )
    mib = np.array([(row.kv_transfer_bytes or 0.0) / _MIB for row in moved])
    seconds = np.array([(row.transfer_ms or 0.0) / 1000 for row in moved])
    of_lane = np.array([row.lanes[0] if row.lanes else 0 for row in moved])
    every = -(-len(moved) // _MOST_DOTS)
    total = f"{mib.sum():.1f} MiB moved with {len(moved)} of {len(rows)} answered requests, {mib.mean():.2f} MiB each."
    dots = tuple(
        Series(f"lane {lane}", mib[::every][own], seconds[::every][own], Kind.DOTS, int(lane))
        for lane in np.unique(of_lane)
        if (own := of_lane[::every] == lane).any()
    )
    size, time = Axis("bytes of a request (MiB)", low=0.0), Axis("hand-off (s)", low=0.0)
    share = Axis("share of requests (%)", low=0.0, high=102.0)
    n = f"n = {len(moved)}"
    shown = "" if every == 1 else f", one of every {every} drawn"
    charts = (
        Chart(title="Bytes and seconds of each hand-off", caption=f"Each dot is a request with a hand-off, {n}{shown}.",
              x=size, y=time, series=dots),
        Chart(title="Seconds of a hand-off", caption=f"Share of requests whose pages arrived within so long, {n}.",
              x=time, y=share, series=(distribution("seconds", seconds.tolist()),)),
        Chart(title="Bytes of a hand-off", caption=f"Share of requests with at most so many bytes to move, {n}.",
              x=size, y=share, series=(distribution("bytes", mib.tolist()),)),
    )  # fmt: skip
    return Section(title, (Note(total), *charts))
