"""What a run measured: counters of the engine, times of requests, and the summary that users of LLM servers know.

Names and units are those of `vllm bench serve`; what was not measured is left out, never written as zero. It reads
finished outputs only and holds no clock.

Definitions: time to first token (TTFT) is from arrival to the first token on the host, hand-off included; time per
output token (TPOT) is (end to end - TTFT) / (output tokens - 1), undefined for one token; the acceptance length counts
the bonus token; the acceptance rate is in percent, rates by position are fractions of verification steps. Inter-token
latencies (ITL) are gaps between the moments at which the host received tokens: speculation gives several at once, so
ITL is not TPOT; all gaps count alike. Queue, prefill, transfer and decode are the stages of `RequestMetrics`, which
add up to the end-to-end latency (E2EL). With `n` > 1 each completion counts by itself in latencies, stages and sums.

Goodput is good requests a second of wall time, where a request is good if it was answered and every completion of it
is within all limits of `ServiceLevels`; TPOT of one token counts as 0, as in vLLM. SLO attainment is good requests over
all that were sent: those that were refused or failed miss every limit.
"""

import array
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from streamserve.types import RequestMetrics, RequestOutput

LISTED_ITLS = 1000  # completions whose gaps go into the summary; 200 gaps each are 4 MB of JSON
STAGES = ("queue", "prefill", "page_wait", "transfer", "decode")  # of a request, one after the other
PERCENTILES = (50, 90, 95, 99)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLevels:
    """What every request is to be answered within: the service-level objective (SLO). None sets no limit.

    Attributes:
      ttft_s: time to first token, seconds from arrival.
      tpot_s: time per output token after the first, seconds.
      e2el_s: end to end, seconds from arrival to the last token.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2el_s: float | None = None

    def __post_init__(self) -> None:
        """Check the limits.

        Raises:
          ValueError: there is none, or one is not positive.
        """
        if not self.limits_s:
            raise ValueError("service levels need at least one limit")
        for name, limit_s in self.limits_s.items():
            if not limit_s > 0:
                raise ValueError(f"the limit of {name} must be positive, got {limit_s} s")

    @property
    def limits_s(self) -> dict[str, float]:
        """The limits that are set, by the names "ttft", "tpot" and "e2el"."""
        limits_s = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2el": self.e2el_s}
        return {name: limit_s for name, limit_s in limits_s.items() if limit_s is not None}

    def met(self, output: RequestOutput) -> dict[str, bool]:
        """Tell for each limit whether all completions of a request are within it; no is the answer if it has none."""
        return {
            name: output.error is None
            and all(
                _latencies_s(times, len(completion.token_ids))[name] <= limit_s
                for completion, times in zip(output.outputs, output.metrics, strict=True)
            )
            for name, limit_s in self.limits_s.items()
        }


def _latencies_s(times: RequestMetrics, num_tokens: int) -> dict[str, float]:
    """Give the latencies of one completion; its time per output token is 0 where it has one."""
    gaps = num_tokens - 1
    return {
        "ttft": times.first_token_s - times.arrival_s,
        "tpot": (times.finished_s - times.first_token_s) / gaps if gaps > 0 else 0.0,
        "e2el": times.finished_s - times.arrival_s,
    }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters of an engine since it was built, warm-up left out.

    Attributes:
      prefill_calls: dispatches of prefill programs, over all lanes.
      ticks: dispatches of decode programs, over all lanes.
      kv_transfers: hand-offs from a prefill to a decode mesh.
      kv_transfer_pages: pages of the target's cache that they carried, those of requests that never ended included.
      kv_transfer_bytes: bytes that they carried.
      local_prefills: prompts that were computed where they were decoded, though there is a prefill mesh.
      preemptions: how often a request lost its decode slot to another.
      prefix_queried_tokens: prompt tokens that were looked up in the prefix cache; 0 where there is none.
      prefix_hit_tokens: those of them that it had.
      refused: requests that were never served, because they do not fit.
      cancelled: requests that their caller gave up.
      timed_out: requests whose deadline passed.
      failed: requests that an error ended.
      programs: programs compiled in warm-up.
      compilations_after_warmup: programs compiled while requests were served; 0 is the law.
      warmup_s: seconds that building and compiling took.
    """

    prefill_calls: int = 0
    ticks: int = 0
    kv_transfers: int = 0
    kv_transfer_pages: int = 0
    kv_transfer_bytes: int = 0
    local_prefills: int = 0
    preemptions: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    refused: int = 0
    cancelled: int = 0
    timed_out: int = 0
    failed: int = 0
    programs: int = 0
    compilations_after_warmup: int = 0
    warmup_s: float = 0.0


class Tally:
    """Numbers of finished requests, added one by one: a few a request, and 8 bytes for each gap between its tokens."""

    def __init__(self, levels: ServiceLevels | None = None):
        """Start at zero.

        Args:
          levels: what requests are judged by; None judges nothing.
        """
        self.levels = levels
        self.good = 0  # requests within all limits
        self.met: dict[str, int] = {} if levels is None else dict.fromkeys(levels.limits_s, 0)  # requests, by limit
        self.sent = 0  # requests, answered or not
        self.failed = 0
        self.output_tokens = 0  # generated so far
        self.input_lens: list[int] = []  # a request
        self.output_lens: list[int] = []  # a request, all completions together
        self.ttfts_s: list[float] = []  # a completion
        self.tpots_s: list[float] = []  # a completion of two or more tokens
        self.latencies_s: list[float] = []  # a completion
        self.stages_s = {name: array.array("d") for name in STAGES}  # a completion
        self.itls_s = array.array("d")  # gaps of all completions, one after the other
        self.num_itls = array.array("L")  # a completion
        self.paper_rates: list[float] = []  # a completion: (input + output tokens) / latency
        self.prompt_tokens = 0  # a prompt counts once a completion, since each is prefilled
        self.cached_tokens = 0
        self.num_preemptions = 0
        self.drafts = 0  # verification steps with at least one draft token
        self.draft_tokens = 0
        self.accepted_tokens = 0
        self.accepted_per_position: list[int] = []

    @property
    def completed(self) -> int:
        """Requests answered."""
        return len(self.input_lens)

    def add(self, output: RequestOutput) -> None:
        """Take in one request."""
        self._judge(output)
        if output.error is not None:
            self.failed += 1
            return
        self.input_lens.append(len(output.prompt_token_ids))
        num_output = sum(len(completion.token_ids) for completion in output.outputs)
        self.output_lens.append(num_output)
        self.output_tokens += num_output
        for completion, times in zip(output.outputs, output.metrics, strict=True):
            num_tokens = len(completion.token_ids)
            latencies_s = _latencies_s(times, num_tokens)
            self.ttfts_s.append(latencies_s["ttft"])
            self.latencies_s.append(latencies_s["e2el"])
            if num_tokens > 1:
                self.tpots_s.append(latencies_s["tpot"])
            if latencies_s["e2el"] > 0:
                self.paper_rates.append((len(output.prompt_token_ids) + num_tokens) / latencies_s["e2el"])
            self.prompt_tokens += len(output.prompt_token_ids)
            self._add_stages(times)
            self._add_steps(times)

    def _judge(self, output: RequestOutput) -> None:
        self.sent += 1
        if self.levels is not None:
            met = self.levels.met(output)
            self.good += all(met.values())
            for name, within in met.items():
                self.met[name] += within

    def _add_stages(self, times: RequestMetrics) -> None:
        stages_s = (times.queue_s, times.prefill_s, times.page_wait_s, times.transfer_s, times.decode_s)
        for name, stage_s in zip(STAGES, stages_s, strict=True):
            self.stages_s[name].append(stage_s)
        self.itls_s.extend(times.itls_s)
        self.num_itls.append(len(times.itls_s))
        self.cached_tokens += times.cached_tokens
        self.num_preemptions += times.num_preemptions

    def _add_steps(self, times: RequestMetrics) -> None:
        for drafted, accepted in zip(times.drafted_per_step, times.accepted_per_step, strict=True):
            if drafted == 0:
                continue
            self.drafts += 1
            self.draft_tokens += drafted
            self.accepted_tokens += accepted
            missing = drafted - len(self.accepted_per_position)
            self.accepted_per_position += [0] * max(0, missing)
            for position in range(accepted):
                self.accepted_per_position[position] += 1

    def add_failure(self) -> None:
        """Take in one input line that never became a request, so was not sent."""
        self.failed += 1


def summarise(outputs: Tally | Iterable[RequestOutput], duration_s: float, stats: EngineStats) -> dict[str, Any]:
    """Summarise a run as one JSON object.

    Args:
      outputs: finished requests, or the tally of them.
      duration_s: wall time of serving them, warm-up left out.
      stats: counters of the engine.

    Returns:
      Keys of `vllm bench serve`, besides
      - the counters of `EngineStats`, where `failed` is called `engine_failed`: `failed` counts all that were not
        answered, bad input lines included;
      - `cached_tokens`, `num_preemptions` and `kv_transfer_s`: sums over completions;
      - `prefix_cache_hit_rate`: cached prompt tokens / prompt tokens, a fraction, over completions;
      - where the tally judges: `request_goodput`, `slo_attainment`, and for each limit NAME `slo_NAME_ms` and
        `slo_attainment_NAME`; attainments are fractions of the requests sent;
      - `paper_3_6_tokens_per_s`: the mean over completions of (input + output tokens) / latency, which is what section
        3.6 of the StreamServe paper calls throughput. It is not the fleet's output tokens a second.
      `itls` holds the gaps of the first `LISTED_ITLS` completions only, a list each, in the order of `ttfts`.
    """
    tally = outputs if isinstance(outputs, Tally) else _tally(outputs)
    total_input, total_output = sum(tally.input_lens), tally.output_tokens
    results: dict[str, Any] = {
        "duration": duration_s,
        "completed": tally.completed,
        "failed": tally.failed,
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
    }
    if duration_s > 0:
        results["request_throughput"] = tally.completed / duration_s
        results["output_throughput"] = total_output / duration_s
        results["total_token_throughput"] = (total_input + total_output) / duration_s
    latencies = {"ttft": tally.ttfts_s, "tpot": tally.tpots_s, "itl": tally.itls_s, "e2el": tally.latencies_s}
    for name, values in (latencies | tally.stages_s).items():
        results |= _distribution_ms(name, values)
    if tally.paper_rates:
        results["paper_3_6_tokens_per_s"] = float(np.mean(tally.paper_rates))
    results |= _goodput(tally, duration_s)
    results |= _speculation(tally)
    results |= _sums(tally, stats)
    results |= {
        "input_lens": tally.input_lens,
        "output_lens": tally.output_lens,
        "ttfts": tally.ttfts_s,
        "latencies": tally.latencies_s,
    }
    if tally.itls_s:
        results["itls"] = _listed_itls(tally)
    return results


def _tally(outputs: Iterable[RequestOutput]) -> Tally:
    tally = Tally()
    for output in outputs:
        tally.add(output)
    return tally


def _distribution_ms(name: str, values_s: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation and percentiles in milliseconds; nothing when there is no value."""
    if not values_s:
        return {}
    values_ms = np.asarray(values_s) * 1000.0
    return {
        f"mean_{name}_ms": float(np.mean(values_ms)),
        f"median_{name}_ms": float(np.median(values_ms)),
        f"std_{name}_ms": float(np.std(values_ms)),
        **{f"p{rank}_{name}_ms": float(np.percentile(values_ms, rank)) for rank in PERCENTILES},
    }


def _goodput(tally: Tally, duration_s: float) -> dict[str, float]:
    """Judge a run by its service levels; nothing where there are none, or nothing was sent."""
    if tally.levels is None or not tally.sent:
        return {}
    results = {"request_goodput": tally.good / duration_s} if duration_s > 0 else {}
    results["slo_attainment"] = tally.good / tally.sent
    for name, limit_s in tally.levels.limits_s.items():
        results[f"slo_{name}_ms"] = 1000 * limit_s
        results[f"slo_attainment_{name}"] = tally.met[name] / tally.sent
    return results


def _sums(tally: Tally, stats: EngineStats) -> dict[str, Any]:
    """Counters of the engine, and sums over completions; no hit rate without a prefix cache."""
    sums = dataclasses.asdict(stats)
    sums["engine_failed"] = sums.pop("failed")
    sums |= {"cached_tokens": tally.cached_tokens, "num_preemptions": tally.num_preemptions}
    if tally.stages_s["transfer"]:
        sums["kv_transfer_s"] = sum(tally.stages_s["transfer"])
    if stats.prefix_queried_tokens and tally.prompt_tokens:
        sums["prefix_cache_hit_rate"] = tally.cached_tokens / tally.prompt_tokens
    return sums


def _listed_itls(tally: Tally) -> list[list[float]]:
    """Gaps of each of the first completions."""
    listed, begin = [], 0
    for count in tally.num_itls[:LISTED_ITLS]:
        listed.append(tally.itls_s[begin : begin + count].tolist())
        begin += count
    return listed


def _speculation(tally: Tally) -> dict[str, Any]:
    """Acceptance, in the names of vLLM; nothing when no token was drafted."""
    if tally.drafts == 0 or tally.draft_tokens == 0:
        return {}
    return {
        "spec_decode_acceptance_rate": 100.0 * tally.accepted_tokens / tally.draft_tokens,
        "spec_decode_acceptance_length": 1.0 + tally.accepted_tokens / tally.drafts,
        "spec_decode_num_drafts": tally.drafts,
        "spec_decode_draft_tokens": tally.draft_tokens,
        "spec_decode_accepted_tokens": tally.accepted_tokens,
        "spec_decode_per_position_acceptance_rates": [count / tally.drafts for count in tally.accepted_per_position],
    }
