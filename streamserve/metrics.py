"""What a run measured: counters of the engine, times of requests, and the summary that users of LLM servers know.

Names and units are those of `vllm bench serve`; what was not measured is left out, never written as zero. It reads
finished outputs only and holds no clock.

Definitions: time to first token (TTFT) is from arrival to the first token on the host, hand-off included; time per
output token (TPOT) is (end to end - TTFT) / (output tokens - 1), undefined for one token; the acceptance length counts
the bonus token; the acceptance rate is in percent, rates by position are fractions of verification steps. Inter-token
latencies (ITL) are gaps between the moments at which the host received tokens: speculation gives several at once, so
ITL is not TPOT; all gaps count alike. Queue, prefill, transfer and decode are the stages of `RequestMetrics`, which
add up to the end-to-end latency (E2EL). With `n` > 1 each completion counts by itself in latencies, stages and sums.
"""

import array
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from streamserve.types import RequestMetrics, RequestOutput

LISTED_ITLS = 1000  # completions whose gaps go into the summary; 200 gaps each are 4 MB of JSON
STAGES = ("queue", "prefill", "page_wait", "transfer", "decode")  # of a request, one after the other


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters of an engine since it was built, warm-up left out.

    Attributes:
      prefill_calls: dispatches of prefill programs, over all lanes.
      ticks: dispatches of decode programs, over all lanes.
      kv_transfers: hand-offs from a prefill to a decode mesh.
      kv_transfer_pages: pages of the target's cache that they carried, those of requests that never ended included.
      kv_transfer_bytes: bytes that they carried.
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

    def __init__(self) -> None:
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
        if output.error is not None:
            self.failed += 1
            return
        self.input_lens.append(len(output.prompt_token_ids))
        num_output = sum(len(completion.token_ids) for completion in output.outputs)
        self.output_lens.append(num_output)
        self.output_tokens += num_output
        for completion, times in zip(output.outputs, output.metrics, strict=True):
            latency_s, num_tokens = times.finished_s - times.arrival_s, len(completion.token_ids)
            self.ttfts_s.append(times.first_token_s - times.arrival_s)
            self.latencies_s.append(latency_s)
            if num_tokens > 1:
                self.tpots_s.append((times.finished_s - times.first_token_s) / (num_tokens - 1))
            if latency_s > 0:
                self.paper_rates.append((len(output.prompt_token_ids) + num_tokens) / latency_s)
            self.prompt_tokens += len(output.prompt_token_ids)
            self._add_stages(times)
            self._add_steps(times)

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
        """Take in one input line that never became a request."""
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
        f"p90_{name}_ms": float(np.percentile(values_ms, 90)),
        f"p99_{name}_ms": float(np.percentile(values_ms, 99)),
    }


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
