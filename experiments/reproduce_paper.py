"""The evaluation of the StreamServe paper with what is here: one factor at a time, on the same devices.

  python -m experiments.reproduce_paper --output=rows.jsonl [--workload=NAME=FILE.jsonl ...] [--num_prompts=N]
  python -m experiments.paper_report --input=rows.jsonl --output=RESULTS.md

Every arm is a fleet (how the devices are divided), a router and a depth policy. The two fleets that draft, one
colocated and one disaggregated, run with each router and each policy: routing x disaggregation x speculation. Baselines
without speculation run beside them. Every arm gets the same prompts, seeds and arrival times: all prompts at once
(`offline`), or at --rate a second (`open`). All fleets live in one process, so that all arms of a repeat run before the
next repeat, in an order drawn anew for every other repeat and reversed in the one after it. The output has a header, a
line for every fleet and a line for every run; what they say is left to `experiments.paper_report`.

On CPU the fleets share as many host devices as the largest needs. On an accelerator every fleet keeps its own copy of
the weights; --fleets runs fewer.

Exit codes: 0 done; 1 done, but something must not be compared, as the report says; 2 arguments, config, model, input or
output are unusable; 130 Ctrl-C, with the runs that were finished in the output.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

import streamserve
from experiments import arrivals, common, paper_arms, paper_options, paper_report, paper_rows
from experiments.compare_depth import order, read_workload
from experiments.paper_arms import Arm, Engine, Fleet
from experiments.paper_options import Options
from streamserve import jsonl, mesh, parts
from streamserve.config import Config
from streamserve.sampling_params import SamplingParams
from streamserve.types import Prompt

DEFAULT_CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "reproduce_paper.py"
WARMUP_PROMPTS = 2


def build(fleets: Mapping[str, Config], make_engine: Callable[[Config], Engine]) -> Iterator[tuple[str, Engine | str]]:
    """Build the engine of every fleet, in their order; gives the reason where a baseline cannot be built.

    Raises:
      RunError: a fleet that drafts cannot be built.
    """
    for name, config in fleets.items():
        print(f"building {name}", file=sys.stderr)
        try:
            yield name, make_engine(config)
        except (ValueError, OSError) as error:
            if config.speculation.method != "none":
                raise common.RunError(f"fleet {name!r}: {error}") from None
            print(f"{name} cannot be built: {error}", file=sys.stderr)
            yield name, str(error)


def read_engines(options: Options) -> tuple[dict[str, Fleet], dict[str, Config], dict[str, Any]]:
    """Read the configuration: fleets, their engines' configurations, and the sampling parameters.

    Raises:
      RunError: a wrong field, or tokens that cannot be compared because acceptance is drawn at random.
    """
    values = dict(options.config)
    fleets = paper_arms.read_fleets(values.pop("fleets", {}), options.fleets)
    base, sampling = common.split_config(values)
    if base.speculation.method in ("none", "synthetic"):
        raise common.RunError(
            f"speculation.method={base.speculation.method!r}: fleets that draft need a drafter whose output is exact"
        )
    check_names(base, options)
    configs = {name: paper_arms.fleet_config(base, fleet, options.concurrency) for name, fleet in fleets.items()}
    # On CPU the first engine asks for the host devices of all.
    configs = dict(sorted(configs.items(), key=lambda item: -mesh.num_devices(item[1].topology)))
    return fleets, configs, sampling | ({} if options.max_tokens is None else {"max_tokens": options.max_tokens})


def check_names(config: Config, options: Options) -> None:
    """Look routers and policies up, before anything costly begins.

    Raises:
      RunError: a name that stands for nothing, a depth that is not compiled, or the oracle, which knows what is drawn.
    """
    try:
        for router in options.routers:
            parts.make_router(config, name=router)
        for policy in options.policies:
            parts.make_policy(config.speculation, options.concurrency, name=policy)
            if policy == "oracle":
                raise ValueError("the oracle knows the true acceptance, which only made-up acceptance has")
    except ValueError as error:
        raise common.RunError(str(error)) from None


def requests(texts: Sequence[str], sampling: Mapping[str, Any], seed: int) -> list[Prompt]:
    """Make the requests of a workload, each with a seed of its own.

    Raises:
      RunError: wrong sampling parameters, or such as do not fix the tokens of the one completion.
    """
    try:
        params = [SamplingParams(**{"seed": seed + index, **sampling}) for index in range(len(texts))]
    except (ValueError, TypeError) as error:
        raise common.RunError(f"config field 'sampling': {error}") from None
    if any(not one.greedy or one.n != 1 for one in params):
        raise common.RunError("config field 'sampling': tokens are compared, so temperature must be 0 and n 1")
    return [
        Prompt(request_id=str(index), text=text, params=one)
        for index, (text, one) in enumerate(zip(texts, params, strict=True))
    ]


def measure(options: Options, make_engine: Callable[[Config], Engine], clock: Callable[[], float]) -> None:
    """Run every arm on every workload in every mode, repeat by repeat, and write a row as soon as it is known.

    Raises:
      RunError: the config, a workload or the output is unusable.
    """
    fleets, configs, sampling = read_engines(options)
    lines = {name: read_workload(path) for name, path in options.workloads}
    texts = {name: all_of[: options.num_prompts] for name, all_of in lines.items()}
    prompts = {name: requests(chosen, sampling, options.seed) for name, chosen in texts.items()}
    with common.writing(options.output), contextlib.closing(jsonl.JsonLinesFile(options.output)) as file:
        built = dict(build(configs, make_engine))
        file.write(_header(options, sampling, lines, texts))
        for name, engine in built.items():
            if isinstance(engine, str):
                file.write({"kind": "engine", "fleet": name, "refused": engine})
            else:
                file.write(paper_arms.engine_row(name, configs[name], engine, _versions()))
        engines = {name: engine for name, engine in built.items() if not isinstance(engine, str)}
        running = {name: fleet for name, fleet in fleets.items() if name in engines}
        arms = paper_arms.list_arms(running, options.routers, options.policies)
        for row in run_all(options, engines, arms, prompts, clock):
            file.write({"kind": "run", **row})


def run_all(
    options: Options,
    engines: Mapping[str, Engine],
    arms: tuple[Arm, ...],
    prompts: Mapping[str, Sequence[Prompt]],
    clock: Callable[[], float],
) -> Iterator[dict[str, Any]]:
    """Run every arm once for nobody, since a first run pays for what later ones do not, and then as often as asked."""
    for arm in arms:
        first = next(iter(prompts.values()))[:WARMUP_PROMPTS]
        paper_arms.run_arm(engines[arm.fleet], arm, first, [0.0] * len(first), clock)
    by_name = {str(arm): arm for arm in arms}
    turns = [(name, mode) for name in prompts for mode in options.modes]
    for repeat in range(options.repeats):
        for index, (name, mode) in enumerate(turns):
            print(f"repeat {repeat}: {name}, {mode}", file=sys.stderr)
            pacing = arrivals.Pacing(request_rate=options.rate if mode == "open" else math.inf)
            arrivals_s = arrivals.draw(len(prompts[name]), pacing, options.seed + repeat).tolist()
            drawn = order(tuple(by_name), seed=options.seed, repeat=repeat, workload=index)
            for position, arm in enumerate(map(by_name.__getitem__, drawn)):
                row = paper_arms.run_arm(engines[arm.fleet], arm, prompts[name], arrivals_s, clock)
                where = {"repeat": repeat, "workload": name, "mode": mode, "position": position}
                yield where | arm._asdict() | row


def _header(
    options: Options, sampling: Mapping[str, Any], lines: Mapping[str, list[str]], texts: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Say what all runs have in common."""
    command = ("python", "-m", "experiments.reproduce_paper", *common.portable(options.command))
    shares = bool(options.config.get("topology", {}).get("share_devices"))
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Options)}
    kept = ("repeats", "seed", "routers", "policies", "modes", "rate", "concurrency", "max_different")
    return {
        "kind": "header",
        "study": paper_rows.STUDY,
        **{name: values[name] for name in kept},
        "workloads": {
            name: {
                "prompts": len(texts[name]),
                "lines": len(lines[name]),
                "sha256": hashlib.sha256(json.dumps(texts[name]).encode()).hexdigest(),
            }
            for name in texts
        },
        "sampling": dict(sampling),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **common.environment(share_devices=shares, command=command),
    }


def _versions() -> dict[str, Any]:
    """Say what software an engine runs on."""
    record = common.environment(share_devices=False, command=())
    return {"python": record["python"], "backend": record["backend"], **record["versions"]}


def run(
    options: Options, make_engine: Callable[[Config], Engine], clock: Callable[[], float] = time.perf_counter
) -> int:
    """Measure, and print what the rows say; returns the exit code."""
    return common.exit_code(lambda: _run(options, make_engine, clock))


def _run(options: Options, make_engine: Callable[[Config], Engine], clock: Callable[[], float]) -> int:
    if not options.output.parent.is_dir():
        raise common.RunError(f"cannot write {str(options.output)!r}: there is no such folder")
    measure(options, make_engine, clock)
    text, refused = paper_report.report(paper_rows.read_study(options.output))
    print(text)
    return paper_report.tell(refused)


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    del argv
    try:
        options = paper_options.read_options(flags.FLAGS, sys.argv[1:])
    except common.RunError as error:
        common.stop(str(error))
    return run(options, streamserve.LLM.from_config)


if __name__ == "__main__":
    paper_options.define_flags(flags.FLAGS)
    flags.adopt_module_key_flags(paper_options)  # or --help would not list them
    common.run_main(main, default_config=DEFAULT_CONFIG)
