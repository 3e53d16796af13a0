"""Tables of a comparison of routers, from its rows alone.

  python -m experiments.router_report --input=rows.jsonl --output=table.md

The same rows give the same bytes. Goodput is what counts: requests a second that met both limits. Its intervals, and
those of ratios, are bootstraps over the repeats, in each of which all routers met the same requests. Exit codes: 0
done; 2 the rows or the output are unusable.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging

from experiments import common
from streamserve.bandits import bootstrap

OURS = "flowguard"  # who is judged
MARGIN = 0.03  # of the first's goodput, within which a router is as good as the first
LEVEL = 0.95
Row = Mapping[str, Any]


class Interval(NamedTuple):
    """A number and where it lies; the bounds are NaN where there was one repeat alone."""

    value: float
    low: float
    high: float

    def show(self, digits: int) -> str:
        """Write it down."""
        shown = f"{self.value:.{digits}f}"
        return shown if np.isnan(self.low) else f"{shown} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


class Standing(NamedTuple):
    """How a router did in a scenario at a load."""

    router: str
    goodput: Interval  # requests a second
    to_best: Interval  # over that of the first
    rows: list[Row]


class Cell(NamedTuple):
    """A scenario at a load: routers, the first in front."""

    scenario: str
    load: float
    standings: list[Standing]

    @property
    def repeats(self) -> int:
        """Repeats that every router has."""
        return len(self.standings[0].rows)

    def of(self, router: str) -> Standing | None:
        """Find a router."""
        return next((standing for standing in self.standings if standing.router == router), None)


def read_rows(path: pathlib.Path) -> tuple[Row, list[Row]]:
    """Read the header and the rows.

    Raises:
      RunError: it cannot be read, or is no such file.
    """
    lines = common.read_json_lines(path)
    if len(lines) < 2 or lines[0].get("kind") != "header" or any("router" not in row for row in lines[1:]):
        raise common.RunError(f"{str(path)!r} does not hold a header of experiments.compare_routers and rows")
    return lines[0], lines[1:]


def judge(rows: Sequence[Row]) -> list[Cell]:
    """Compare the routers of every scenario at every load, on the repeats that all of them have."""
    cells = []
    for scenario, load in dict.fromkeys((row["scenario"], row["load"]) for row in rows):
        by: dict[str, dict[int, Row]] = {}
        for row in rows:
            if (row["scenario"], row["load"]) == (scenario, load):
                by.setdefault(row["router"], {})[row["seed"]] = row
        seeds = sorted(set.intersection(*(set(own) for own in by.values())))
        if seeds:  # a run that was cut short may leave a load without a whole repeat
            cells.append(
                Cell(scenario, load, _stand({name: [own[seed] for seed in seeds] for name, own in by.items()}))
            )
    return cells


def _stand(by: Mapping[str, list[Row]]) -> list[Standing]:
    """Order routers by their mean goodput; the rows of all are of the same repeats."""
    names = sorted(by)
    goodput_SR = np.array([[row["goodput"] for row in by[name]] for name in names]).T
    mean_R = goodput_SR.mean(axis=0)
    best = int(mean_R.argmax())
    how = bootstrap.Bootstrap(mean_block=1, seed=0, level=LEVEL)
    means_NR = bootstrap.resampled_means(goodput_SR, how)
    alone = len(goodput_SR) == 1
    standings = [
        Standing(
            name,
            _interval(mean_R[index], means_NR[:, index], alone=alone),
            _interval(_ratio(mean_R[index], mean_R[best]), _ratio(means_NR[:, index], means_NR[:, best]), alone=alone),
            by[name],
        )
        for index, name in enumerate(names)
    ]
    return sorted(standings, key=lambda standing: (-standing.goodput.value, standing.router))


def _ratio(over: Any, under: Any) -> Any:
    """Divide; where nothing was good, everyone is as good as the first."""
    return np.where(np.asarray(under) > 0, over / np.maximum(under, 1e-12), 1.0)


def _interval(value: Any, values_N: np.ndarray, *, alone: bool) -> Interval:
    if alone:
        return Interval(float(value), np.nan, np.nan)
    low, high = np.percentile(values_N, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(value), float(low), float(high))


def verdict(cell: Cell, router: str = OURS) -> str:
    """Say in a line how a router stands: first, as good as the first, or by how much it lost, and whether surely."""
    first, own = cell.standings[0], cell.of(router)
    if own is None:
        return f"`{router}` did not run."
    if own is first:
        return f"`{router}` is first."
    ratio = own.to_best.show(3)
    if own.to_best.value >= 1 - MARGIN:
        return f"`{router}` is within {MARGIN:.0%} of the first, `{first.router}`: {ratio}."
    chance = " These repeats do not rule out that it is within." if own.to_best.high >= 1 - MARGIN else ""
    return f"`{router}` loses {1 - own.to_best.value:.1%} to `{first.router}`: {ratio}.{chance}"


def tables(header: Row, rows: Sequence[Row]) -> str:
    """Lay the comparison out as Markdown."""
    git = header["git"] or {"commit": "unknown", "dirty": False}
    made_up = "SYNTHETIC: stream pairs are simulated, and what their work takes is made up. No number is a machine's."
    cells = judge(rows)
    lines = [
        f"# {'SYNTHETIC. ' if header['synthetic'] else ''}Routers, {header['mode']}",
        *([made_up] if header["synthetic"] else []),
        f"`{header['command']}`",
        f"Seed {header['seed']}, commit {git['commit'][:12]}{' and changes' if git['dirty'] else ''}, "
        f"{header['platform']}. Limits: {1e3 * header['ttft_s']:g} ms to the first token, "
        f"{1e3 * header['tpot_s']:g} ms a token after it.",
        "## Goodput over the first's",
        _summary(cells),
    ]
    for cell in cells:
        lines += [f"## {cell.scenario}, load {cell.load:g}", _cell_table(cell), verdict(cell)]
    return "\n\n".join(lines) + "\n"


def _summary(cells: Sequence[Cell]) -> str:
    """A line a router: the ratio to the first of every cell, the worst and the mean."""
    names = list(dict.fromkeys(standing.router for cell in cells for standing in cell.standings))
    ratios: dict[str, list[float]] = {}
    for name in names:
        found = [cell.of(name) for cell in cells]
        ratios[name] = [np.nan if one is None else one.to_best.value for one in found]
    names.sort(key=lambda name: -float(np.nanmean(ratios[name])))
    columns = ["router", "mean", "worst", *(f"{cell.scenario} {cell.load:g}" for cell in cells)]
    lines = []
    for name in names:
        values = ratios[name]
        shown = ["-" if np.isnan(value) else f"{value:.3f}" for value in values]
        lines.append([f"`{name}`", f"{np.nanmean(values):.3f}", f"{np.nanmin(values):.3f}", *shown])
    repeats = sorted({cell.repeats for cell in cells})
    note = f"The first is the router with the most goodput there. Means over {'/'.join(map(str, repeats))} repeats."
    return f"{_markdown(columns, lines)}\n\n{note}"


def _cell_table(cell: Cell) -> str:
    columns = ["router", f"goodput, requests/s [{LEVEL:.0%}]", f"over the first [{LEVEL:.0%}]", "good, %"]
    columns += ["TTFT p50/p99, ms", "TPOT p50/p99, ms", "tokens/s", "share a lane, %", "local, %"]
    lines = []
    for standing in cell.standings:
        rows = standing.rows
        shares = np.mean([row["lane_share"] for row in rows], axis=0)
        lines.append(
            [
                f"`{standing.router}`",
                standing.goodput.show(1),
                standing.to_best.show(3),
                f"{100 * np.mean([row['attainment'] for row in rows]):.1f}",
                *(f"{_mean(rows, f'p50_{what}_ms')}/{_mean(rows, f'p99_{what}_ms')}" for what in ("ttft", "tpot")),
                f"{np.mean([row['output_throughput'] for row in rows]):.0f}",
                " ".join(f"{100 * share:.0f}" for share in shares),
                f"{100 * np.mean([row['local_share'] for row in rows]):.0f}",
            ]
        )
    rate = np.mean([row["rate"] for row in cell.standings[0].rows])
    return f"{rate:.1f} requests a second.\n\n{_markdown(columns, lines)}"


def _mean(rows: Sequence[Row], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    return f"{np.mean(values):.3g}" if values else "-"


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *lines))


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags; on call and not on import, since other scripts have flags of the same names."""
    flags.DEFINE_string("input", None, "Rows of experiments.compare_routers.", required=True, flag_values=values)
    flags.DEFINE_string("output", None, "Where the tables go; Markdown.", required=True, flag_values=values)


def report(rows: pathlib.Path, output: pathlib.Path) -> int:
    """Write the tables; returns the exit code."""
    try:
        output.write_text(tables(*read_rows(rows)), encoding="utf-8")
    except (common.RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return common.EXIT_UNUSABLE
    print(output)
    return common.EXIT_OK


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    del argv
    logging.set_verbosity(logging.WARNING)
    return report(pathlib.Path(flags.FLAGS.input), pathlib.Path(flags.FLAGS.output))


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
