"""Answer a file of prompts: the main command.

  python -m experiments.generate --config=configs/tiny_cpu.py --input=IN.jsonl --output=OUT.jsonl --workdir=DIR \
      [--config.field=value ...]

Input is JSON lines of any of the four kinds that `streamserve.workload` describes; without --input the bundled prompts
run. The output has one line for every input line, in input order, written as soon as all earlier ones are; an existing
file is replaced once input, config and model have proved good. A line that cannot be served gets an error line and the
rest runs on. The workdir receives config.json, env.json, requests.jsonl (one line a request, in order of
completion), results.json, trace.json, and decisions.jsonl where a policy chooses the depth of speculation.

Exit codes: 0 all answered; 1 some lines failed; 2 arguments, config, model, input or output are unusable; 130 Ctrl-C,
with complete lines in the output and `"interrupted": true` in results.json.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Protocol

import tqdm
from absl import flags

import streamserve
from experiments import common, engines, live
from streamserve import answers, audit, jsonl, metrics, report_table, workload
from streamserve.types import Prompt, RequestOutput

DEFAULT_CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "tiny_cpu.py"
MAX_COUNTED_BYTES = 2**28  # files up to this size are counted for the progress bar; it takes a fraction of a second

_INPUT = flags.DEFINE_string("input", None, "JSON lines to answer; the bundled prompts by default.")
_OUTPUT = flags.DEFINE_string("output", None, "Answers; WORKDIR/outputs.jsonl by default. Replaced if it exists.")
_LIVE = flags.DEFINE_bool("live", False, "Show the stream pairs in the terminal, instead of a progress bar.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Record of the run; workdirs/generate-TIME by default.")


class Engine(engines.Engine, Protocol):
    """What this script needs of `streamserve.LLM`."""

    def pin_depth(self, depth: int | None, /, *, tier: int | None = None) -> None:
        """Decode at one depth, whatever the policy says."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line.

    Attributes:
      config: sections of the config file.
      input: file of prompts.
      output: file of answers.
      workdir: folder for the record of the run.
      live: show the stream pairs in the terminal.
      command: the command line as it was given.
    """

    config: Mapping[str, Any]
    input: pathlib.Path
    output: pathlib.Path
    workdir: pathlib.Path
    live: bool = False
    command: tuple[str, ...]

    @property
    def requests(self) -> pathlib.Path:
        """Where the numbers of single requests go."""
        return self.workdir / "requests.jsonl"


def run(options: Options, make_engine: engines.MakeEngine[Engine]) -> int:
    """Answer the input; returns the exit code."""
    return common.exit_code(lambda: _run(options, make_engine))


def _run(options: Options, make_engine: engines.MakeEngine[Engine]) -> int:
    config, defaults = common.split_config(options.config)
    with _checked_input(options) as lines:
        engines.line_reader(defaults, None)  # the defaults of a wrong config should not cost a compilation
        engine = engines.start_engine(
            make_engine,
            config,
            values=options.config,
            workdir=options.workdir,
            command=options.command,
            logs_routes=config.topology.num_pairs > 1,
        )
        reader = engines.line_reader(defaults, engine.tokenizer)
        style = answers.AnswerFormat(
            model_name=config.model.model,
            num_spec_tokens=max(config.speculation.depths),
            created_s=int(time.time()),
            synthetic=config.speculation.acceptance,
        )
        with _Recorder(options, style, audits=config.speculation.audit) as recorder:
            start_s = time.monotonic()
            entries = reader.read(common.readable(lines, options.input))
            interrupted = _serve(engine, entries, recorder, shows=options.live)
            duration_s = time.monotonic() - start_s
        engine.close()
    results = metrics.summarise(recorder.tally, duration_s, engine.stats())
    if config.speculation.acceptance is not None:
        results["synthetic_acceptance"] = config.speculation.acceptance
    common.write_json(options.workdir / "results.json", results | ({"interrupted": True} if interrupted else {}))
    if recorder.audited is not None and not interrupted:
        found = audit.audit(engine, recorder.audited, depth=max(config.speculation.depths))
        common.write_json(options.workdir / "results.json", results | {"audit": dataclasses.asdict(found)})
        print(f"Audit: {found}")
    return _report(options, recorder, results, interrupted=interrupted)


def _serve(
    engine: Engine, entries: Iterator[workload.WorkItem | workload.BadLine], recorder: "_Recorder", *, shows: bool
) -> bool:
    """Run everything, with a live view if it `shows`; returns whether Ctrl-C came."""
    try:
        for output in live.watched(engine.stream(recorder.prompts(entries)), engine.lane_stats, live=shows):
            recorder.take(output)
    except KeyboardInterrupt:
        return True
    assert not recorder.in_flight, f"the engine lost {sorted(recorder.in_flight)}"
    return False


class _Recorder:
    """Writes answers and numbers as they come."""

    def __init__(self, options: Options, style: answers.AnswerFormat, *, audits: bool):
        self._options, self._style = options, style
        self.audited: list[tuple[Prompt, RequestOutput]] | None = [] if audits else None
        self._prompts: dict[str, Prompt] = {}  # in flight, where they will be audited
        self.tally = metrics.Tally()
        self.failures: list[str] = []  # the first few, for the message at the end
        self.in_flight: dict[str, workload.Origin] = {}

    def __enter__(self) -> "_Recorder":
        """Replace the files, and show the progress bar."""
        with common.writing(self._options.requests):
            (self._options.workdir / "results.json").unlink(missing_ok=True)
            self._requests = jsonl.JsonLinesFile(self._options.requests)
        with common.writing(self._options.output):
            self._answers = jsonl.OrderedWriter(jsonl.JsonLinesFile(self._options.output))
        self._bar = tqdm.tqdm(
            total=_count(self._options.input),
            desc="Generating",
            unit="req",
            file=sys.stderr,
            mininterval=0.5,
            disable=self._options.live,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Close all; what finished out of order is still written."""
        self._bar.close()
        self._requests.close()
        ignored = contextlib.nullcontext() if kind is None else contextlib.suppress(common.RunError)
        with ignored, common.writing(self._options.output):
            self._answers.close()

    def prompts(self, entries: Iterator[workload.WorkItem | workload.BadLine]) -> Iterator[Prompt]:
        """Pass requests on, and answer bad lines."""
        for entry in entries:
            if isinstance(entry, workload.WorkItem):
                self.in_flight[entry.prompt.request_id] = entry.origin
                if self.audited is not None:
                    self._prompts[entry.prompt.request_id] = entry.prompt
                yield entry.prompt
            else:
                self._write(entry.origin, answers.refusal(entry), {"error": entry.message})
                self.tally.add_failure()

    def take(self, output: RequestOutput) -> None:
        """Record a request that the engine is done with."""
        origin = self.in_flight.pop(output.request_id)
        numbers = answers.request_metrics(output) | {
            "finish_reasons": [completion.finish_reason for completion in output.outputs],
            "error": output.error,
        }
        self._write(origin, answers.answer(origin, output, self._style), numbers)
        self.tally.add(output)
        if self.audited is not None:
            self.audited.append((self._prompts.pop(output.request_id), output))

    def _write(self, origin: workload.Origin, answer: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
        if numbers["error"] is not None and len(self.failures) < common.MAX_LISTED_FAILURES:
            self.failures.append(f"line {origin.line_number}: {numbers['error']}")
        with common.writing(self._options.output):
            self._answers.put(origin.index, answer)
        with common.writing(self._options.requests):
            self._requests.write({"id": origin.id, "line": origin.line_number, **numbers})
        self._bar.update()
        elapsed_s = 0.0 if self._bar.disable else self._bar.format_dict["elapsed"]
        if elapsed_s > 0:
            self._bar.set_postfix_str(f"{self.tally.output_tokens / elapsed_s:.0f} tok/s", refresh=False)


def _report(options: Options, recorder: _Recorder, results: dict[str, Any], *, interrupted: bool) -> int:
    """Print the summary; returns the exit code."""
    print(report_table.format_table(results))
    print(f"Answers: {options.output}\nRecord:  {options.workdir}")
    failed = recorder.tally.failed
    common.tell_failures(recorder.failures, failed, failed + recorder.tally.completed)
    if interrupted:
        print("interrupted: the output holds what was finished", file=sys.stderr)
        return common.EXIT_INTERRUPTED
    return common.EXIT_SOME_FAILED if failed else common.EXIT_OK


def _checked_input(options: Options) -> BinaryIO:
    """Check all paths before anything costly, make the workdir, and open the input."""
    written = (options.output, *(options.workdir / name for name in common.RECORD_FILES))
    if len({path.resolve() for path in written}) < len(written):
        raise common.RunError(f"the output {str(options.output)!r} is a file that the workdir's record needs")
    lines = common.open_input(options.input, written)
    try:
        _check_output(options)
    except common.RunError:
        lines.close()
        raise
    return lines


def _check_output(options: Options) -> None:
    """Make the workdir, and see whether the output can be written."""
    with common.writing(options.workdir):
        options.workdir.mkdir(parents=True, exist_ok=True)
    folder = options.output.parent
    if not folder.is_dir() or options.output.is_dir():
        reason = "it is a folder" if options.output.is_dir() else f"there is no folder {str(folder)!r}"
        raise common.RunError(f"cannot write {str(options.output)!r}: {reason}")
    if not os.access(options.output if options.output.exists() else folder, os.W_OK):
        raise common.RunError(f"cannot write {str(options.output)!r}: permission denied")


def _count(path: pathlib.Path) -> int | None:
    """Count the lines that are not blank, where that is cheap."""
    if not path.is_file() or path.stat().st_size > MAX_COUNTED_BYTES:
        return None
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    del argv
    workdir = pathlib.Path(_WORKDIR.value or time.strftime("workdirs/generate-%Y%m%d-%H%M%S"))
    options = Options(
        config=flags.FLAGS.config.to_dict(),
        input=pathlib.Path(_INPUT.value or common.BUNDLED_PROMPTS),
        output=pathlib.Path(_OUTPUT.value) if _OUTPUT.value else workdir / "outputs.jsonl",
        workdir=workdir,
        live=_LIVE.value,
        command=tuple(sys.argv),
    )
    return run(options, streamserve.LLM.from_config)


if __name__ == "__main__":
    common.run_main(main, default_config=DEFAULT_CONFIG)
