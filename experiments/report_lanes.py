"""Sections of a report about lanes over time, all from the log of routes: shares, signals, backlogs."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.report_charts import Axis, Chart, Kind, Mark, Series, thinned
from experiments.report_html import Block, Note, Section, Table
from experiments.report_run import Run
from streamserve.flowguard import LoggedRoute, RouteContext
from streamserve.flowguard.predict import predict

NO_ROUTES = "routes.jsonl is absent or has no decision, so nothing is known of routing and of lanes over time."
_TIME = Axis("time since the first decision (s)", low=0.0)
_MOST_BINS = 24
_REQUESTS_PER_BIN = 8  # on average, so that a share means something
_FEW = 60  # decisions up to which each one is a dot, so that the line between them is not taken for data
_MIB = 2.0**20


class _Signal(NamedTuple):
    """A number that each lane has at each decision.

    Attributes:
      title: of its chart.
      axis: with its unit.
      read: from what the policy saw, [A].
      measured: it is an average of events, and 0 before the first one: then it is not drawn.
      whole: it is a count.
    """

    title: str
    axis: str
    read: Callable[[RouteContext], np.ndarray]
    measured: bool = False
    whole: bool = False


_SIGNALS = (
    _Signal("Queued prefill", "queued prompt tokens (tokens)", lambda seen: seen.queued_tokens_A),
    _Signal("Running requests", "requests in decode slots (requests)", lambda seen: seen.running_A, whole=True),
    _Signal("Free slots", "free decode slots (slots)", lambda seen: seen.free_slots_A, whole=True),
    _Signal("Free pages", "free pages of the decode mesh (pages)", lambda seen: seen.free_pages_A, whole=True),
    _Signal("Time of a tick", "recent tick (ms)", lambda seen: 1000 * seen.tick_s_A, measured=True),
    _Signal(
        "Accepted tokens", "recent accepted tokens of a step (tokens)", lambda seen: seen.accepted_A, measured=True
    ),
)
_BACKLOGS = (
    _Signal("Waiting for prefill", "prompts not wholly taken (requests)", lambda seen: seen.waiting_A, whole=True),
    _Signal("In transit", "between admission and slot (requests)", lambda seen: seen.in_transit_A, whole=True),
    _Signal("Transfer backlog", "bytes of hand-offs under way (MiB)", lambda seen: seen.backlog_bytes_A / _MIB),
)
_RECENT = _Signal("Recent TTFT", "recent TTFT (s)", lambda seen: seen.ttft_s_A, measured=True)
_PREDICTED = _Signal("Predicted TTFT", "predicted TTFT (s)", lambda seen: seen.waited_s + predict(seen).ttft_s_A)


def routing_section(run: Run) -> Section:
    """Show which lane got how many requests, in all and over time."""
    title = "Routing"
    if not run.routes:
        return Section(title, (Note(NO_ROUTES),))
    arms = np.array([one.route.arm for one in run.routes])
    lanes = range(len(run.routes[0].context.eligible_A))
    rows = []
    for lane in lanes:
        own = [one for one in run.routes if one.route.arm == lane]
        outcomes = [one.outcome for one in own if one.outcome is not None]
        answered = [outcome for outcome in outcomes if outcome.answered]
        ttft = f"{np.median([outcome.ttft_s for outcome in answered]):.3f}" if answered else "-"
        share = f"{100 * len(own) / len(arms):.1f}"
        local = str(sum(one.route.local for one in own))
        rows.append((f"lane {lane}", str(len(own)), share, local, str(len(answered)), ttft))
    columns = ("lane", "decisions", "share (%)", "prefilled locally", "answered", "median TTFT (s)")
    policy = run.setting("routing", "policy")
    told = f"The policy is {policy}. " if policy is not None else ""
    caption = f"{told}{len(arms)} decisions over {len(lanes)} lanes; a request that is routed anew counts again."
    return Section(
        title, (Table(caption, columns, tuple(rows)), _share_chart(run, run.routes)), run.synthetic is not None
    )


def _share_chart(run: Run, routes: Sequence[LoggedRoute]) -> Chart:
    """Stack the lanes' shares of the decisions of each span of time."""
    at_s, arms = _times(run, routes), np.array([one.route.arm for one in routes])
    bins = int(np.clip(len(routes) // _REQUESTS_PER_BIN, 1, _MOST_BINS))
    edges = np.linspace(0.0, max(at_s[-1], 1e-3), bins + 1)
    place = np.clip(np.searchsorted(edges, at_s, side="right") - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    series = []
    for lane in range(len(routes[0].context.eligible_A)):
        own = np.bincount(place[arms == lane], minlength=bins)
        share = 100 * own / np.maximum(counts, 1)
        middle, width = (edges[:-1] + edges[1:]) / 2, float(edges[1] - edges[0])
        series.append(Series(f"lane {lane}", middle, share, Kind.STACK, lane, width=0.94 * width))
    return Chart(
        title="Share of each lane over time",
        caption=f"Share of the decisions in each of {bins} spans of time that sent a request to each lane, "
        f"n = {len(routes)} decisions.",
        x=_TIME,
        y=Axis("share of decisions (%)", low=0.0, high=102.0),
        series=tuple(series),
    )


def signals_section(run: Run) -> Section:
    """Show what the routing policy saw of each lane."""
    title = "Signals of the lanes"
    if not run.routes:
        return Section(title, (Note(NO_ROUTES),))
    objective = run.routes[0].context.objective
    limit = (Mark(f"objective {objective.ttft_s:.6g} s", objective.ttft_s),)
    blocks = [_signal_block(run, run.routes, signal) for signal in _SIGNALS]
    blocks += [_signal_block(run, run.routes, signal, marks=limit) for signal in (_PREDICTED, _RECENT)]
    note = Note(
        "Predicted is the time since arrival plus what the arithmetic of latency-aware routers says, whichever policy "
        "ran; recent is an average over the last ten or so requests that each lane answered."
    )
    return Section(title, (note, *blocks), run.synthetic is not None)


def backlog_section(run: Run) -> Section:
    """Show what waits, before the lanes and in them."""
    title = "Backlogs"
    if not run.routes:
        return Section(title, (Note(NO_ROUTES),))
    blocks = [_signal_block(run, run.routes, signal) for signal in _BACKLOGS]
    waiting = thinned(_times(run, run.routes), np.array([float(one.context.queue) for one in run.routes]))
    queue = Chart(
        title="Waiting for a lane",
        caption=f"Requests that no lane had taken yet, the one that was routed included, {_n(run.routes)}.",
        x=_TIME,
        y=Axis("requests without a lane (requests)", low=0.0, whole=True),
        series=(Series("waiting", *waiting),),
    )
    return Section(title, (queue, *blocks), run.synthetic is not None)


def _signal_block(run: Run, routes: Sequence[LoggedRoute], signal: _Signal, marks: tuple[Mark, ...] = ()) -> Block:
    """Draw a signal of all lanes."""
    at_s = _times(run, routes)
    values_DA = np.stack([signal.read(one.context) for one in routes])
    series = []
    for lane in range(values_DA.shape[1]):
        known = values_DA[:, lane] > 0 if signal.measured else np.ones(len(at_s), bool)
        if known.any():
            kind = Kind.JOINED if known.sum() <= _FEW else Kind.LINE
            series.append(Series(f"lane {lane}", *thinned(at_s[known], values_DA[known, lane]), kind, lane))
    if not series:
        return Note(f"{signal.title}: no lane had measured it by the last decision.")
    return Chart(
        title=f"{signal.title} of each lane",
        caption=f"What each lane reported whenever a request was routed, {_n(routes)}.",
        x=_TIME,
        y=Axis(signal.axis, low=0.0, whole=signal.whole),
        series=tuple(series),
        marks=marks,
    )


def _n(routes: Sequence[LoggedRoute]) -> str:
    """Say how many decisions a curve shows, and whether neighbours were averaged."""
    points = len(thinned(np.zeros(len(routes)), np.zeros(len(routes)))[0])
    return f"n = {len(routes)} decisions" + ("" if points == len(routes) else f", averaged to {points} points at most")


def _times(run: Run, routes: Sequence[LoggedRoute]) -> np.ndarray:
    """Seconds of each decision since the first one of the run."""
    return np.array([one.chosen_s - run.begin_s for one in routes])
