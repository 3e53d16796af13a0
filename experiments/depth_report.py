"""Tables and plots of a comparison of depth policies, from its rows alone.

  python -m experiments.depth_report --input=rows.jsonl --output_dir=DIR [--decisions=decisions.jsonl]

It writes table.md, and depth, pulls, acceptance, regret and speed as PNG and SVG, as far as the rows have them; a log
of decisions adds the first four of its own as decisions_*. The same rows give the same bytes. Where acceptance was
drawn at random, everything says SYNTHETIC. Exit codes are those of `experiments.compare_depth`.
"""

import json
import pathlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging

from experiments import common
from experiments.depth_arms import PLAIN, curve, fixed_arm, fixed_depth
from streamserve.specustream import decision_log
from streamserve.specustream.depth import expected_tokens

try:
    import matplotlib as mpl
    from matplotlib import figure
    from matplotlib.backends import backend_agg
except ImportError:  # an optional dependency: tables do without
    mpl = backend_agg = figure = None

MIX = "all workloads"
RESAMPLES, LEVEL = 2000, 0.95
SPLIT_REPEATS = 4  # from so many on, the best fixed depth is chosen on half of the repeats
Row = Mapping[str, Any]
# Of viridis, from shallow to deep.
_DEPTH_COLORS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
_POSITIONS = "spec_decode_per_position_acceptance_rates"


class Interval(NamedTuple):
    """A ratio and where it lies; the bounds are NaN where there was one measurement alone."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if np.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]")


class Panel(NamedTuple):
    """Tokens and seconds of every prompt in every repeat."""

    tokens_RP: np.ndarray
    seconds_RP: np.ndarray


class Verdict(NamedTuple):
    """What is known of an arm on a workload or on a mix; ratios are None where they are refused.

    Attributes:
      group: the workload, or the cost shape of a simulation.
      arm: name.
      to_plain: speed over plain decoding's.
      to_fixed: speed over the best fixed depth's.
      best: the best fixed arm.
      refusal: why there are no ratios.
      rows: of the arm.
    """

    group: str
    arm: str
    to_plain: Interval | None
    to_fixed: Interval | None
    best: str | None
    refusal: str | None
    rows: list[Row]


def read_rows(path: pathlib.Path) -> tuple[Row, list[Row]]:
    """Read the header and the rows.

    Raises:
      RunError: it cannot be read, or is no such file.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise common.RunError(f"cannot read {str(path)!r}: {error}") from None
    if len(lines) < 2 or lines[0].get("kind") != "header" or lines[0].get("mode") not in ("simulate", "engine"):
        raise common.RunError(f"{str(path)!r} does not hold a header of experiments.compare_depth and rows")
    return lines[0], lines[1:]


def ratio(over: Panel, under: Panel) -> Interval:
    """Compare the tokens a second of two arms on the same prompts and repeats.

    Returns:
      The ratio, and the percentile bootstrap's interval: prompts and repeats are drawn again, the same for both arms.
    """
    repeats, prompts = over.tokens_RP.shape
    generator = np.random.default_rng(0)
    drawn_NR = generator.multinomial(repeats, [1 / repeats] * repeats, size=RESAMPLES)
    drawn_NP = generator.multinomial(prompts, [1 / prompts] * prompts, size=RESAMPLES)
    sums = [((drawn_NR @ values_RP) * drawn_NP).sum(axis=1) for values_RP in (*over, *under)]
    value = (over.tokens_RP.sum() / over.seconds_RP.sum()) / (under.tokens_RP.sum() / under.seconds_RP.sum())
    if repeats * prompts == 1:
        return Interval(float(value), np.nan, np.nan)
    tails = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    low, high = np.percentile((sums[0] / sums[1]) / (sums[2] / sums[3]), tails)
    return Interval(float(value), float(low), float(high))


def judge_engine(header: Row, rows: Sequence[Row]) -> list[Verdict]:
    """Compare the arms on every workload, and on all together where there are several."""
    names = list(dict.fromkeys(row["workload"] for row in rows))
    groups = {name: [name] for name in names} | ({MIX: names} if len(names) > 1 else {})
    verdicts = []
    for group, members in groups.items():
        chosen = [row for row in rows if row["workload"] in members]
        counts = Counter(row["repeat"] for row in chosen)  # a run that was cut short may leave part of a repeat
        whole = sorted(repeat for repeat, count in counts.items() if count == max(counts.values()))
        by_arm: dict[str, list[Row]] = {}
        for row in sorted(chosen, key=lambda row: (row["repeat"], members.index(row["workload"]))):
            if row["repeat"] in whole:
                by_arm.setdefault(row["arm"], []).append(row)
        verdicts += _judge_group(header, group, by_arm, whole)
    return verdicts


def _judge_group(header: Row, group: str, by_arm: Mapping[str, list[Row]], repeats: Sequence[int]) -> Iterator[Verdict]:
    if PLAIN not in by_arm:
        raise common.RunError(f"there is no run of {PLAIN}, plain decoding, on {group!r}")
    refusals = {arm: _refusal(header, rows) for arm, rows in by_arm.items()}
    if refusals[PLAIN] is not None:
        refusals = dict.fromkeys(by_arm, f"plain decoding cannot be compared with: {refusals[PLAIN]}")
    splits = len(repeats) >= SPLIT_REPEATS
    choosing, judging = (repeats[::2], repeats[1::2]) if splits else (repeats, repeats)
    rates = {
        arm: ratio(_panel(rows, choosing), _panel(by_arm[PLAIN], choosing)).value
        for arm, rows in by_arm.items()
        if refusals[arm] is None and fixed_depth(arm) is not None
    }
    best = max(sorted(rates), key=lambda arm: rates[arm]) if rates else None
    for arm in sorted(by_arm, key=lambda arm: (fixed_depth(arm) is None, fixed_depth(arm), arm)):
        rows, to_plain, to_fixed = by_arm[arm], None, None
        if refusals[arm] is None and best is not None:
            to_plain = ratio(_panel(rows, repeats), _panel(by_arm[PLAIN], repeats))
            to_fixed = ratio(_panel(rows, judging), _panel(by_arm[best], judging))
        yield Verdict(group, arm, to_plain, to_fixed, best, refusals[arm], rows)


def _refusal(header: Row, rows: Sequence[Row]) -> str | None:
    """Say why an arm must not be compared."""
    failed, compiled = (sum(row[key] for row in rows) for key in ("failed", "compilations_after_warmup"))
    if failed:
        return f"{failed} prompts failed"
    if compiled:
        return f"{compiled} programs were compiled while it ran"
    if header["compares_tokens"]:
        different = max(row["prompts"] - row["same_as_plain"] for row in rows)
        if different > header["max_different"]:
            return f"{different} prompts of a run differ from plain decoding, allowed are {header['max_different']}"
    if rows[0]["arm"] != PLAIN and not any(row["spec_decode_draft_tokens"] for row in rows):
        return "it drafted nothing"
    return None


def _panel(rows: Sequence[Row], repeats: Sequence[int]) -> Panel:
    """Lay the prompts of all workloads side by side, a line a repeat."""
    keys = ("prompt_tokens", "prompt_seconds")
    lines = [[np.concatenate([row[key] for row in rows if row["repeat"] == r]) for r in repeats] for key in keys]
    return Panel(*(np.array(line, np.float64) for line in lines))


def judge_simulation(header: Row, rows: Sequence[Row]) -> list[Verdict]:
    """Compare the arms of each cost over the mix of its cells and batches, as many tokens from each.

    The intervals are the lowest and the highest seed's.
    """
    del header
    verdicts = []
    for cost in dict.fromkeys(row["cost"] for row in rows):
        seconds: dict[tuple[str, int], float] = {}
        by_arm: dict[str, list[Row]] = {}
        for row in rows:
            if row["cost"] == cost:
                key = row["policy"], row["seed"]
                seconds[key] = seconds.get(key, 0.0) + 1 / row["goodput"]
                by_arm.setdefault(row["policy"], []).append(row)
        best = fixed_arm(next(iter(by_arm.values()))[0]["mix_fixed"])
        for arm, own in by_arm.items():
            to = {
                base: [seconds[base, seed] / seconds[arm, seed] for seed in sorted({row["seed"] for row in own})]
                for base in (PLAIN, best)
            }
            ends = {base: (min(over), max(over)) if len(over) > 1 else (np.nan, np.nan) for base, over in to.items()}
            spans = {base: Interval(float(np.mean(over)), *ends[base]) for base, over in to.items()}
            verdicts.append(Verdict(cost, arm, spans[PLAIN], spans[best], best, None, own))
    return verdicts


def judge(header: Row, rows: Sequence[Row]) -> list[Verdict]:
    """Compare the arms, whatever ran them."""
    return (judge_simulation if header["mode"] == "simulate" else judge_engine)(header, rows)


def tables(header: Row, rows: Sequence[Row]) -> tuple[str, list[str]]:
    """Lay the comparison out as Markdown; gives the refusals, too."""
    verdicts = judge(header, rows)
    drawn = "acceptance is drawn at random" + (" and time from a table" if header["mode"] == "simulate" else "")
    git = header["git"] or {"commit": "unknown", "dirty": False}
    lines = [
        f"# {'SYNTHETIC. ' if header['synthetic'] else ''}Depth policies, {header['mode']}",
        *([f"SYNTHETIC: {drawn}. No number here is a model's."] if header["synthetic"] else []),
        f"`{header['command']}`",
        f"Seed {header['seed']}, commit {git['commit'][:12]}{' and changes' if git['dirty'] else ''}, "
        f"jax {header['versions']['jax']}, {header['platform']}, {', '.join(header['devices'])}"
        + (f", {header['concurrency']} requests at once." if "concurrency" in header else "."),
    ]
    for group in dict.fromkeys(verdict.group for verdict in verdicts):
        own = [verdict for verdict in verdicts if verdict.group == group]
        mark = " (SYNTHETIC)" if header["synthetic"] else ""
        if header["mode"] == "simulate":
            lines += [f"## {group}{mark}", _simulation_table(header, own), _cells_table(own)]
        else:
            lines += [f"## {group}{mark}", _engine_table(own), _how_chosen(own)]
    return "\n\n".join(lines) + "\n", [f"{v.group}, {v.arm}: {v.refusal}" for v in verdicts if v.refusal is not None]


def _engine_table(verdicts: Sequence[Verdict]) -> str:
    best = verdicts[0].best or "the best fixed depth"
    columns = ["arm", "tokens/s", f"over plain [{LEVEL:.0%}]", f"over {best} [{LEVEL:.0%}]", "acceptance, %", "length"]
    columns += ["depth", "verify steps", "same as plain", "plan, us/tick", "learn, us/tick", "of a tick, %"]
    lines = []
    for verdict in verdicts:
        rows = verdict.rows
        drafted, accepted, drafts, steps = (
            sum(row[key] or 0 for row in rows)
            for key in (
                "spec_decode_draft_tokens",
                "spec_decode_accepted_tokens",
                "spec_decode_num_drafts",
                "verify_steps",
            )
        )
        compared = [row for row in rows if row["same_as_plain"] is not None]
        same = (
            "/".join(str(sum(row[key] for row in compared)) for key in ("same_as_plain", "prompts"))
            if compared
            else "-"
        )
        lines.append([
            verdict.arm,
            f"{np.median([row['output_throughput'] for row in rows]):.1f}",
            str(verdict.to_plain or "refused"),
            str(verdict.to_fixed or "refused"),
            f"{100 * accepted / drafted:.1f}" if drafted else "-",
            f"{1 + accepted / drafts:.2f}" if drafts else "-",
            f"{drafted / steps:.2f}" if steps else "-",
            str(steps),
            same,
            *(_mean(rows, key, 1) for key in ("plan_us", "learn_us")),
            _mean(rows, "controller_share", 100),
        ])  # fmt: skip
    refused = [f"- {verdict.arm} is refused: {verdict.refusal}." for verdict in verdicts if verdict.refusal]
    return "\n\n".join([_markdown(columns, lines), *refused])


def _mean(rows: Sequence[Row], key: str, scale: float) -> str:
    values = [scale * row[key] for row in rows if row[key] is not None]
    return f"{np.mean(values):.2f}" if values else "-"


def _how_chosen(verdicts: Sequence[Verdict]) -> str:
    """Say how the best fixed depth was found."""
    repeats = len({row["repeat"] for row in verdicts[0].rows})
    if verdicts[0].best is None:
        return "No fixed depth can be compared."
    how = f"It is chosen in hindsight on all {repeats} repeats, which favours it."
    if repeats >= SPLIT_REPEATS:
        how = "It is chosen on every other repeat, and compared on the others."
    return f"The best fixed depth is {verdicts[0].best}. {how} Intervals: bootstrap over prompts and repeats, paired."


def _simulation_table(header: Row, verdicts: Sequence[Verdict]) -> str:
    best, ticks = verdicts[0].best, header["config"]["simulation"]["ticks"]
    columns = ["policy", f"over {best} on the mix [seeds]", "over plain on the mix [seeds]", "worst cell", "regret, %"]
    columns += ["switches/100 ticks"]
    lines = []
    for verdict in sorted(verdicts, key=lambda verdict: -verdict.to_fixed.value if verdict.to_fixed else 0.0):
        rows = verdict.rows
        lost = 100 * sum(row["regret"] for row in rows) / sum(row["tokens"] for row in rows)
        switches = 100 * float(np.mean([row["switches"] for row in rows])) / ticks
        worst = min(_by_cell(rows).values())
        shown = [f"{worst:.3f}", f"{round(lost, 2) + 0.0:.2f}", f"{switches:.1f}"]  # the sum makes -0.0 a 0.0
        mark = " (*)" if rows[0]["stops"] else ""
        lines.append([verdict.arm + mark, str(verdict.to_fixed), str(verdict.to_plain), *shown])
    note = (
        f"The mix has as many tokens from every cell and batch; {best} is its best single depth, in hindsight. `worst "
        "cell` is the least ratio to the best fixed depth of a cell and batch, also in hindsight. `regret` is what the "
        "best depth of every tick would have brought in the same time and the policy did not, in percent of its tokens."
    )
    if any(verdict.rows[0]["stops"] for verdict in verdicts):
        note += " (*) It stops by the draft's confidence, which nothing simulates: here it drafts to the end, always."
    return f"{_markdown(columns, lines)}\n\n{note}"


def _cells_table(verdicts: Sequence[Verdict]) -> str:
    """Lay out the ratio to the best fixed depth of each cell."""
    cells = list(_by_cell(verdicts[0].rows))
    best = {(row["cell"], row["batch"]): fixed_arm(row["best_fixed"]) for row in verdicts[0].rows}
    policies = [verdict for verdict in verdicts if fixed_depth(verdict.arm) is None]
    lines = [[cell, str(batch), best[cell, batch]] for cell, batch in cells]
    for verdict in policies:
        for line, value in zip(lines, _by_cell(verdict.rows).values(), strict=True):
            line.append(f"{value:.3f}")
    head = "Tokens a second over the best fixed depth of the cell and batch, mean over seeds:"
    return f"{head}\n\n{_markdown(['cell', 'batch', 'best', *(v.arm for v in policies)], lines)}"


def _by_cell(rows: Sequence[Row]) -> dict[tuple[str, int], float]:
    """Average the ratio to the best fixed depth over seeds."""
    ratios: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        ratios.setdefault((row["cell"], row["batch"]), []).append(row["ratio_to_best_fixed"])
    return {key: float(np.mean(values)) for key, values in ratios.items()}


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *lines))


def write_plots(header: Row, rows: Sequence[Row], output_dir: pathlib.Path) -> list[pathlib.Path]:
    """Draw what the rows have: one repeat, or the first seed at the last batch of the first cost; speed over all."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        if header["mode"] == "engine":
            if row["repeat"] == 0:
                groups.setdefault(row["workload"], {})[row["arm"]] = row
        elif row["regret_curve"] is not None and (row["cost"], row["batch"]) == (rows[0]["cost"], rows[-1]["batch"]):
            groups.setdefault(f"{row['cell']}\n{row['cost']}, batch {row['batch']}", {})[row["policy"]] = row
    verdicts = judge(header, rows)
    speeds = {name: [v for v in verdicts if v.group == name and v.to_plain] for name in {v.group: 0 for v in verdicts}}
    canvas = _Canvas(output_dir, synthetic=header["synthetic"])
    return [*_draw_groups(canvas, groups), *canvas.draw("speed", "Speed over other arms", speeds, _draw_speed)]


def write_decision_plots(path: pathlib.Path, output_dir: pathlib.Path) -> list[pathlib.Path]:
    """Draw a log of decisions.

    Raises:
      RunError: it cannot be read.
    """
    try:
        header, logged = decision_log.read_log(path)
    except (OSError, ValueError) as error:
        raise common.RunError(str(error)) from None
    lanes = {f"lane {lane}": _logged_row([d for d in logged if d.lane == lane]) for lane in {d.lane: 0 for d in logged}}
    canvas = _Canvas(output_dir, synthetic=bool(header.get("synthetic")), prefix="decisions_")
    return _draw_groups(canvas, {str(header.get("policy", "decisions")): lanes})


def _logged_row(decisions: Sequence[decision_log.Logged]) -> Row:
    """Say of a lane's decisions what a row says of an arm. Regret needs the true acceptance, hence synthetic runs."""
    tiers = decisions[0].context.tiers_A
    arms, lost = [one.plan.arm for one in decisions], []
    accepted = np.concatenate(
        [o.outcome.stats.accepted_BR.ravel() for o in decisions if o.outcome] or [np.zeros(0, int)]
    )
    drafted = np.concatenate([o.outcome.stats.drafted_BR.ravel() for o in decisions if o.outcome] or [np.zeros(0, int)])
    accepted = accepted[drafted > 0]
    for context, plan, outcome in ((one.context, one.plan, one.outcome) for one in decisions):
        if context.acceptance_K is not None and outcome is not None:
            rate_A = context.batch * expected_tokens(np.asarray(context.acceptance_K), tiers) / context.cost_A
            lost.append((rate_A.max() - rate_A[plan.arm]) * context.cost_A[plan.arm] * outcome.stats.rounds)
    return {
        "shares": {str(tier): arms.count(arm) / len(arms) for arm, tier in enumerate(tiers)},
        "depth_curve": curve(tiers[arms]),
        "regret_curve": curve(np.cumsum(lost)) if lost else None,
        _POSITIONS: [
            float((accepted > position).mean()) for position in range(max(drafted, default=0)) if len(accepted)
        ],
    }


class _Canvas:
    """Writes figures of panels, the same bytes for the same numbers."""

    def __init__(self, folder: pathlib.Path, *, synthetic: bool, prefix: str = ""):
        if mpl is None:
            raise common.RunError(
                "plots need matplotlib: install the extra `plots`, as in pip install 'streamserve[plots]'"
            )
        self._folder, self._prefix, self._mark = folder, prefix, "SYNTHETIC. " if synthetic else ""

    def draw(self, name: str, title: str, panels: Mapping[str, Any], draw: Any) -> list[pathlib.Path]:
        """Draw a panel each, with one legend; nothing where there is none."""
        panels = {panel: content for panel, content in panels.items() if content}
        if not panels:
            return []
        assert mpl is not None  # as `__init__` has seen; the same import brought all three
        assert figure is not None
        assert backend_agg is not None
        columns = min(3, len(panels))
        lines = -(-len(panels) // columns)
        picture = figure.Figure(figsize=(4.2 * columns + 1, 3.4 * lines + 1.6), layout="constrained")
        backend_agg.FigureCanvasAgg(picture)
        handles: dict[str, Any] = {}
        for axes, (panel, content) in zip(
            picture.subplots(lines, columns, squeeze=False).flat, panels.items(), strict=False
        ):
            draw(axes, content)
            axes.set_title(panel, fontsize=9)
            handles |= {str(label): handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        for axes in picture.axes[len(panels) :]:
            axes.set_axis_off()
        picture.suptitle(self._mark + title)
        picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=7)
        paths = [self._folder / f"{self._prefix}{name}.{kind}" for kind in ("png", "svg")]
        with mpl.rc_context({"svg.hashsalt": name}):
            picture.savefig(paths[0], dpi=110, metadata={"Software": None})
            picture.savefig(paths[1], metadata={"Date": None})
        return paths


def _draw_groups(canvas: _Canvas, groups: Mapping[str, Mapping[str, Row]]) -> list[pathlib.Path]:
    def having(key: str, *, fixed: bool) -> dict[str, dict[str, Any]]:
        return {
            group: {arm: row[key] for arm, row in rows.items() if row.get(key) and (fixed or fixed_depth(arm) is None)}
            for group, rows in groups.items()
        }

    return [
        *canvas.draw("depth", "Depth over time", having("depth_curve", fixed=False), _curves("depth (tokens a round)")),
        *canvas.draw(
            "regret",
            "Regret to the best depth of each tick",
            having("regret_curve", fixed=True),
            _curves("lost (tokens)", "symlog"),
        ),
        *canvas.draw("pulls", "Which depth ran", having("shares", fixed=False), _draw_shares),
        *canvas.draw("acceptance", "Acceptance by position", having(_POSITIONS, fixed=True), _draw_positions),
    ]


def _style(arm: str, index: int) -> dict[str, Any]:
    """Policies have colours, fixed depths are grey."""
    depth = fixed_depth(arm)
    if depth is not None:
        return {"color": str(0.8 - 0.08 * depth), "linestyle": ":", "linewidth": 1}
    return {"color": f"C{index % 10}", "linestyle": "-" if index % 20 < 10 else "--", "linewidth": 1.3}


def _curves(label: str, scale: str = "linear") -> Any:
    def draw(axes: Any, curves: Mapping[str, Any]) -> None:
        for index, (arm, points) in enumerate(curves.items()):
            axes.plot(points["tick"], points["value"], label=arm, **_style(arm, index))
        axes.set(xlabel="time (ticks)", ylabel=label, yscale=scale)

    return draw


def _draw_shares(axes: Any, shares: Mapping[str, Mapping[str, float]]) -> None:
    tiers = sorted({int(tier) for share in shares.values() for tier in share})
    left = np.zeros(len(shares))
    for index, tier in enumerate(tiers):
        width = np.array([100 * share.get(str(tier), 0.0) for share in shares.values()])
        axes.barh(list(shares), width, left=left, color=_DEPTH_COLORS[index], label=f"depth {tier}")
        left += width
    axes.set(xlabel="share of ticks (%)", ylabel="arm")
    axes.tick_params(labelsize=7)


def _draw_positions(axes: Any, rates: Mapping[str, Sequence[float]]) -> None:
    for index, (arm, values) in enumerate(rates.items()):
        axes.plot(range(1, len(values) + 1), values, marker=".", label=arm, **_style(arm, index))
    axes.set(xlabel="position (drafted token of a round)", ylabel="accepted (fraction of drafts)", ylim=(0, 1.02))
    axes.set_xticks(range(1, 1 + max(map(len, rates.values()))))


def _draw_speed(axes: Any, verdicts: Sequence[Verdict]) -> None:
    for shift, color, label in ((-0.15, "C0", "over plain decoding"), (0.15, "C1", "over the best fixed depth")):
        spans = [verdict.to_plain if shift < 0 else verdict.to_fixed for verdict in verdicts]
        values = np.array(spans, np.float64)
        bounds = np.nan_to_num(np.abs(values[:, 1:] - values[:, :1])).T
        axes.errorbar(values[:, 0], np.arange(len(spans)) + shift, xerr=bounds, fmt=".", color=color, label=label)
    axes.axvline(1.0, color="0.6", linewidth=0.8)
    axes.set_yticks(range(len(verdicts)), [verdict.arm for verdict in verdicts], fontsize=7)
    axes.set(xlabel="tokens a second, ratio", ylabel="arm")


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags; on call and not on import, since other scripts have flags of the same names."""
    flags.DEFINE_string("input", None, "Rows of experiments.compare_depth.", required=True, flag_values=values)
    flags.DEFINE_string("output_dir", None, "Where tables and plots go.", required=True, flag_values=values)
    flags.DEFINE_string("decisions", None, "Log of decisions of an engine.", flag_values=values)


def report(rows: pathlib.Path, output_dir: pathlib.Path, decisions: pathlib.Path | None = None) -> int:
    """Write tables and plots; returns the exit code."""
    try:
        header, lines = read_rows(rows)
        text, refused = tables(header, lines)
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "table.md").write_text(text, encoding="utf-8")
        paths = write_plots(header, lines, output_dir)
        paths += [] if decisions is None else write_decision_plots(decisions, output_dir)
    except (common.RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return common.EXIT_UNUSABLE
    print("\n".join(map(str, [output_dir / "table.md", *paths])))
    for refusal in refused:
        print(f"refused: {refusal}", file=sys.stderr)
    return common.EXIT_SOME_FAILED if refused else common.EXIT_OK


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    del argv
    logging.set_verbosity(logging.WARNING)
    decisions = flags.FLAGS.decisions
    paths = (pathlib.Path(flags.FLAGS.input), pathlib.Path(flags.FLAGS.output_dir))
    return report(*paths, None if decisions is None else pathlib.Path(decisions))


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
