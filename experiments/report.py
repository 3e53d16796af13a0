"""One page about a run, or about several: charts, numbers, and what they depend on.

  python -m experiments.report --workdir=DIR [--workdir=DIR ...] [--output=FILE.html]

A workdir is what `experiments.generate` and `experiments.serve_trace` leave behind; a folder of workdirs stands for all
of them. The page is a single file that needs nothing else: no network, no scripts, light and dark, wide and narrow. A
section whose file is absent says so. The same files give the same bytes.

Exit codes: 0 written; 2 arguments, a workdir or the output are unusable.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from experiments import common, report_html
from experiments.report_data import find_workdirs, read_runs
from experiments.report_html import Chapter, Section
from experiments.report_lanes import backlog_section, routing_section, signals_section
from experiments.report_latency import attainment_section, latency_section, transfer_section
from experiments.report_run import Run
from experiments.report_speculation import acceptance_section, arms_section, depth_section
from experiments.report_summary import configuration_section, exactness_section, headline_section
from experiments.report_throughput import distributions_section, throughput_section


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags; on call and not on import, since other scripts have flags of the same names."""
    flags.DEFINE_multi_string(
        "workdir", None, "Workdir of a run, or folder of some.", required=True, flag_values=values
    )
    flags.DEFINE_string("output", None, "The page; report.html in the workdir by default.", flag_values=values)


def report(paths: Sequence[pathlib.Path], output: pathlib.Path | None) -> int:
    """Write the page about the runs in these folders; returns the exit code."""
    try:
        if output is None and len(paths) > 1:
            raise common.RunError("--output is needed with several --workdir")
        runs = read_runs(find_workdirs(paths))
        text = report_html.page(_title(runs), chapters(runs))
        path = paths[0] / "report.html" if output is None else output
        with common.writing(path):
            path.write_bytes(text.encode("utf-8", "replace"))  # JSON can hold half a surrogate pair, UTF-8 cannot
    except common.RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return common.EXIT_UNUSABLE
    print(path)
    return common.EXIT_OK


def _title(runs: Sequence[Run]) -> str:
    return f"StreamServe: {runs[0].name}" if len(runs) == 1 else f"StreamServe: {len(runs)} runs"


def chapters(runs: Sequence[Run]) -> list[Chapter]:
    """List what the page shows: of several runs first how they compare, then each of them."""
    if len(runs) == 1:
        return [Chapter(runs[0].name, run_sections(runs[0]))]
    compared = Chapter("The runs compared", (throughput_section(runs), distributions_section(runs)))
    return [compared, *(Chapter(run.name, run_sections(run)) for run in runs)]


def run_sections(run: Run) -> tuple[Section, ...]:
    """List the sections about one run."""
    return (
        headline_section(run),
        exactness_section(run),
        latency_section(run),
        throughput_section([run]),
        attainment_section(run),
        depth_section(run),
        acceptance_section(run),
        arms_section(run),
        routing_section(run),
        signals_section(run),
        backlog_section(run),
        transfer_section(run),
        configuration_section(run),
    )


def parse_flags(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parse flags; wrong ones end the program with one line and code 2.

    Returns:
      The arguments that are left: the program's name.
    """
    try:
        rest = values(list(argv))
    except flags.Error as error:
        common.stop(f"{' '.join(str(error).split())} (--help lists the flags)")
    if len(rest) > 1:
        common.stop(f"unexpected argument {rest[1]!r} (flags start with --)")
    return rest


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    del argv
    logging.set_verbosity(logging.WARNING)
    output = flags.FLAGS.output
    return report(
        [pathlib.Path(path) for path in flags.FLAGS.workdir], None if output is None else pathlib.Path(output)
    )


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
