"""Tables of the report on the StreamServe paper: each a function from rows and verdicts to Markdown."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.depth_verdicts import Interval
from experiments.paper_arms import Arm
from experiments.paper_claims import CLAIMS, SETTING, Board, ratio_text, tpots_s
from experiments.paper_effects import FACTOR_NAMES, SUBSETS, Effects
from experiments.paper_rows import METRICS, Cell, Row, Study, interval
from experiments.paper_verdicts import MIN_RUNS, Comparison

REFUSED = "refused"


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Lay out a table."""
    rows = (columns, ["---"] * len(columns), *lines)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows)


def setting_table(study: Study) -> str:
    """What was evaluated, there and here."""
    header = study.header
    values = next(iter(study.settings.values()))
    prompts = ", ".join(f"{name} {facts['prompts']} of {facts['lines']}" for name, facts in header["workloads"].items())
    sampling = ", ".join(f"{name} {value}" for name, value in sorted(header["sampling"].items()))
    counts = ", ".join(str(count) for count in sorted({study.engines[name]["devices"] for name in study.settings}))
    arrivals = f"all at once, or {header['rate']:g} a second (Poisson)"
    here = {
        "model": f"{values['model.model']} with {values['speculation.model']}, {values['model.dtype']}",
        "devices": f"{counts} x {header['devices'][0].split(' ', 1)[-1]} on {header['cores']} CPU cores",
        "prompts": prompts,
        "lengths, arrivals, objectives": f"{sampling}; {arrivals}; no objective",
        "throughput": f"fleet output tokens a second, and the {METRICS['paper_rate'].title} under its own name",
        "comparison": "one factor at a time; all at once only where it says so",
    }
    lines = [[what, reported, source, here[what]] for what, reported, source in SETTING]
    return markdown(["what", "there, as reported", "by", "here"], lines)


def fleets_table(study: Study) -> str:
    """The fleets that could be built."""
    columns = [
        "fleet",
        "topology",
        "pairs",
        "devices",
        "of a decode mesh",
        "slots",
        "drafter",
        "programs",
        "warm-up, s",
    ]
    lines = [
        [
            name,
            values["topology.topology"],
            str(values["topology.num_pairs"]),
            str(study.engines[name]["devices"]),
            str(values["topology.decode_devices"]),
            str(values["topology.num_pairs"] * values["pipeserve.max_num_seqs"]),
            values["speculation.method"],
            str(study.engines[name]["programs"]),
            f"{study.engines[name]['warmup_s']:.0f}",
        ]
        for name, values in study.settings.items()
    ]
    return markdown(columns, lines)


def claims_table(board: Board) -> str:
    """The paper's claims, as reported, beside what the rows say."""
    found = [(claim, claim.find(board)) for claim in CLAIMS]
    lines = [
        [one.about, one.reported, one.source, finding.here, finding.verdict, str(finding.runs or "-")]
        for one, finding in found
    ]
    return markdown(["claim", "as reported, not verified", "by", "here", "verdict", "runs"], lines)


def speeds_table(comparisons: Sequence[Comparison]) -> str:
    """Speed-ups of one mode: a line a comparison, a column a metric."""
    names = comparisons[0].cell.metrics
    columns = ["workload", "over", *(METRICS[name].title for name in names)]
    lines = [
        [one.cell.group, str(one.base), *(ratio_text(one.speeds[name]) if one.speeds else REFUSED for name in names)]
        for one in comparisons
    ]
    return markdown(columns, lines)


def effects_table(found: Sequence[Effects], metric: str) -> str:
    """Effects of one mode and metric: a line an effect, a column a workload."""
    lines = [
        [
            " x ".join(factors),
            *(ratio_text(one.by_subset[factors][metric]) if one.by_subset else REFUSED for one in found),
        ]
        for factors in SUBSETS
    ]
    return markdown(["effect", *(one.cell.group for one in found)], lines)


def arms_table(study: Study, cell: Cell) -> str:
    """What every arm did on one workload."""
    times = [text for name in ("latency", "ttft", "tpot") for text in (_titled(name), "p50", "p99")]
    rates = [_titled(name) for name in cell.metrics if not METRICS[name].is_cost]
    columns = [*times, *rates, "acceptance length", "prompts by pair"]
    lines = []
    for arm in sorted(cell.runs):
        failed = any(run["failed"] for run in cell.runs[arm])
        lines.append([str(arm), *(["failed"] * len(columns) if failed else _arm_line(study, cell, arm))])
    return markdown(["arm", *columns], lines)


def _titled(name: str) -> str:
    return f"{METRICS[name].title}, {METRICS[name].unit}"


def _arm_line(study: Study, cell: Cell, arm: Arm) -> list[str]:
    runs = cell.runs[arm]
    shown = {
        name: _mean(METRICS[name].scale * cell.values[arm][index], METRICS[name].scale * cell.drawn[arm][:, index])
        for index, name in enumerate(METRICS)
    }
    latency_s, ttft_s = (np.array([value for run in runs for value in run[name]]) for name in ("latency_s", "ttft_s"))
    lanes = Counter(lane for run in runs for lane in run["lane"])
    pairs = study.settings[arm.fleet]["topology.num_pairs"]
    drafts, accepted = (sum(run[name] for run in runs) for name in ("drafts", "accepted_tokens"))
    return [
        *(shown["latency"], *_percentiles(latency_s)),
        *(shown["ttft"], *_percentiles(ttft_s)),
        *(shown["tpot"], *_percentiles(tpots_s(runs))),
        *(shown[name] for name in cell.metrics if not METRICS[name].is_cost),
        f"{1 + accepted / drafts:.2f}" if drafts else "-",
        " / ".join(str(lanes[lane]) for lane in range(pairs)),
    ]


def _mean(value: float, drawn_R: np.ndarray) -> str:
    span = interval(value, drawn_R)
    return f"{value:.1f}" + ("" if np.isnan(span.low) else f" [{span.low:.1f}, {span.high:.1f}]")


def _percentiles(values_s: np.ndarray) -> tuple[str, str]:
    if not len(values_s):
        return "-", "-"
    median, p99 = 1e3 * np.percentile(values_s, [50, 99])
    return f"{median:.1f}", f"{p99:.1f}"


def losses(found: Mapping[tuple[str, str], Effects], comparisons: Sequence[Comparison]) -> str:
    """Say for each factor where it makes things worse, where better, and where nothing can be told."""
    paragraphs = []
    for factor in FACTOR_NAMES:
        main = [
            (one.cell, name, speed)
            for one in found.values()
            for name, speed in one.by_subset.get((factor,), {}).items()
        ]
        simple = [(one, speed) for one in comparisons if one.factor == factor for speed in one.speeds.values()]
        if not main or not simple:
            paragraphs.append(f"- **{factor}**: {REFUSED}.")
            continue
        enough = [entry for entry in main if entry[0].num_runs >= MIN_RUNS]
        better, worse = (sum(speed.low > 1 for _, _, speed in enough), [one for one in enough if one[2].high < 1])
        few = [entry for entry in main if entry[0].num_runs < MIN_RUNS]
        doubtful = [entry for entry in few if round(entry[2].value, 2) < 1]  # as shown; one run has no interval
        lost = sum(speed.high < 1 for one, speed in simple if one.cell.num_runs >= MIN_RUNS)
        paragraphs.append(
            f"- **{factor}**: main effects (workload x mode x metric): {better} gains, {len(worse)} losses, "
            f"{len(main) - better - len(worse)} that cannot be told from none, {len(main) - len(enough)} of them for "
            f"want of runs. With the other factors held: {lost} losses in {len(simple)} comparisons. Losses: "
            f"{_listed(worse)}. Below one, but of too few runs: {_listed(doubtful)}."
        )
    return "\n".join(paragraphs)


def _listed(entries: Sequence[tuple[Cell, str, Interval]]) -> str:
    told = (f"{cell.group}, {cell.mode}, {METRICS[name].title} {ratio_text(speed)}" for cell, name, speed in entries)
    return "; ".join(told) or "none"


def refusals(comparisons: Sequence[Comparison], found: Mapping[Any, Effects]) -> list[str]:
    """List what was refused, and why."""
    pairs = [
        f"{one.cell.mode}, {one.cell.group}: {one.other} over {one.base} ({one.factor}): {one.refusal}"
        for one in comparisons
        if one.refusal is not None
    ]
    whole = [
        f"{one.cell.mode}, {one.cell.group}: effects: {'; '.join(one.refusals)}"
        for one in found.values()
        if one.refusals
    ]
    return [*pairs, *whole]


def machine(header: Row) -> str:
    """Say what ran where, with which software."""
    git = header["git"] or {"commit": "unknown", "dirty": False}
    changed = " with changes that are not committed" if git["dirty"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items() if version)
    return (
        f"Machine: {header['platform']}, {header['cores']} CPU cores, backend {header['backend']}, "
        f"{len(header['devices'])} devices ({header['devices'][0].split(' ', 1)[-1]}). "
        f"Software: Python {header['python']}, {versions}. Commit {git['commit'][:12]}{changed}. "
        f"Begun {header['time']}, seed {header['seed']}."
    )
