"""Compare depth policies with every fixed depth and with plain decoding, simulated or on an engine.

  python -m experiments.compare_depth --mode=simulate --output=rows.jsonl [--costs=FILE.json]
  python -m experiments.compare_depth --mode=engine --output=rows.jsonl [--workload=NAME=FILE.jsonl ...]

`simulate` runs every arm on every cell, cost and batch of `config.simulation`, over --repeats seeds; nothing in it
depends on the machine. `engine` builds one engine and runs every arm on the same prompts and seeds; all arms of a
repeat run before the next repeat, in an order drawn anew for every other repeat and reversed in the one after it, so
that a machine that slows down steadily favours none. The output is one header line and one line a run;
`experiments.depth_report` makes tables and plots of it.

Exit codes: 0 done; 1 done, but some arms cannot be compared: their tokens differ from plain decoding's, they drafted
nothing, a program was compiled while they ran, or prompts failed; 2 arguments, config, model, input or output are
unusable; 130 Ctrl-C.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

import streamserve
from experiments import common, depth_arms, depth_options, depth_report
from experiments.depth_arms import PLAIN, ArmRun, Engine, SimulationConfig, fixed_arm
from experiments.depth_options import Options, read_options
from streamserve import jsonl, parts
from streamserve.config import Config, from_mapping
from streamserve.sampling_params import SamplingParams
from streamserve.specustream import CostTable, synthetic
from streamserve.types import Prompt

DEFAULT_CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "compare_depth.py"


def list_arms(asked: Sequence[str] | None, tiers: Sequence[int], *, synthetic: bool) -> tuple[str, ...]:
    """List every fixed depth and the policies.

    Raises:
      RunError: a policy that is not known, or cannot run here; or plain decoding is not among the depths.
    """
    known = sorted(name for name in parts.POLICIES if synthetic or name != "oracle")
    chosen = tuple(dict.fromkeys(known if asked is None else asked))
    if 0 not in tiers:
        raise common.RunError(f"depth 0, plain decoding, must be among the depths {list(tiers)}")
    try:
        for name in chosen:
            parts.find("policy", name, parts.POLICIES)
    except ValueError as error:
        raise common.RunError(str(error)) from None
    if not synthetic and "oracle" in chosen:
        raise common.RunError("the oracle needs speculation.method='synthetic', or --mode=simulate")
    return (*map(fixed_arm, tiers), *chosen)


def simulate_all(options: Options) -> None:
    """Simulate every arm on every cell, and write the rows of each cost as soon as they can be compared.

    Raises:
      RunError: the config, the cost table or the output is unusable.
    """
    config, tables = _simulation(options)
    arms = {name: list_arms(options.policies, table.tiers, synthetic=True) for name, table in tables.items()}
    with _rows(options, mode="simulate", synthetic=True) as write:
        for name, table in tables.items():
            for row in compared(list(_simulated(options, config, name, table, arms[name])), table.tiers):
                write(row)


def _simulation(options: Options) -> tuple[SimulationConfig, dict[str, CostTable]]:
    """Read what is to be simulated, and see whether it can be."""
    common.split_config(_engine_sections(options))  # a wrong field is reported here, too
    try:
        config: SimulationConfig = from_mapping(SimulationConfig, options.config.get("simulation", {}))
        tables = {name: depth_arms.made_up_costs(name, config.tiers, sorted(config.batches)) for name in config.costs}
        if options.costs is not None:
            tables = {options.costs.stem: depth_arms.measured_costs(options.costs)}
        for table in tables.values():
            table.lookup(max(config.batches), 0.0)
            for cell in config.cells:
                synthetic.parse(cell, max(1, *table.tiers))
    except (ValueError, TypeError) as error:
        raise common.RunError(f"config field 'simulation': {error}") from None
    return config, tables


def _engine_sections(options: Options) -> dict[str, Any]:
    return {name: section for name, section in options.config.items() if name != "simulation"}


def _simulated(
    options: Options, config: SimulationConfig, cost: str, table: CostTable, arms: Sequence[str]
) -> Iterator[dict[str, Any]]:
    coefficients = common.split_config(_engine_sections(options))[0].speculation.specustream
    for cell in config.cells:
        print(f"{cost}, {cell}", file=sys.stderr)
        for batch in config.batches:
            for seed in range(options.seed, options.seed + options.repeats):
                for arm in arms:
                    sizes = {"batch": batch, "ticks": config.ticks, "rounds": config.rounds}
                    row = depth_arms.simulate_arm(arm, cell, table, **sizes, seed=seed, specustream=coefficients)
                    if seed > options.seed:  # one curve is enough to look at
                        row |= {"depth_curve": None, "regret_curve": None}
                    yield {"cost": cost, "cell": cell, "batch": batch, "seed": seed, "policy": arm, **row}


def compared(rows: Sequence[dict[str, Any]], tiers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Add ratios to the rows of one cost: to plain, to the best fixed depth, and to the best one for the whole mix.

    The best depth of a cell and batch brings the most in the mean over seeds. That of the mix needs the least time for
    as many tokens from every cell, batch and seed. Both are chosen in hindsight.
    """
    goodput = {(row["cell"], row["batch"], row["seed"], row["policy"]): row["goodput"] for row in rows}
    runs = sorted({key[:3] for key in goodput})
    mix = min(tiers, key=lambda tier: sum(1 / goodput[*run, fixed_arm(tier)] for run in runs))
    for row in rows:
        run = (row["cell"], row["batch"], row["seed"])
        seeds = [other for other in runs if other[:2] == run[:2]]
        best = max(tiers, key=lambda tier: sum(goodput[*other, fixed_arm(tier)] for other in seeds))
        ratios = {
            "best_fixed": best,
            "ratio_to_best_fixed": row["goodput"] / goodput[*run, fixed_arm(best)],
            "ratio_to_plain": row["goodput"] / goodput[*run, PLAIN],
            "mix_fixed": mix,
            "ratio_to_mix_fixed": row["goodput"] / goodput[*run, fixed_arm(mix)],
        }
        yield row | ratios


def order(arms: tuple[str, ...], *, seed: int, repeat: int, workload: int) -> list[str]:
    """Draw the order of the arms in a repeat: anew for every other one, backwards in the one after it."""
    drawn = np.random.default_rng([seed, repeat // 2, workload]).permutation(len(arms))
    return [arms[index] for index in (drawn[::-1] if repeat % 2 else drawn)]


def compare_on_engine(options: Options, make_engine: Callable[[Config], Engine]) -> None:
    """Run every arm on every workload, repeat by repeat, and write the rows of a workload when all its arms have run.

    Raises:
      RunError: the config, a workload or the output is unusable.
    """
    config, sampling = engine_config(options)
    speculation, made_up = config.speculation, config.speculation.method == "synthetic"
    arms = list_arms(options.policies, speculation.depths, synthetic=made_up)
    texts = {name: read_workload(path)[: options.num_prompts] for name, path in options.workloads}
    requests = {name: _requests(lines, sampling, options.seed) for name, lines in texts.items()}
    greedy = all(prompt.params.temperature == 0 for prompts in requests.values() for prompt in prompts)
    try:
        engine = make_engine(config)
    except (ValueError, OSError) as error:
        raise common.RunError(str(error)) from None
    facts: dict[str, Any] = {"synthetic": made_up, "compares_tokens": greedy and not made_up}
    facts["concurrency"] = config.pipeserve.max_num_seqs * config.topology.num_pairs
    facts["workloads"] = {name: hashlib.sha256(json.dumps(lines).encode()).hexdigest() for name, lines in texts.items()}
    bench = depth_arms.Bench(engine)
    with _rows(options, mode="engine", max_different=options.max_different, **facts) as write:
        for arm in arms:  # what a first run pays for is nobody's
            bench.run(arm, next(iter(requests.values()))[:2])
        for repeat in range(options.repeats):
            for index, (name, prompts) in enumerate(requests.items()):
                drawn = order(arms, seed=options.seed, repeat=repeat, workload=index)
                runs = {arm: bench.run(arm, prompts) for arm in drawn}
                for position, arm in enumerate(drawn):
                    row = facts_of(runs, arm, compares=facts["compares_tokens"])
                    write({"repeat": repeat, "workload": name, "arm": arm, "position": position, **row})
    engine.close()


def engine_config(options: Options) -> tuple[Config, dict[str, Any]]:
    """Divide the configuration into the engine's, with the concurrency that was asked for, and the requests'.

    Raises:
      RunError: an unknown field, a wrong value, or a prefix cache, which would favour whatever runs later.
    """
    config, sampling = common.split_config(_engine_sections(options))
    if config.pipeserve.enable_prefix_caching:
        raise common.RunError(
            "set pipeserve.enable_prefix_caching=False: a prefix cache favours the arms that run later"
        )
    if options.concurrency is not None:
        slots, rest = divmod(options.concurrency, config.topology.num_pairs)
        if rest:
            raise common.RunError(
                f"concurrency={options.concurrency} must divide over {config.topology.num_pairs} pairs"
            )
        config = dataclasses.replace(config, pipeserve=dataclasses.replace(config.pipeserve, max_num_seqs=slots))
    return config, sampling | ({} if options.max_tokens is None else {"max_tokens": options.max_tokens})


def read_workload(path: pathlib.Path) -> list[str]:
    """Read the prompts of JSON lines, each with "prompt" or with "turns", of which the first counts.

    Raises:
      RunError: the file cannot be read, or a line has neither.
    """
    lines = common.read_json_lines(path, what="the workload ")
    try:
        texts = [line["prompt"] if "prompt" in line else line["turns"][0] for line in lines]
    except (KeyError, TypeError, IndexError) as error:
        raise common.RunError(f"cannot read the workload {str(path)!r}: {type(error).__name__}: {error}") from None
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise common.RunError(
            f'the workload {str(path)!r} must have lines of {{"prompt": text}} or {{"turns": [text]}}'
        )
    return texts


def _requests(texts: Sequence[str], sampling: Mapping[str, Any], seed: int) -> list[Prompt]:
    try:
        return [
            Prompt(request_id=str(index), text=text, params=SamplingParams(**{"seed": seed + index, **sampling}))
            for index, text in enumerate(texts)
        ]
    except (ValueError, TypeError) as error:
        raise common.RunError(f"config field 'sampling': {error}") from None


def facts_of(runs: Mapping[str, ArmRun], arm: str, *, compares: bool) -> dict[str, Any]:
    """Say what a row says of an arm: its own numbers, and how many prompts have the tokens of plain decoding."""
    own, plain = runs[arm], runs[PLAIN]
    same = sum(a == b for a, b in zip(own.tokens, plain.tokens, strict=True)) if compares else None
    return {"prompts": len(own.tokens), "same_as_plain": same, **own.row}


@contextlib.contextmanager
def _rows(options: Options, **facts: Any) -> Generator[Callable[[Mapping[str, Any]], None]]:
    """Open the output, with its header; gives what writes a row. Folders of this machine are left out of it."""
    command = ("python", "-m", "experiments.compare_depth", *_portable(options.command))
    shares = bool(options.config.get("topology", {}).get("share_devices"))
    record = common.environment(share_devices=shares, command=command) | {"config": _portable(options.config)}
    try:
        file = jsonl.JsonLinesFile(options.output)
        file.write({"kind": "header", **facts, "seed": options.seed, **record})
        yield lambda row: file.write({"kind": facts["mode"], "synthetic": facts["synthetic"], **_portable(row)})
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
        text, refused = depth_report.tables(*depth_report.read_rows(options.output))
    except common.RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return common.EXIT_UNUSABLE
    except KeyboardInterrupt:
        print("interrupted: the output holds the runs that were finished", file=sys.stderr)
        return common.EXIT_INTERRUPTED
    print(text)
    for refusal in refused:
        print(f"refused: {refusal}", file=sys.stderr)
    return common.EXIT_SOME_FAILED if refused else common.EXIT_OK


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    del argv
    try:
        options = read_options(flags.FLAGS, sys.argv[1:])
    except common.RunError as error:
        common.stop(str(error))
    return run(options, flags.FLAGS.mode, streamserve.LLM.from_config)


if __name__ == "__main__":
    depth_options.define_flags(flags.FLAGS)
    flags.adopt_module_key_flags(depth_options)  # or --help would not list them
    common.run_main(main, default_config=DEFAULT_CONFIG)
