"""The command line of `serve_trace`: its flags, and what they mean together."""

import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments import common
from experiments.arrivals import Pacing, RampUp
from experiments.traces import TraceFormat, TraceScale
from streamserve.metrics import ServiceLevels

PACING_FLAGS = ("request_rate", "burstiness", "ramp_up", "ramp_up_start_rps", "ramp_up_end_rps")
TRACE_FLAGS = ("trace_format", "time_scale", "length_scale")


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags; on call and not on import, since other scripts have flags of the same names."""
    forms, ramps = ([item.value for item in kind] for kind in (TraceFormat, RampUp))
    flags.DEFINE_string("input", None, "JSON lines to serve; the bundled prompts by default.", flag_values=values)
    flags.DEFINE_string("trace", None, "Trace to replay instead.", flag_values=values)
    flags.DEFINE_enum("trace_format", "auto", forms, "By suffix or first line if auto.", flag_values=values)
    flags.DEFINE_integer("num_prompts", None, "First lines only.", lower_bound=1, flag_values=values)
    flags.DEFINE_float("request_rate", math.inf, "Requests/s; inf for all at once.", flag_values=values)
    flags.DEFINE_float("burstiness", 1.0, "Shape of the gamma distribution of gaps.", flag_values=values)
    flags.DEFINE_enum("ramp_up", "none", ramps, "How the rate grows.", flag_values=values)
    flags.DEFINE_float("ramp_up_start_rps", None, "Rate at the beginning, requests/s.", flag_values=values)
    flags.DEFINE_float("ramp_up_end_rps", None, "Rate at the end, requests/s.", flag_values=values)
    flags.DEFINE_float("time_scale", 1.0, "Recorded seconds are multiplied by it.", flag_values=values)
    flags.DEFINE_float("length_scale", 1.0, "Recorded token counts are multiplied by it.", flag_values=values)
    flags.DEFINE_integer("max_tokens", None, "Instead of the config's; no trace.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of arrivals and of made-up prompts.", lower_bound=0, flag_values=values)
    flags.DEFINE_string("goodput", None, "Service levels, ms: ttft:1000,tpot:100,e2el:5000.", flag_values=values)
    flags.DEFINE_bool("check_offline", False, "Generate the same offline, and compare.", flag_values=values)
    flags.DEFINE_bool("live", False, "Show the stream pairs in the terminal.", flag_values=values)
    flags.DEFINE_string("workdir", None, "workdirs/serve_trace-TIME by default.", flag_values=values)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line.

    Attributes:
      config: sections of the config file, the service levels put in.
      source: file of prompts, or trace.
      trace_format: of the trace; None where the source is no trace.
      num_prompts: first lines of it; None for all.
      pacing: process of arrivals; None for those of the trace.
      scale: of times and lengths of the trace.
      seed: of arrivals and of prompts that are made up.
      levels: what requests are judged by; None for the objective of the config.
      check_offline: compare with offline generation.
      live: show the stream pairs in the terminal.
      workdir: folder for the record of the run.
      command: the command line as it was given.
    """

    config: Mapping[str, Any]
    source: pathlib.Path
    trace_format: TraceFormat | None = None
    num_prompts: int | None = None
    pacing: Pacing | None = None
    scale: TraceScale
    seed: int = 0
    levels: ServiceLevels | None = None
    check_offline: bool = False
    live: bool = False
    workdir: pathlib.Path
    command: tuple[str, ...] = ()


def read_options(values: flags.FlagValues, command: Sequence[str]) -> Options:
    """Gather the flags.

    Raises:
      RunError: a value is out of range, or two flags exclude each other.
    """
    given = {name for name in values if values[name].present}
    is_trace = values.trace is not None
    drawn = not is_trace or bool(given.intersection(PACING_FLAGS))
    _exclude(given, is_trace=is_trace, drawn=drawn)
    try:
        pacing = Pacing(
            request_rate=values.request_rate,
            burstiness=values.burstiness,
            ramp_up=RampUp(values.ramp_up),
            start_rps=values.ramp_up_start_rps,
            end_rps=values.ramp_up_end_rps,
        )
        scale = TraceScale(time=values.time_scale, length=values.length_scale)
        levels = None if values.goodput is None else parse_goodput(values.goodput)
    except ValueError as error:
        raise common.RunError(str(error)) from None
    return Options(
        config=with_flags(values.config.to_dict(), levels, values.max_tokens),
        source=pathlib.Path(values.trace if is_trace else values.input or common.BUNDLED_PROMPTS),
        trace_format=TraceFormat(values.trace_format) if is_trace else None,
        num_prompts=values.num_prompts,
        pacing=pacing if drawn else None,
        scale=scale,
        seed=values.seed,
        levels=levels,
        check_offline=values.check_offline,
        live=values.live,
        workdir=pathlib.Path(values.workdir or time.strftime("workdirs/serve_trace-%Y%m%d-%H%M%S")),
        command=tuple(command),
    )


def _exclude(given: set[str], *, is_trace: bool, drawn: bool) -> None:
    """Refuse flags that would have no effect."""
    refused = {
        "--input and --trace exclude each other": is_trace and "input" in given,
        "--max_tokens has no effect: a trace says how long answers are": is_trace and "max_tokens" in given,
        "--time_scale has no effect on arrivals that are drawn": is_trace and drawn and "time_scale" in given,
        f"{', '.join('--' + name for name in TRACE_FLAGS)} need a --trace": (
            not is_trace and bool(given.intersection(TRACE_FLAGS))
        ),
    }
    for message, applies in refused.items():
        if applies:
            raise common.RunError(message)


def parse_goodput(text: str) -> ServiceLevels:
    """Read service levels such as "ttft:1000,tpot:100", in milliseconds, parted by commas or spaces.

    Raises:
      ValueError: a name that is none of ttft, tpot and e2el, one given twice, or a limit that is no positive number.
    """
    limits: dict[str, float] = {}
    for item in re.split(r"[,\s]+", text.strip()):
        name, _, told = item.partition(":")
        if name not in ("ttft", "tpot", "e2el") or f"{name}_s" in limits:
            raise ValueError(f"goodput must be like ttft:1000,tpot:100,e2el:5000, each once, in ms; got {text!r}")
        try:
            limits[f"{name}_s"] = float(told) / 1000
        except ValueError:
            raise ValueError(f"the limit of {name} must be a number of milliseconds, got {told!r}") from None
    return ServiceLevels(**limits)


def with_flags(config: dict[str, Any], levels: ServiceLevels | None, max_tokens: int | None) -> dict[str, Any]:
    """Put flags into the config: FlowGuard aims at what requests are judged by, and requests are greedy by default."""
    sampling = {"temperature": 0.0, **config.get("sampling", {})}
    if max_tokens is not None:
        sampling["max_tokens"] = max_tokens
    routing = dict(config.get("routing", {}))
    if levels is not None:
        named = {"ttft_s": levels.ttft_s, "tpot_s": levels.tpot_s}
        routing |= {name: limit_s for name, limit_s in named.items() if limit_s is not None}
    return {**config, "sampling": sampling, "routing": routing}
