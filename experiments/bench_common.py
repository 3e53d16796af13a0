"""What the parts of the engine's benchmark share: engines to measure, and how figures are summed up."""

import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import streamserve
from pallas_kernels import measure
from streamserve.config import BUNDLED_DRAFT, Config, from_mapping

ASSETS = pathlib.Path(streamserve.__file__).parent / "assets"
VOCAB = 4096  # of the bundled pair, whose shape the random models have


def random_model(folder: str) -> str:
    """Lay out a model folder with the bundled target's shape and no weights: 4.6 million parameters."""
    shutil.copy(ASSETS / "target" / "config.json", folder)
    return folder


def random_engine(**sections: Any) -> streamserve.LLM:
    """Build an engine over a random model; `sections` are those of `Config`, over defaults for benchmarks."""
    with tempfile.TemporaryDirectory() as folder:
        model = {"model": random_model(folder), "skip_tokenizer_init": True, "load_format": "dummy"}
        return _engine(model, sections)


def bundled_engine(*, depth: int = 3, trace: pathlib.Path | None = None, **sections: Any) -> streamserve.LLM:
    """Build an engine over the bundled pair."""
    speculation = {"method": "none"}
    if depth:
        speculation = {"method": "draft_model", "model": BUNDLED_DRAFT, "num_speculative_tokens": depth}
    return _engine({}, {"speculation": speculation} | sections, trace=trace)


def _engine(
    model: Mapping[str, Any], sections: Mapping[str, Any], *, trace: pathlib.Path | None = None
) -> streamserve.LLM:
    merged = dict(sections)
    merged["model"] = {"max_model_len": 2560, **model, **merged.get("model", {})}
    merged["pipeserve"] = {"max_logprobs": 0, "prefill_buckets": (128, 1024), **merged.get("pipeserve", {})}
    return streamserve.LLM.from_config(from_mapping(Config, merged), trace=trace)


def random_prompts(count: int, length: int, *, seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    """Draw prompts of random tokens."""
    rng = np.random.default_rng(seed)
    return [[int(token) for token in row] for row in rng.integers(5, vocab - 96, (count, length))]


def greedy(max_tokens: int) -> streamserve.SamplingParams:
    """Ask for exactly so many tokens."""
    return streamserve.SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def timed(run: Callable[[], Any]) -> float:
    """Seconds until what a function returns is computed."""
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time each run once a turn, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            elapsed_s = timed(run)
            if turn:
                seconds[name].append(elapsed_s)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(np.asarray(values), [25, 50, 75])
    return {"median": float(middle), "q25": float(low), "q75": float(high)}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Spread of the ratio, turn by turn: what slows a turn down as a whole cancels out."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


class Yardstick(NamedTuple):
    """What the device does at its best, measured in this run.

    Attributes:
      bytes_per_s: read and written by a large copy.
      flops_per_s: of a large matrix product in bfloat16.
    """

    bytes_per_s: float
    flops_per_s: float


def measure_yardstick(repeats: int, *, tiny: bool) -> Yardstick:
    """Measure copy bandwidth and matrix throughput, several in a row inside one program."""
    size, side, calls = (2**22, 256, 4) if tiny else (2**30, 8192, 16)
    source = jnp.ones((size // 4,), jnp.float32)
    copy = jax.jit(lambda x: jax.lax.fori_loop(0, calls, lambda _, x: x + 1.0, x)).lower(source).compile()
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    scaled = lambda x: jax.lax.fori_loop(0, calls, lambda _, y: (x @ y) * side**-0.5, x)  # noqa: E731  # stays near one
    product = jax.jit(scaled).lower(square).compile()
    copies = [measure.seconds(lambda: copy(source), calls) for _ in range(repeats + 2)][2:]
    products = [measure.seconds(lambda: product(square), calls) for _ in range(repeats + 2)][2:]
    return Yardstick(2 * size / statistics.median(copies), 2 * side**3 / statistics.median(products))
