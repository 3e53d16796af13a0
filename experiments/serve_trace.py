"""Serve requests that come when they come: an open loop, in which no arrival waits for a completion.

  python -m experiments.serve_trace --config=configs/serve_trace.py --request_rate=2 [--input=FILE.jsonl]
  python -m experiments.serve_trace --trace=FILE --time_scale=10 --length_scale=0.1 [--num_prompts=200]
      [--goodput=ttft:1000,tpot:100,e2el:5000] [--check_offline] [--workdir=DIR] [--config.field=value ...]

Prompts are input lines of any of the four kinds that `streamserve.workload` describes, the bundled ones by default;
they arrive by a gamma process of --request_rate and --burstiness, or one whose rate grows (--ramp_up). Or a trace of
Azure or Mooncake is replayed: its arrivals times --time_scale, its token counts times --length_scale, prompts made up
from --seed, and every answer as long as the recorded one. Times count from the arrival, however late it was noticed.

--goodput gives the service levels in milliseconds, as `vllm bench serve` does; they are FlowGuard's objective, too.
Without it they are the objective of the config. The workdir receives config.json, env.json, requests.jsonl (one line a
request, in order of completion), results.json, trace.json, routes.jsonl, and decisions.jsonl where a policy chooses the
depth of speculation.

Exit codes: 0 all answered; 1 some requests were refused or failed, a program was compiled after warm-up, or
--check_offline found an output that differs; 2 arguments, config, model, input or workdir are unusable; 130 Ctrl-C.
"""

import dataclasses
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Protocol

from absl import flags

import streamserve
from experiments import common, engines, live, offered_load, serve_options, serve_record, traces
from experiments.offered_load import OfferedLoad
from experiments.serve_options import Options
from experiments.serve_record import Recorder
from experiments.traces import TraceRow
from streamserve.config import Config
from streamserve.metrics import ServiceLevels
from streamserve.types import Prompt, RequestOutput

DEFAULT_CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "serve_trace.py"


class Engine(engines.Engine, Protocol):
    """What this script needs of `streamserve.LLM`."""

    max_model_len: int

    def serve(self, arrivals: Iterable[tuple[float, Prompt]], /) -> Iterator[RequestOutput]:
        """Serve prompts from their arrival on, outputs in order of completion."""
        ...


def run(
    options: Options, make_engine: engines.MakeEngine[Engine], *, clock: Callable[[], float] = time.monotonic
) -> int:
    """Serve the load; returns the exit code."""
    return common.exit_code(lambda: _run(options, make_engine, clock))


def _run(options: Options, make_engine: engines.MakeEngine[Engine], clock: Callable[[], float]) -> int:
    config, defaults = common.split_config(options.config)
    if options.check_offline and config.speculation.method == "synthetic":
        raise common.RunError("--check_offline: where acceptance is synthetic, the output is not the target's")
    levels = options.levels or ServiceLevels(ttft_s=config.routing.ttft_s, tpot_s=config.routing.tpot_s)
    with _checked_source(options) as lines:
        engines.line_reader(defaults, None)  # what is wrong with defaults or trace should not cost a compilation
        rows = _read_trace(options, lines)
        engine = engines.start_engine(
            make_engine,
            config,
            values=options.config,
            workdir=options.workdir,
            command=options.command,
            logs_routes=True,
        )
        load = _load(options, lines, rows, config, defaults, engine)
    with Recorder(options.workdir, load, levels, clock, keeps_tokens=options.check_offline) as recorder:
        interrupted = _serve(engine, recorder, levels if options.live else None)
    engine.close()
    results = recorder.results(engine.stats(), config)
    results |= {"interrupted": True} if interrupted else {}
    common.write_json(options.workdir / "results.json", results)
    if options.check_offline and not interrupted:
        results |= check_offline(engine, load, recorder.tokens)
        common.write_json(options.workdir / "results.json", results)
    return _report(options, recorder, results)


def _checked_source(options: Options) -> BinaryIO:
    """Open the source, and make the workdir."""
    lines = common.open_input(options.source, [options.workdir / name for name in common.RECORD_FILES])
    try:
        with common.writing(options.workdir):
            options.workdir.mkdir(parents=True, exist_ok=True)
    except common.RunError:
        lines.close()
        raise
    return lines


def _read_trace(options: Options, lines: BinaryIO) -> list[TraceRow] | None:
    """Read the trace, if the source is one."""
    if options.trace_format is None:
        return None
    rows = traces.read_trace(common.readable(lines, options.source), options.source, options.trace_format)
    try:
        chosen = list(itertools.islice(rows, options.num_prompts))
    except ValueError as error:
        raise common.RunError(str(error)) from None
    if not chosen:
        raise common.RunError(f"the trace {str(options.source)!r} holds no request")
    return chosen


def _load(
    options: Options,
    lines: BinaryIO,
    rows: Sequence[TraceRow] | None,
    config: Config,
    defaults: Mapping[str, Any],
    engine: Engine,
) -> OfferedLoad:
    """Gather what will arrive."""
    if rows is not None:
        return offered_load.from_trace(
            rows,
            options.scale,
            max_model_len=engine.max_model_len,
            pacing=options.pacing,
            vocabulary=offered_load.plain_tokens(config, engine.tokenizer),
            defaults=defaults,
            seed=options.seed,
        )
    assert options.pacing is not None, "only a trace has arrivals of its own"
    entries = engines.line_reader(defaults, engine.tokenizer).read(common.readable(lines, options.source))
    return offered_load.from_lines(list(itertools.islice(entries, options.num_prompts)), options.pacing, options.seed)


def _serve(engine: Engine, recorder: Recorder, shown: ServiceLevels | None) -> bool:
    """Run everything, with a live view of what meets the levels `shown`; returns whether Ctrl-C came."""
    outputs = engine.serve(recorder.arrivals())
    try:
        for output in live.watched(outputs, engine.lane_stats, live=shown is not None, levels=shown):
            recorder.take(output)
    except KeyboardInterrupt:
        return True
    assert not recorder.in_flight, f"the engine lost {sorted(recorder.in_flight)}"
    return False


def check_offline(engine: Engine, load: OfferedLoad, answered: Mapping[str, serve_record.Tokens]) -> dict[str, Any]:
    """Generate greedy answers again, all at once, and compare them token for token.

    Args:
      engine: that has answered them.
      load: what was answered.
      answered: tokens of the greedy answers by request id.

    Returns:
      `offline_compared`, `offline_identical`, and the ids of the requests that differ in `offline_differing`.
    """
    prompts = (
        dataclasses.replace(offer.make(), timeout_s=None) for offer in load.offers if offer.request_id in answered
    )
    again = {output.request_id: serve_record.tokens_of(output) for output in engine.stream(prompts)}
    differing = [name for name, tokens in answered.items() if again.get(name) != tokens]
    return {
        "offline_compared": len(answered),
        "offline_identical": len(answered) - len(differing),
        "offline_differing": differing,
    }


def _report(options: Options, recorder: Recorder, results: Mapping[str, Any]) -> int:
    """Print the summary; returns the exit code."""
    print(serve_record.format_results(results))
    print(f"Record:  {options.workdir}")
    failed, compiled = recorder.tally.failed, results["compilations_after_warmup"]
    common.tell_failures(recorder.failures, failed, failed + recorder.tally.completed)
    differing = results.get("offline_differing", ())
    if differing:
        shown = ", ".join(differing[: common.MAX_LISTED_FAILURES])
        print(f"{len(differing)} outputs differ from offline generation, among them {shown}", file=sys.stderr)
    if compiled:
        print(f"{compiled} programs were compiled after warm-up", file=sys.stderr)
    if results.get("interrupted"):
        print("interrupted: the record holds what was finished", file=sys.stderr)
        return common.EXIT_INTERRUPTED
    return common.EXIT_SOME_FAILED if failed or differing or compiled else common.EXIT_OK


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    del argv
    return common.exit_code(lambda: run(serve_options.read_options(flags.FLAGS, sys.argv), streamserve.LLM.from_config))


if __name__ == "__main__":
    serve_options.define_flags(flags.FLAGS)
    flags.adopt_module_key_flags(serve_options)  # or --help would not list them
    common.run_main(main, default_config=DEFAULT_CONFIG)
