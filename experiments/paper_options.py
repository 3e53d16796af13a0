"""The command line of the reproduction of the StreamServe paper."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments import common, paper_arms

MODES = ("offline", "open")


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags; on call and not on import, since other scripts have flags of the same names."""
    flags.DEFINE_string("output", "rows.jsonl", "JSON lines; replaced if it exists.", flag_values=values)
    flags.DEFINE_multi_string("workload", None, "NAME=FILE.jsonl; the bundled prompts if none.", flag_values=values)
    flags.DEFINE_integer("num_prompts", None, "First lines of each workload.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("max_tokens", None, "Instead of the config's.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("repeats", 5, "Runs of every arm, workload and mode.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of orders, requests and arrivals.", lower_bound=0, flag_values=values)
    flags.DEFINE_list("routers", ["flowguard"], "Routers besides round_robin.", flag_values=values)
    flags.DEFINE_list("policies", ["specustream"], "Depth policies besides plain decoding.", flag_values=values)
    flags.DEFINE_list("fleets", None, "Of the config; all by default.", flag_values=values)
    flags.DEFINE_list("modes", list(MODES), "offline, open or both.", flag_values=values)
    flags.DEFINE_float("rate", 4.0, "Requests a second of the open loop, Poisson.", flag_values=values)
    flags.DEFINE_integer("concurrency", 8, "Decode slots of a fleet, all pairs.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("max_different", 0, "Prompts of a run that may differ.", lower_bound=0, flag_values=values)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line.

    Attributes:
      config: sections of the config file.
      output: file of rows.
      workloads: names and files.
      num_prompts: first lines of each workload; None for all.
      max_tokens: of a request; None for the config's.
      repeats: runs of every arm, workload and mode.
      seed: of orders, requests and arrivals.
      routers: besides round robin; the first one is StreamServe's.
      policies: besides plain decoding; the first one is StreamServe's.
      fleets: names; None for all of the config.
      modes: of `MODES`.
      rate: of the open loop, requests a second.
      concurrency: decode slots of a fleet.
      max_different: prompts of a run whose tokens may differ between two arms that are compared.
      command: the command line as it was given.
    """

    config: Mapping[str, Any]
    output: pathlib.Path
    workloads: tuple[tuple[str, pathlib.Path], ...] = (("bundled", common.BUNDLED_PROMPTS),)
    num_prompts: int | None = None
    max_tokens: int | None = None
    repeats: int = 5
    seed: int = 0
    routers: tuple[str, ...] = ("flowguard",)
    policies: tuple[str, ...] = ("specustream",)
    fleets: tuple[str, ...] | None = None
    modes: tuple[str, ...] = MODES
    rate: float = 4.0
    concurrency: int = 8
    max_different: int = 0
    command: tuple[str, ...] = ()


def read_options(values: flags.FlagValues, command: Sequence[str]) -> Options:
    """Gather the flags.

    Raises:
      RunError: a workload is not of the form NAME=FILE or two have one name, or there is no such mode, or nothing to
        compare with round robin and plain decoding.
    """
    pairs = [text.partition("=") for text in values.workload or []]
    if any(not (name and path) for name, _, path in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise common.RunError(f"--workload must be NAME=FILE.jsonl with names that differ, got {values.workload}")
    if not values.modes or not set(values.modes) <= set(MODES):
        raise common.RunError(f"--modes must be among {', '.join(MODES)}, got {values.modes}")
    for name, base in (("routers", paper_arms.BASE_ROUTER), ("policies", paper_arms.PLAIN)):
        if not values[name].value or base in (values[name].value or ()):
            raise common.RunError(f"--{name} must name what to compare with {base!r}, got {values[name].value}")
    if not values.rate > 0:
        raise common.RunError(f"--rate must be positive, got {values.rate}")
    names = ("num_prompts", "max_tokens", "repeats", "seed", "rate", "concurrency", "max_different")
    given: dict[str, Any] = {name: values[name].value for name in names}
    if pairs:
        given["workloads"] = tuple((name, pathlib.Path(path)) for name, _, path in pairs)
    lists = {name: tuple(dict.fromkeys(values[name].value or ())) for name in ("routers", "policies", "modes")}
    return Options(
        config=values.config.to_dict(),
        output=pathlib.Path(values.output),
        fleets=tuple(values.fleets) if values.fleets else None,
        command=tuple(command),
        **lists,
        **given,
    )
