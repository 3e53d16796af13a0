"""Compare routers on fleets of stream pairs with something wrong, in virtual time or on an engine.

  python -m experiments.compare_routers --mode=simulate --output=rows.jsonl
  python -m experiments.compare_routers --mode=engine --output=rows.jsonl

Every router meets the same requests at the same times. `simulate` runs the real scheduler, lanes and routers on
simulated stream pairs; the seed decides everything, the machine nothing. `engine` builds an engine for every scenario,
measures what it can answer, and runs all routers of a repeat before the next repeat, in an order drawn anew for every
other repeat and reversed in the one after it. Loads are fractions of what the fleet can answer. The output is one
header line and one line a run; `experiments.router_report` makes tables of it.

Exit codes: 0 done; 1 done, but programs were compiled while requests were served; 2 arguments, config, model or output
are unusable; 130 Ctrl-C.
"""

import contextlib
import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from absl import flags

import streamserve
from experiments import common, compare_depth, router_plan, router_report, router_runs, router_scenarios
from experiments.router_plan import Plan
from experiments.router_runs import Engine
from streamserve import jsonl, mesh
from streamserve.config import Config

DEFAULT_CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "compare_routers.py"
CALIBRATION = "least_outstanding"  # routes while it is measured what an engine can answer


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags; on call and not on import, since other scripts have flags of the same names."""
    flags.DEFINE_enum("mode", "simulate", ["simulate", "engine"], "What runs the routers.", flag_values=values)
    flags.DEFINE_string("output", "rows.jsonl", "JSON lines; replaced if it exists.", flag_values=values)
    flags.DEFINE_list("routers", None, "Routers; all by default.", flag_values=values)
    flags.DEFINE_list("scenarios", None, "Instead of the config's.", flag_values=values)
    flags.DEFINE_list("loads", None, "Instead of the config's.", flag_values=values)
    flags.DEFINE_integer("repeats", 3, "Repeats, each with requests of its own.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of requests, orders and routers.", lower_bound=0, flag_values=values)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line.

    Attributes:
      config: sections of the config file.
      output: file of rows.
      routers: to compare; None for all.
      repeats: of everything, each with requests of its own.
      seed: of everything random.
      command: the command line as it was given.
    """

    config: Mapping[str, Any]
    output: pathlib.Path
    routers: tuple[str, ...] | None = None
    repeats: int = 3
    seed: int = 0
    command: tuple[str, ...] = ()


def read_options(values: flags.FlagValues, command: Sequence[str]) -> Options:
    """Gather the flags.

    Raises:
      RunError: a load is no number.
    """
    config = values.config.to_dict()
    compared = dict(config.get("comparison", {}))
    try:
        if values.scenarios:
            compared["scenarios"] = tuple(values.scenarios)
        if values.loads:
            compared["loads"] = tuple(map(float, values.loads))
    except ValueError:
        raise common.RunError(f"--loads must be numbers, got {values.loads}") from None
    return Options(
        config=config | {"comparison": compared},
        output=pathlib.Path(values.output),
        routers=tuple(values.routers) if values.routers else None,
        repeats=values.repeats,
        seed=values.seed,
        command=tuple(command),
    )


def simulate_all(options: Options) -> None:
    """Simulate every router in every scenario at every load.

    Raises:
      RunError: the config or the output is unusable.
    """
    plan = Plan(options.config, options.routers)
    fleets = {name: router_plan.simulated_fleet(plan, name) for name in plan.compared.scenarios}
    duration_s, longest = plan.simulation.duration_s, router_plan.longest_request(plan.engine)
    with _rows(options, plan, mode="simulate") as write:
        for scenario, (simulation, most) in fleets.items():
            print(scenario, file=sys.stderr)
            for load in plan.compared.loads:
                rate = load * most
                for seed in range(options.seed, options.seed + options.repeats):
                    asks = plan.asks(scenario, longest, rate=rate, duration_s=duration_s, seed=seed)
                    for router in plan.routers:
                        row = simulation.run(router, asks, duration_s=duration_s, seed=seed)
                        write(_named(scenario, load, rate, seed, router) | row)


def compare_on_engine(options: Options, make_engine: Callable[[Config], Engine]) -> None:
    """Run every router in every scenario at every load on an engine.

    Raises:
      RunError: the config, the model or the output is unusable.
    """
    plan = Plan(options.config, options.routers)
    duration_s = plan.on_engine.duration_s
    mesh.request_cpu_devices(plan.engine.topology)  # the header names the devices, and looking fixes their number
    with _rows(options, plan, mode="engine") as write:
        for index, scenario in enumerate(plan.compared.scenarios):
            print(scenario, file=sys.stderr)
            config = router_scenarios.prepare(scenario, plan.engine, plan.troubles, duration_s)
            try:
                engine = make_engine(config)
            except (ValueError, OSError) as error:
                raise common.RunError(f"scenario {scenario!r}: {error}") from None
            count, longest = float(plan.on_engine.capacity_requests), engine.max_model_len
            sample = plan.asks(scenario, longest, rate=count, duration_s=1.0, seed=options.seed)
            router_runs.engine_capacity(engine, CALIBRATION, sample)  # what a first run pays for is nobody's
            most = router_runs.engine_capacity(engine, CALIBRATION, sample)
            for repeat in range(options.repeats):
                drawn = compare_depth.order(plan.routers, seed=options.seed, repeat=repeat, workload=index)
                for load in plan.compared.loads:
                    seed, rate = options.seed + repeat, load * most
                    asks = plan.asks(scenario, longest, rate=rate, duration_s=duration_s, seed=seed)
                    for router in drawn:
                        row = router_runs.run_engine(engine, config, router, asks, duration_s=duration_s)
                        write(_named(scenario, load, rate, seed, router) | row)
            engine.close()


def _named(scenario: str, load: float, rate: float, seed: int, router: str) -> dict[str, Any]:
    return {"scenario": scenario, "load": load, "rate": rate, "seed": seed, "router": router}


@contextlib.contextmanager
def _rows(options: Options, plan: Plan, *, mode: str) -> Generator[Callable[[Mapping[str, Any]], None]]:
    """Open the output, with its header; gives what writes a row."""
    command = ("python", "-m", "experiments.compare_routers", *_portable(options.command))
    record = common.environment(share_devices=plan.engine.topology.share_devices, command=command)
    limits = plan.simulation if mode == "simulate" else plan.engine.routing
    facts = {"mode": mode, "synthetic": mode == "simulate", "ttft_s": limits.ttft_s, "tpot_s": limits.tpot_s}
    try:
        file = jsonl.JsonLinesFile(options.output)
        try:
            file.write({"kind": "header", **facts, "seed": options.seed, **record, "config": _portable(options.config)})
            yield lambda row: file.write({"kind": mode, **row})
        finally:
            file.close()
    except OSError as error:
        raise common.RunError(f"cannot write {str(options.output)!r}: {error.strerror or error}") from None


def _portable(value: Any) -> Any:
    """Leave out the folders of absolute paths."""
    if isinstance(value, str):
        return re.sub(r"(?<![\w./])(?:~|\.\.)?/(?!/)(?:[^/\s'\"=]+/)*", "", value)
    if isinstance(value, Mapping):
        return {name: _portable(one) for name, one in value.items()}
    return [_portable(one) for one in value] if isinstance(value, (list, tuple)) else value


def run(options: Options, mode: str, make_engine: Callable[[Config], Engine]) -> int:
    """Compare, and print what the rows say; returns the exit code."""
    try:
        if not options.output.parent.is_dir():
            raise common.RunError(f"cannot write {str(options.output)!r}: there is no such folder")
        if mode == "simulate":
            simulate_all(options)
        else:
            compare_on_engine(options, make_engine)
        header, rows = router_report.read_rows(options.output)
    except common.RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return common.EXIT_UNUSABLE
    except KeyboardInterrupt:
        print("interrupted: the output holds the runs that were finished", file=sys.stderr)
        return common.EXIT_INTERRUPTED
    print(router_report.tables(header, rows))
    compiled = sum(row.get("compilations_after_warmup", 0) for row in rows)
    if compiled:
        print(f"{compiled} programs were compiled while requests were served", file=sys.stderr)
    return common.EXIT_SOME_FAILED if compiled else common.EXIT_OK


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    del argv
    try:
        options = read_options(flags.FLAGS, sys.argv[1:])
    except common.RunError as error:
        common.stop(str(error))
    return run(options, flags.FLAGS.mode, streamserve.LLM.from_config)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    common.run_main(main, default_config=DEFAULT_CONFIG)
