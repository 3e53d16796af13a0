"""The table that a run prints at its end, in the layout of `vllm bench serve`.

It owns titles, labels, order and width. It knows the keys of a summary, and nothing of how they are worked out.
"""

from typing import Any, NamedTuple

WIDTH = 56
LABEL_WIDTH = 36


class _Row(NamedTuple):
    key: str
    label: str
    spec: str  # of `format`


class _Section(NamedTuple):
    title: str
    rule: str  # the character that its title line is filled with
    rows: tuple[_Row, ...]


def _latency_rows(key: str, label: str, stats: tuple[str, ...] = ("mean", "median", "p90", "p99")) -> tuple[_Row, ...]:
    return tuple(_Row(f"{stat}_{key}_ms", f"{stat.capitalize()} {label} (ms)", ".2f") for stat in stats)


_SECTIONS = (
    _Section("Serving Benchmark Result", "=", (
        _Row("completed", "Successful requests", "d"),
        _Row("failed", "Failed requests", "d"),
        _Row("duration", "Duration (s)", ".2f"),
        _Row("total_input_tokens", "Total input tokens", "d"),
        _Row("total_output_tokens", "Total generated tokens", "d"),
        _Row("request_throughput", "Request throughput (req/s)", ".2f"),
        _Row("output_throughput", "Output token throughput (tok/s)", ".2f"),
        _Row("total_token_throughput", "Total token throughput (tok/s)", ".2f"),
        _Row("paper_3_6_tokens_per_s", "Paper, section 3.6 (tok/s)", ".2f"),
    )),
    _Section("Time to First Token", "-", _latency_rows("ttft", "TTFT")),
    _Section("Time per Output Token (without the first)", "-", _latency_rows("tpot", "TPOT")),
    _Section("Inter-token Latency", "-", _latency_rows("itl", "ITL")),
    _Section("End-to-end Latency", "-", _latency_rows("e2el", "E2EL")),
    _Section("Stages of a Request", "-", (
        *_latency_rows("queue", "queue", ("mean", "p99")),
        *_latency_rows("prefill", "prefill", ("mean", "p99")),
        *_latency_rows("page_wait", "wait for pages", ("mean", "p99")),
        *_latency_rows("transfer", "KV transfer", ("mean", "p99")),
        *_latency_rows("decode", "decode", ("mean", "p99")),
    )),
    _Section("Speculative Decoding", "-", (
        _Row("synthetic_acceptance", "SYNTHETIC acceptance", "s"),
        _Row("spec_decode_acceptance_rate", "Acceptance rate (%)", ".2f"),
        _Row("spec_decode_acceptance_length", "Acceptance length (tokens)", ".2f"),
        _Row("spec_decode_num_drafts", "Drafts", "d"),
        _Row("spec_decode_draft_tokens", "Draft tokens", "d"),
        _Row("spec_decode_accepted_tokens", "Accepted tokens", "d"),
    )),
    _Section("Engine", "-", (
        _Row("prefill_calls", "Prefill calls", "d"),
        _Row("ticks", "Decode ticks", "d"),
        _Row("kv_transfers", "KV hand-offs", "d"),
        _Row("kv_transfer_pages", "KV hand-off (pages)", "d"),
        _Row("kv_transfer_bytes", "KV hand-off (bytes)", "d"),
        _Row("cached_tokens", "Cached prompt tokens", "d"),
        _Row("prefix_cache_hit_rate", "Prefix cache hit rate", ".3f"),
        _Row("preemptions", "Preemptions", "d"),
        _Row("cancelled", "Cancelled requests", "d"),
        _Row("timed_out", "Timed out requests", "d"),
        _Row("programs", "Compiled programs", "d"),
        _Row("compilations_after_warmup", "Compilations after warm-up", "d"),
        _Row("warmup_s", "Warm-up (s)", ".2f"),
    )),
)  # fmt: skip


def format_table(results: dict[str, Any]) -> str:
    """Lay out a summary for the console; keys that `results` lacks are left out, and sections without any."""
    lines = []
    for title, rule, rows in _SECTIONS:
        cells = [(label, format(results[key], spec)) for key, label, spec in rows if key in results]
        if cells:
            lines.append(f" {title} ".center(WIDTH, rule))
            lines += [f"{label + ':':<{LABEL_WIDTH}}{value:>{WIDTH - LABEL_WIDTH}}" for label, value in cells]
    rates = results.get("spec_decode_per_position_acceptance_rates")
    if rates:
        lines.append("Acceptance by position:  " + "  ".join(f"{rate:.2f}" for rate in rates))
    lines.append("=" * WIDTH)
    return "\n".join(lines)
