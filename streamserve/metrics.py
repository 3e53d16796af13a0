"""What a run measured: counters of the engine, times of requests, and the summary that users of LLM servers know.

Names and units are those of `vllm bench serve`; what was not measured is left out, never written as zero. It reads
finished outputs only and holds no clock.

Definitions: time to first token (TTFT) is from arrival to the first token on the host, hand-off included; time per
output token (TPOT) is (end to end - TTFT) / (output tokens - 1), undefined for one token; the acceptance length counts
the bonus token; the acceptance rate is in percent, rates by position are fractions of verification steps. With `n` > 1
each completion counts by itself in latencies.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from streamserve.types import RequestMetrics, RequestOutput

TABLE_WIDTH = 56


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters of an engine since it was built, warm-up left out.

    Attributes:
      ticks: dispatches of decode programs, over all lanes.
      kv_transfers: hand-offs from a prefill to a decode mesh.
      kv_transfer_bytes: bytes that they carried.
      compilations_after_warmup: programs compiled while requests were served; 0 is the law.
      warmup_s: seconds that building and compiling took.
    """

    ticks: int = 0
    kv_transfers: int = 0
    kv_transfer_bytes: int = 0
    compilations_after_warmup: int = 0
    warmup_s: float = 0.0


class Tally:
    """Numbers of finished requests, added one by one; a few a request, never its tokens."""

    def __init__(self) -> None:
        self.failed = 0
        self.output_tokens = 0  # generated so far
        self.input_lens: list[int] = []  # a request
        self.output_lens: list[int] = []  # a request, all completions together
        self.ttfts_s: list[float] = []  # a completion
        self.tpots_s: list[float] = []  # a completion of two or more tokens
        self.latencies_s: list[float] = []  # a completion
        self.paper_rates: list[float] = []  # a completion: (input + output tokens) / latency
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

            self._add_steps(times)

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
      Keys of `vllm bench serve`, besides `compilations_after_warmup`, `kv_transfers`, `kv_transfer_bytes`, `warmup_s`
      and `paper_3_6_tokens_per_s`, the mean over completions of (input + output tokens) / latency, which is what
      section 3.6 of the StreamServe paper calls throughput. It is not the fleet's output tokens a second.
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
    for name, values in (("ttft", tally.ttfts_s), ("tpot", tally.tpots_s), ("e2el", tally.latencies_s)):
        results |= _distribution_ms(name, values)
    if tally.paper_rates:
        results["paper_3_6_tokens_per_s"] = float(np.mean(tally.paper_rates))
    results |= _speculation(tally)
    results |= {
        "kv_transfers": stats.kv_transfers,
        "kv_transfer_bytes": stats.kv_transfer_bytes,
        "compilations_after_warmup": stats.compilations_after_warmup,
        "warmup_s": stats.warmup_s,
        "ticks": stats.ticks,
        "input_lens": tally.input_lens,
        "output_lens": tally.output_lens,
        "ttfts": tally.ttfts_s,
        "latencies": tally.latencies_s,
    }
    return results


def _tally(outputs: Iterable[RequestOutput]) -> Tally:
    tally = Tally()
    for output in outputs:
        tally.add(output)
    return tally


def _distribution_ms(name: str, values_s: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation and 99th percentile in milliseconds; nothing when there is no value."""
    if not values_s:
        return {}
    values_ms = np.asarray(values_s) * 1000.0
    return {
        f"mean_{name}_ms": float(np.mean(values_ms)),
        f"median_{name}_ms": float(np.median(values_ms)),
        f"std_{name}_ms": float(np.std(values_ms)),
        f"p99_{name}_ms": float(np.percentile(values_ms, 99)),
    }


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


_SECTIONS = (
    ("Serving Benchmark Result", "=", (
        ("completed", "Successful requests", "d"),
        ("failed", "Failed requests", "d"),
        ("duration", "Duration (s)", ".2f"),
        ("total_input_tokens", "Total input tokens", "d"),
        ("total_output_tokens", "Total generated tokens", "d"),
        ("request_throughput", "Request throughput (req/s)", ".2f"),
        ("output_throughput", "Output token throughput (tok/s)", ".2f"),
        ("total_token_throughput", "Total token throughput (tok/s)", ".2f"),
        ("paper_3_6_tokens_per_s", "Paper, section 3.6 (tok/s)", ".2f"),
    )),
    ("Time to First Token", "-", (
        ("mean_ttft_ms", "Mean TTFT (ms)", ".2f"),
        ("median_ttft_ms", "Median TTFT (ms)", ".2f"),
        ("p99_ttft_ms", "P99 TTFT (ms)", ".2f"),
    )),
    ("Time per Output Token (without the first)", "-", (
        ("mean_tpot_ms", "Mean TPOT (ms)", ".2f"),
        ("median_tpot_ms", "Median TPOT (ms)", ".2f"),
        ("p99_tpot_ms", "P99 TPOT (ms)", ".2f"),
    )),
    ("End-to-end Latency", "-", (
        ("mean_e2el_ms", "Mean E2EL (ms)", ".2f"),
        ("median_e2el_ms", "Median E2EL (ms)", ".2f"),
        ("p99_e2el_ms", "P99 E2EL (ms)", ".2f"),
    )),
    ("Speculative Decoding", "-", (
        ("spec_decode_acceptance_rate", "Acceptance rate (%)", ".2f"),
        ("spec_decode_acceptance_length", "Acceptance length (tokens)", ".2f"),
        ("spec_decode_num_drafts", "Drafts", "d"),
        ("spec_decode_draft_tokens", "Draft tokens", "d"),
        ("spec_decode_accepted_tokens", "Accepted tokens", "d"),
    )),
    ("Engine", "-", (
        ("kv_transfers", "KV hand-offs", "d"),
        ("kv_transfer_bytes", "KV hand-off (bytes)", "d"),
        ("compilations_after_warmup", "Compilations after warm-up", "d"),
        ("warmup_s", "Warm-up (s)", ".2f"),
    )),
)  # fmt: skip


def format_table(results: dict[str, Any]) -> str:
    """Lay out a summary for the console; keys that `results` lacks are left out, and sections without any."""
    lines = []
    for title, rule, rows in _SECTIONS:
        cells = [(label, format(results[key], spec)) for key, label, spec in rows if key in results]
        if cells:
            lines.append(f" {title} ".center(TABLE_WIDTH, rule))
            lines += [f"{label + ':':<36}{value:>{TABLE_WIDTH - 36}}" for label, value in cells]
    rates = results.get("spec_decode_per_position_acceptance_rates")
    if rates:
        lines.append("Acceptance by position:  " + "  ".join(f"{rate:.2f}" for rate in rates))
    lines.append("=" * TABLE_WIDTH)
    return "\n".join(lines)
