"""Tables and plots of a comparison of depth policies, from its rows alone.

  python -m experiments.depth_report --input=rows.jsonl --output_dir=DIR [--decisions=decisions.jsonl]

It writes table.md, and depth, pulls, acceptance, regret and speed as PNG and SVG, as far as the rows have them; a log
of decisions adds the first four of its own as decisions_*. The same rows give the same bytes. Where acceptance was
drawn at random, everything says SYNTHETIC. Exit codes are those of `experiments.compare_depth`.
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from absl import app, flags, logging

from experiments import common
from experiments.depth_arms import fixed_arm, fixed_depth
from experiments.depth_plots import write_decision_plots, write_plots
from experiments.depth_verdicts import LEVEL, SPLIT_REPEATS, Row, Verdict, judge, read_rows


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
