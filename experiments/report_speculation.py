"""Sections of a report about speculation: depths over time with the load, what was accepted, and which arms ran."""

from collections.abc import Sequence

import numpy as np

from experiments.report_charts import Axis, Chart, Kind, Series, thinned
from experiments.report_html import Block, Note, Section
from experiments.report_run import Run
from streamserve.specustream.depth import NOT_RUN
from streamserve.specustream.logged import Logged

NO_DECISIONS = (
    "decisions.jsonl is absent or has no decision: the depth was fixed, or nothing was drafted, or the run kept no log."
)
_RATES = "spec_decode_per_position_acceptance_rates"


def depth_section(run: Run) -> Section:
    """Show the depth of every tick and the slots that were held, lane by lane."""
    title = "Depth over time"
    if not run.decisions:
        return Section(title, (Note(NO_DECISIONS),))
    blocks: list[Block] = [Note(f"The policy is {policy}.")] if (policy := run.setting("speculation", "policy")) else []
    return Section(
        title,
        (*blocks, *(_depth_chart(run, lane, own) for lane, own in _by_lane(run.decisions))),
        run.synthetic is not None,
    )


def _depth_chart(run: Run, lane: int, decisions: Sequence[Logged]) -> Chart:
    at_s = np.array([one.chosen_s - run.begin_s for one in decisions])
    held = [one.context.holder_B != NOT_RUN for one in decisions]
    depth = np.array(
        [one.plan.depth_B[rows].mean() if rows.any() else 0.0 for one, rows in zip(decisions, held, strict=True)]
    )
    batch = np.array([float(rows.sum()) for rows in held])
    times, depths = thinned(at_s, depth)
    averaged = "" if len(times) == len(at_s) else f", averaged to {len(times)} points"
    return Chart(
        title=f"Depth and load of lane {lane}",
        caption=f"Planned depth, mean over the held slots, and held slots of every tick, n = {len(at_s)}{averaged}.",
        x=Axis("time since the first decision (s)", low=0.0),
        y=Axis("depth (drafted tokens a round)", low=0.0, high=1.05 * max(1.0, float(depth.max())), whole=True),
        right=Axis("load (held slots)", low=0.0, high=1.05 * max(1.0, float(batch.max())), whole=True),
        series=(
            Series("held slots (right)", times, thinned(at_s, batch)[1], Kind.STEP, 1, right=True),
            Series("depth (left)", times, depths, Kind.STEP, 0),
        ),
    )


def acceptance_section(run: Run) -> Section:
    """Show acceptance by position, and how many tokens a step accepted."""
    title = "Acceptance"
    steps = _steps(run.decisions or ())
    charts = _from_steps(*steps) if len(steps[0]) else _from_results(run)
    told = [
        f"{label} {value:.3f}{unit}"
        for key, label, unit in (
            ("spec_decode_acceptance_length", "acceptance length, bonus token included,", " tokens"),
            ("spec_decode_acceptance_rate", "acceptance rate", " %"),
        )
        if (value := run.number(key)) is not None
    ]
    notes = (Note(f"Whole run: {', '.join(told)}."),) if told else ()
    return Section(title, (*notes, *charts), run.synthetic is not None)


def _steps(decisions: Sequence[Logged]) -> tuple[np.ndarray, np.ndarray]:
    """Give drafted and accepted tokens of every verification step that drafted."""
    stats = [one.outcome.stats for one in decisions if one.outcome is not None]
    empty = [np.zeros(0, np.int64)]
    drafted = np.concatenate([one.drafted_BR.ravel() for one in stats] or empty)
    accepted = np.concatenate([one.accepted_BR.ravel() for one in stats] or empty)
    return drafted[drafted > 0], accepted[drafted > 0]


def _from_steps(drafted: np.ndarray, accepted: np.ndarray) -> tuple[Block, ...]:
    """Draw from the log of decisions, which knows how deep each step drafted."""
    places = np.arange(1, drafted.max() + 1)
    of_all = np.array([100 * np.mean(accepted >= place) for place in places])
    of_drafted = np.array([100 * np.mean(accepted[drafted >= place] >= place) for place in places])
    n = f"n = {len(drafted)} verification steps that drafted"
    series = (
        Series("of all steps", places - 0.2, of_all, Kind.BARS, 0, width=0.38),
        Series("of the steps that drafted so deep", places + 0.2, of_drafted, Kind.BARS, 1, width=0.38),
    )
    counts = np.bincount(accepted, minlength=int(drafted.max()) + 1)
    return _position_chart(series, n), _histogram(counts / counts.sum(), n)


def _from_results(run: Run) -> tuple[Block, ...]:
    """Draw from results.json, whose rates by position count each step that accepted that far."""
    rates, drafts = run.numbers(_RATES), run.number("spec_decode_num_drafts")
    if not rates or not drafts:
        return (Note("Nothing was drafted: results.json has no acceptance, and no log of decisions has any."),)
    survived = np.array(rates, np.float64)
    places = np.arange(1, len(rates) + 1)
    n = f"n = {drafts:.0f} verification steps that drafted"
    shares = np.concatenate([[1.0], survived]) - np.concatenate([survived, [0.0]])
    return _position_chart((Series("of all steps", places, 100 * survived, Kind.BARS),), n), _histogram(shares, n)


def _position_chart(series: tuple[Series, ...], n: str) -> Chart:
    return Chart(
        title="Acceptance by position",
        caption=f"Share of steps that accepted the draft token at each position, {n}.",
        x=Axis("position in the draft (tokens)", whole=True),
        y=Axis("accepted (% of steps)", low=0.0, high=102.0),
        series=series,
    )


def _histogram(shares: np.ndarray, n: str) -> Chart:
    return Chart(
        title="Accepted tokens of a step",
        caption=f"Share of steps that accepted just so many draft tokens, the bonus token left out, {n}.",
        x=Axis("accepted draft tokens of a step (tokens)", whole=True),
        y=Axis("share of steps (%)", low=0.0),
        series=(Series("steps", np.arange(len(shares)), 100 * shares, Kind.BARS),),
    )


def arms_section(run: Run) -> Section:
    """Show how often each depth was chosen."""
    title = "Arms by depth"
    if not run.decisions:
        return Section(title, (Note(NO_DECISIONS),))
    lanes = _by_lane(run.decisions)
    tiers = sorted({int(tier) for one in run.decisions for tier in one.context.tiers_A})
    series = []
    for index, (lane, own) in enumerate(lanes):
        chosen = [int(one.context.tiers_A[one.plan.arm]) for one in own]
        share = np.array([100 * chosen.count(tier) / len(chosen) for tier in tiers])
        width = 0.8 / len(lanes)
        place = np.array(tiers) + width * (index - (len(lanes) - 1) / 2)
        series.append(Series(f"lane {lane} ({len(own)} ticks)", place, share, Kind.BARS, index, width=0.94 * width))
    chart = Chart(
        title="Which depth ran",
        caption=f"Share of each lane's ticks that ran each compiled depth ({', '.join(map(str, tiers))}), "
        f"n = {len(run.decisions)} ticks.",
        x=Axis("depth of the arm (drafted tokens a round)", whole=True),
        y=Axis("share of ticks (%)", low=0.0, high=102.0),
        series=tuple(series),
    )
    return Section(title, (chart,), run.synthetic is not None)


def _by_lane(decisions: Sequence[Logged]) -> list[tuple[int, list[Logged]]]:
    lanes = sorted({one.lane for one in decisions})
    return [(lane, [one for one in decisions if one.lane == lane]) for lane in lanes]
