"""The command line of `compare_depth`: its flags, and what they mean together."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

import streamserve
from experiments import common

BUNDLED_PROMPTS = pathlib.Path(streamserve.__file__).parent / "assets" / "prompts.jsonl"


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags; on call and not on import, since other scripts have flags of the same names."""
    flags.DEFINE_enum("mode", "simulate", ["simulate", "engine"], "What runs the arms.", flag_values=values)
    flags.DEFINE_string("output", "rows.jsonl", "JSON lines; replaced if it exists.", flag_values=values)
    flags.DEFINE_list("policies", None, "Policies; all by default. Fixed depths always run.", flag_values=values)
    flags.DEFINE_integer("repeats", 4, "Repeats, or seeds of a simulation.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of orders, requests and simulations.", lower_bound=0, flag_values=values)
    flags.DEFINE_string("costs", None, "Measured cost table for the simulation, JSON.", flag_values=values)
    flags.DEFINE_multi_string("workload", None, "NAME=FILE.jsonl; the bundled prompts if none.", flag_values=values)
    flags.DEFINE_integer("num_prompts", None, "First lines of each workload.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("max_tokens", None, "Instead of the config's.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("concurrency", None, "Requests that decode at once.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("max_different", 0, "Prompts of a run that may differ.", lower_bound=0, flag_values=values)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line.

    Attributes:
      config: sections of the config file.
      output: file of rows.
      policies: to compare; None for all.
      repeats: of the engine, or seeds of the simulation.
      seed: of everything random.
      costs: measured cost table.
      workloads: names and files.
      num_prompts: first lines of each workload; None for all.
      max_tokens: of a request; None for the config's.
      concurrency: requests that decode at once; None for the config's.
      max_different: prompts of a run whose greedy tokens may differ from plain decoding's.
      command: the command line as it was given.
    """

    config: Mapping[str, Any]
    output: pathlib.Path
    policies: tuple[str, ...] | None = None
    repeats: int = 4
    seed: int = 0
    costs: pathlib.Path | None = None
    workloads: tuple[tuple[str, pathlib.Path], ...] = (("bundled", BUNDLED_PROMPTS),)
    num_prompts: int | None = None
    max_tokens: int | None = None
    concurrency: int | None = None
    max_different: int = 0
    command: tuple[str, ...] = ()


def read_options(values: flags.FlagValues, command: Sequence[str]) -> Options:
    """Gather the flags.

    Raises:
      RunError: a workload is not of the form NAME=FILE, or two have one name.
    """
    pairs = [text.partition("=") for text in values.workload or []]
    if any(not (name and path) for name, _, path in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise common.RunError(f"--workload must be NAME=FILE.jsonl with names that differ, got {values.workload}")
    names = ("repeats", "seed", "num_prompts", "max_tokens", "concurrency", "max_different")
    given: dict[str, Any] = {name: values[name].value for name in names}
    if pairs:
        given["workloads"] = tuple((name, pathlib.Path(path)) for name, _, path in pairs)
    return Options(
        config=values.config.to_dict(),
        output=pathlib.Path(values.output),
        policies=tuple(values.policies) if values.policies else None,
        costs=pathlib.Path(values.costs) if values.costs else None,
        command=tuple(command),
        **given,
    )
