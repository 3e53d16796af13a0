"""Benchmarks of the engine as it serves: the host's gaps, disaggregation, long beside short, start, and memory."""

import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import streamserve
from experiments.bench_common import bundled_engine, greedy, random_engine, random_prompts, ratio, spread
from streamserve.types import Prompt

ROOT = pathlib.Path(__file__).parent.parent
PROMPTS = pathlib.Path(streamserve.__file__).parent / "assets" / "prompts.jsonl"


def host_gap(repeats: int) -> dict[str, Any]:
    """Bound the wall time in which a decode mesh has nothing to do between two ticks, by the wall time of decoding.

    A tick that is dispatched before the one ahead of it has ended leaves no gap. Where the one ahead has ended, it
    ended after the last tick that was read, so the gap is at most the time since then: an upper bound, by the host's
    clock alone.
    """
    engine = bundled_engine(pipeserve={"max_num_seqs": 16, "decode_batches": (1,), "max_prefills": 16})
    watch = _TickWatch(engine.pairs[0])
    cells = []
    for count in (1, 16):
        shares, rates = [], []
        for turn in range(repeats + 1):
            watch.clear()
            outputs = engine.generate(random_prompts(count, 64, seed=turn), greedy(128), use_tqdm=False)
            if turn:
                shares.append(watch.gap_s / watch.wall_s)
                rates.append(sum(len(output.outputs[0].token_ids) for output in outputs) / watch.wall_s)
        cells.append({"requests": count, "gap_share": spread(shares), "tokens_per_s": spread(rates)})
    told = ", ".join(f"{cell['requests']} requests: {100 * cell['gap_share']['median']:.1f} %" for cell in cells)
    return {"cells": cells, "summary": f"host gap, at most, {told}"}


class _TickWatch:
    """Listens to a pair's dispatches and reads."""

    def __init__(self, pair: Any):
        self._pair, self._step, self._read = pair, pair.step, pair.read
        pair.step, pair.read = self.step, self.read
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.gap_s, self._ahead, self._begin_s, self._last_s = 0.0, None, 0.0, 0.0

    @property
    def wall_s(self) -> float:
        """Seconds from the first dispatch to the last read."""
        return self._last_s - self._begin_s

    def step(self, tier: int, plan: Any) -> Any:
        """Dispatch, and see whether the device had run dry."""
        now_s = time.perf_counter()
        if not self._begin_s:
            self._begin_s = now_s
        elif self._ahead is None or self._pair.programs.is_ready(self._ahead.packed):
            self.gap_s += now_s - self._last_s
        self._ahead = self._step(tier, plan)
        return self._ahead

    def read(self, pending: Any) -> Any:
        """Read, and note when."""
        output = self._read(pending)
        self._last_s = time.perf_counter()
        if pending is self._ahead:
            self._ahead = None
        return output


def topology(repeats: int) -> dict[str, Any]:
    """Compare a disaggregated pair with a colocated one on the same cores and requests."""
    lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()] * 2
    texts = [line["turns"][0] for line in lines]
    pipeserve = {"max_num_seqs": 8, "prefill_buckets": (64, 256), "enable_prefix_caching": False}
    with tempfile.TemporaryDirectory() as folder:
        trace = pathlib.Path(folder) / "trace.json"
        engines = {
            "disaggregated": bundled_engine(pipeserve=pipeserve, trace=trace),
            "colocated": bundled_engine(pipeserve=pipeserve, topology={"topology": "colocated"}),
        }
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        tokens: dict[str, list[tuple[int, ...]]] = {}
        for turn in range(repeats + 1):
            for name, engine in engines.items():
                begin = time.perf_counter()
                outputs = engine.generate(texts, greedy(64), use_tqdm=False)
                seconds[name] += [time.perf_counter() - begin] if turn else []
                tokens[name] = [output.outputs[0].token_ids for output in outputs]
        stats = engines["disaggregated"].stats()
        engines["disaggregated"].close()
        overlap = _overlap(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])
    same = sum(a == b for a, b in zip(tokens["disaggregated"], tokens["colocated"], strict=True))
    total = sum(map(len, tokens["colocated"]))
    share = ratio(seconds["colocated"], seconds["disaggregated"])
    return {
        "requests": len(texts),
        "tokens_per_s": {name: spread([total / s for s in values]) for name, values in seconds.items()},
        "disaggregated_over_colocated": share,
        "same_outputs": same,
        "prefill_share_beside_decode": overlap,
        "kv_transfer_pages": stats.kv_transfer_pages,
        "kv_transfer_bytes": stats.kv_transfer_bytes,
        "summary": f"throughput disaggregated over colocated {share['median']:.2f}, {same} of {len(texts)} outputs the "
        f"same, {100 * overlap:.0f} % of prefill time beside decoding",
    }


def _overlap(events: Sequence[dict[str, Any]]) -> float:
    """Share of the prefill spans' time in which a decode span of the same pair runs."""
    spans: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": []}
    tracks = {
        (event["pid"], event["tid"]): event["args"]["name"].split()[0]
        for event in events
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    for event in events:
        if event["ph"] == "X" and (track := tracks.get((event["pid"], event["tid"]))) in spans:
            spans[track].append((event["ts"], event["ts"] + event["dur"]))
    inside = sum(
        max(0.0, min(end, tick_end) - max(begin, tick_begin))
        for begin, end in spans["prefill"]
        for tick_begin, tick_end in spans["decode"]
    )
    return inside / sum(end - begin for begin, end in spans["prefill"])


def long_prompt(repeats: int) -> dict[str, Any]:
    """Measure the time to first token of short prompts beside a long one, in chunks and in one piece."""
    long, shorts = random_prompts(1, 2048)[0], random_prompts(8, 32, seed=1)
    pipeserve = {"max_num_seqs": 16, "max_prefills": 16, "enable_prefix_caching": False}
    engines = {
        "chunks_of_256": random_engine(pipeserve=pipeserve | {"prefill_buckets": (64, 256)}),
        "one_piece": random_engine(pipeserve=pipeserve | {"prefill_buckets": (64, 256, 2048)}),
    }
    short_ms: dict[str, list[float]] = {name: [] for name in engines}
    long_ms: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(repeats + 1):
        for name, engine in engines.items():
            outputs = list(engine.stream(_long_first(long, shorts)))
            ttft_ms = {
                output.request_id: 1000 * (output.metrics[0].first_token_s - output.metrics[0].arrival_s)
                for output in outputs
            }
            if turn:
                long_ms[name].append(ttft_ms.pop("long"))
                short_ms[name].append(statistics.median(ttft_ms.values()))
    gain = ratio(short_ms["one_piece"], short_ms["chunks_of_256"])
    return {
        "short_ttft_ms": {name: spread(values) for name, values in short_ms.items()},
        "long_ttft_ms": {name: spread(values) for name, values in long_ms.items()},
        "one_piece_over_chunks": gain,
        "summary": f"TTFT of short prompts beside 2,048 tokens: {gain['median']:.1f} times longer without chunks",
    }


def _long_first(long: Sequence[int], shorts: Sequence[Sequence[int]]) -> Any:
    """Give the long prompt, and the short ones a moment later, when it is being computed."""
    yield Prompt(request_id="long", params=greedy(4), token_ids=tuple(long))
    for index, short in enumerate(shorts):
        if index == 0:
            time.sleep(0.02)
        yield Prompt(request_id=str(index), params=greedy(4), token_ids=tuple(short))


def second_start(repeats: int) -> dict[str, Any]:
    """Compare the start of a second process with that of the first, both with a persistent compilation cache."""
    first, second = [], []
    for _ in range(min(repeats, 3)):
        with tempfile.TemporaryDirectory() as folder:
            first.append(_start(folder))
            second.append(_start(folder))
    warmups = {"first": [run["warmup_s"] for run in first], "second": [run["warmup_s"] for run in second]}
    walls = {"first": [run["wall_s"] for run in first], "second": [run["wall_s"] for run in second]}
    gain, wall = ratio(warmups["first"], warmups["second"]), ratio(walls["first"], walls["second"])
    return {
        "warmup_s": {name: spread(values) for name, values in warmups.items()},
        "wall_s": {name: spread(values) for name, values in walls.items()},
        "first_over_second_warmup": gain,
        "first_over_second_wall": wall,
        "summary": f"first warm-up over second {gain['median']:.1f}, whole command {wall['median']:.1f}",
    }


def _start(folder: str) -> dict[str, float]:
    """Run the README's first command over one prompt in a process of its own."""
    root = pathlib.Path(folder)
    one = root / "one.jsonl"
    one.write_text(PROMPTS.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    cache = f"--config.compilation_cache_dir={root / 'cache'}"
    command = [sys.executable, "-m", "experiments.generate", f"--input={one}", f"--workdir={root / 'work'}", cache]
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    wall_s = time.perf_counter() - begin
    results = json.loads((root / "work" / "results.json").read_text(encoding="utf-8"))
    return {"warmup_s": results["warmup_s"], "wall_s": wall_s}


def memory(repeats: int) -> dict[str, Any]:
    """Watch the resident set over 2,000 requests, and compare the pools' size with what the config says."""
    del repeats
    count, every = 2000, 100
    sizes = {"prefill_pool_tokens": 4096, "decode_pool_tokens": 8192, "max_num_seqs": 16}
    engine = random_engine(model={"max_model_len": 512}, pipeserve=sizes)
    resident_mb = []
    prompts = random_prompts(count, 48, seed=2)
    stream = (Prompt(request_id=str(i), params=greedy(8), token_ids=tuple(row)) for i, row in enumerate(prompts))
    for index, _ in enumerate(engine.stream(stream)):
        if index % every == every - 1:
            resident_mb.append(_resident_mb())
    half = resident_mb[len(resident_mb) // 2 :]
    store = engine.pairs[0].decode_store
    page_tokens = engine.pairs[0].sizes.page_size
    pool_tokens = (store.pools.target.layers[0].k.shape[0] - 1) * page_tokens
    return {
        "requests": count,
        "resident_mb": resident_mb,
        "growth_of_second_half_mb": half[-1] - half[0],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "decode_pool_tokens": pool_tokens,
        "configured_decode_pool_tokens": sizes["decode_pool_tokens"],
        "summary": f"resident set {half[0]:.0f} MB after {count // 2} requests, {half[-1]:.0f} MB after {count}; the "
        f"decode pool holds {pool_tokens} tokens, configured {sizes['decode_pool_tokens']}",
    }


def _resident_mb() -> float:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
