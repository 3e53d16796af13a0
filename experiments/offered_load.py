"""What an open-loop run offers: which prompt arrives when, whatever becomes of those before it.

Prompts are made when they are asked for, since those of a long trace would not fit in memory, and the same again when
they are asked for again.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import arrivals, traces
from experiments.arrivals import Pacing, RampUp
from experiments.traces import TraceScale
from streamserve import workload, workload_fields
from streamserve.config import Config
from streamserve.models import load_config, resolve_path
from streamserve.tokenizer import Tokenizer, load_eos_ids
from streamserve.types import Prompt


class Offer(NamedTuple):
    """A request that will arrive.

    Attributes:
      at_s: when, seconds from the first arrival.
      id: as its line gives it; None where it gives none.
      line_number: of its line, from 1.
      request_id: unique in the load.
      greedy: its output is a function of its prompt.
      make: builds its prompt.
    """

    at_s: float
    id: str | int | None
    line_number: int
    request_id: str
    greedy: bool
    make: Callable[[], Prompt]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OfferedLoad:
    """All requests of a run.

    Attributes:
      offers: in the order of arrival.
      rate: that was asked for, or that of a replay as it turned out, requests a second; None where all come at once or
        the rate ramps up.
      bad_lines: lines of the input that are no requests.
      facts: what the run's record says of the load, as JSON values: where it is from, the process of arrivals or the
        factors, rate (requests a second) and coefficient of variation as they turned out, and what was clipped.
    """

    offers: tuple[Offer, ...]
    rate: float | None
    bad_lines: tuple[workload.BadLine, ...] = ()
    facts: Mapping[str, Any]


def from_lines(entries: Sequence[workload.WorkItem | workload.BadLine], pacing: Pacing, seed: int) -> OfferedLoad:
    """Let the lines of an input arrive by a process.

    Args:
      entries: lines that were read.
      pacing: the process.
      seed: of the arrivals.
    """
    items = [entry for entry in entries if isinstance(entry, workload.WorkItem)]
    at_s = arrivals.draw(len(items), pacing, seed)
    offers = [
        Offer(
            at_s=float(moment_s),
            id=item.origin.id,
            line_number=item.origin.line_number,
            request_id=item.prompt.request_id,
            greedy=item.prompt.params.greedy,
            make=functools.partial(_given, item.prompt),
        )
        for moment_s, item in zip(at_s, items, strict=True)
    ]
    return OfferedLoad(
        offers=tuple(offers),
        rate=_rate(pacing),
        bad_lines=tuple(entry for entry in entries if isinstance(entry, workload.BadLine)),
        facts={"source": "input", **_pacing_facts(pacing), **_measured_facts(at_s)},
    )


def from_trace(
    rows: Sequence[traces.TraceRow],
    scale: TraceScale,
    *,
    max_model_len: int,
    pacing: Pacing | None,
    vocabulary: np.ndarray,
    defaults: Mapping[str, Any],
    seed: int,
) -> OfferedLoad:
    """Let the requests of a trace arrive as they were recorded, each answered with as many tokens as was recorded.

    Args:
      rows: of the trace, in order of time.
      scale: of times and lengths.
      max_model_len: most tokens of prompt and answer together.
      pacing: a process of arrivals instead of the recorded ones; None for those.
      vocabulary: token ids that prompts are made of.
      defaults: sampling parameters, as far as they do not decide when an answer ends.
      seed: of the prompts, and of the arrivals where they are drawn.

    Raises:
      ValueError: a default is wrong.
    """
    scaled = traces.fit(rows, scale.length, max_model_len=max_model_len)
    if pacing is None:
        at_s = arrivals.replay([row.at_s for row in rows], scale.time)
        process = {"source": "trace", "time_scale": scale.time}
    else:
        at_s = arrivals.draw(len(rows), pacing, seed)
        process = {"source": "trace, arrivals drawn", **_pacing_facts(pacing)}
    free = {"ignore_eos": True, "stop": [], "stop_token_ids": [], "min_tokens": 0}
    greedy = workload_fields.sampling_params(defaults, free, workload_fields.ALIASES).greedy
    make = functools.partial(_made_up, scaled.block_tokens, vocabulary, {**defaults, **free}, seed)
    offers = [
        Offer(
            at_s=float(moment_s),
            id=f"line-{row.line_number}",
            line_number=row.line_number,
            request_id=f"line-{row.line_number}",
            greedy=greedy,
            make=functools.partial(make, row),
        )
        for moment_s, row in zip(at_s, scaled.rows, strict=True)
    ]
    facts = {
        **process,
        "length_scale": scale.length,
        "block_tokens": scaled.block_tokens,
        "clipped_prompts": scaled.clipped_prompts,
        "clipped_outputs": scaled.clipped_outputs,
        **_measured_facts(at_s),
    }
    rate = facts["offered_rate"] if pacing is None else _rate(pacing)
    return OfferedLoad(offers=tuple(offers), rate=rate, facts=facts)


def plain_tokens(config: Config, tokenizer: Tokenizer | None) -> np.ndarray:
    """Token ids that a made-up prompt may hold: those that the model and its tokenizer have, without special ones.

    Args:
      config: names the model.
      tokenizer: None where token ids alone are served.

    Returns:
      [any] int64, ascending.
    """
    special = set(load_eos_ids(resolve_path(config.model.model)))
    known = set(range(load_config(config.model.model).vocab_size))
    if tokenizer is not None:
        special |= {*tokenizer.special_ids, *tokenizer.eos_ids}
        known &= set(tokenizer.vocabulary().values())
    return np.array(sorted(known - special), np.int64)


def _given(prompt: Prompt) -> Prompt:
    return prompt


def _made_up(
    block_tokens: int, vocabulary: np.ndarray, sampling: Mapping[str, Any], seed: int, row: traces.TraceRow
) -> Prompt:
    params = workload_fields.sampling_params(sampling, {"max_tokens": row.output_tokens}, workload_fields.ALIASES)
    tokens = traces.prompt_of(row, block_tokens, vocabulary, seed)
    return Prompt(request_id=f"line-{row.line_number}", params=params, token_ids=tokens)


def _rate(pacing: Pacing) -> float | None:
    """Give the rate of a process that has a finite one throughout."""
    return pacing.request_rate if pacing.request_rate < math.inf else None


def _pacing_facts(pacing: Pacing) -> dict[str, Any]:
    facts: dict[str, Any] = {"burstiness": pacing.burstiness, "ramp_up_strategy": pacing.ramp_up.value}
    if pacing.ramp_up is not RampUp.NONE:
        return facts | {"ramp_up_start_rps": pacing.start_rps, "ramp_up_end_rps": pacing.end_rps}
    rate = _rate(pacing)
    return facts | {"request_rate": "inf" if rate is None else rate}  # JSON has no infinity


def _measured_facts(at_s: np.ndarray) -> dict[str, Any]:
    measured = arrivals.measure(at_s)
    return {"requests": len(at_s), "offered_rate": measured.rate, "interarrival_cv": measured.cv}
