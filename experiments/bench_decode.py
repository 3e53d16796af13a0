"""Decode with the engine at a well-known model's shape: tokens a second against the roof of bytes, and the host's gaps.

COMMAND   python -m experiments.bench_decode --output=benchmarks/h200/decode.json
          (options: --shape=llama3_8b --layers=32 --batches=1,8,64 --context=960 --output_tokens=512 --dtype=bfloat16
          --draft=llama3_1b --acceptance=iid:0.8 --depth=3; on a CPU: --shape=tiny --draft=tiny --dtype=float32
          --batches=1,2 --context=64 --output_tokens=192 --repeats=2)
DURATION  on a GPU a minute or two of compilation, then seconds a figure; the line for a CPU above about two minutes.
EXPECTED  exit code 0. Weights are random: nothing is said of text, only of time.

The roof: a step reads all weights but the rows of the input embedding that no token names, and every row's keys and
values, at the bandwidth of a large copy that is measured in the same run. Speculation is synthetic: every matrix is
multiplied, and what is accepted is drawn at random (--acceptance), so that its output is not the target's. Only ticks
count in which all rows decode: prefill is not charged to decoding.

Exit codes: 0 done; 2 arguments are unusable.
"""

import dataclasses
import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments import common, model_shapes
from experiments.bench_common import Yardstick, greedy, measure_yardstick, random_prompts, spread
from streamserve import LLM, Config
from streamserve.config import ModelArgs, PipeServeConfig, SpeculationConfig, TopologyConfig
from streamserve.kv import cache
from streamserve.pipeserve.shapes import PairShapes
from streamserve.types import EMPTY_TOKEN, Params


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is decoded; each field is a flag, said in `HELP`."""

    shape: str = "llama3_8b"
    draft: str = "llama3_1b"
    layers: int | None = None
    context: int = 960
    output_tokens: int = 512
    dtype: str = "bfloat16"
    acceptance: str = "iid:0.8"
    depth: int = 3
    rounds: int = 16
    repeats: int = 5


HELP = {
    "shape": "Target, of experiments/model_shapes.py.",
    "draft": "Draft model of the same vocabulary; empty for plain decoding alone.",
    "layers": "Layers of the target, instead of its own number.",
    "context": "Tokens of a prompt.",
    "output_tokens": "Tokens of an output; enough for all rows to decode at once.",
    "dtype": "Of weights and cache.",
    "acceptance": "What synthetic speculation draws from.",
    "depth": "Of speculation, 1 to 8.",
    "rounds": "Rounds of a tick without speculation; with it, a quarter.",
    "repeats": "Measurements of each figure.",
}


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags; on call and not on import, since other scripts have flags of the same names."""
    flags.DEFINE_string("output", None, "JSON file.", required=True, flag_values=values)
    flags.DEFINE_list("batches", ["1", "8", "64"], "Requests that decode at once.", flag_values=values)
    for field in dataclasses.fields(Settings):
        define: Any = flags.DEFINE_string if isinstance(field.default, str) else flags.DEFINE_integer
        define(field.name, field.default, HELP[field.name], flag_values=values)


def make_engine(settings: Settings, folder: pathlib.Path, *, speculates: bool, batches: Sequence[int]) -> LLM:
    """Build a colocated engine over random weights: one mesh, so that decoding is what is measured."""
    target = model_shapes.write(folder, settings.shape, layers=settings.layers)
    speculation = SpeculationConfig()
    if speculates:
        draft = model_shapes.write(folder, settings.draft)
        speculation = SpeculationConfig(
            method="synthetic",
            model=str(draft),
            num_speculative_tokens=settings.depth,
            tiers=(settings.depth,),
            acceptance=settings.acceptance,
        )
    length = -(-(settings.context + settings.output_tokens) // 64) * 64
    config = Config(
        model=ModelArgs(
            model=str(target), skip_tokenizer_init=True, load_format="dummy", dtype=settings.dtype, max_model_len=length
        ),
        topology=TopologyConfig(topology="colocated", num_pairs=1, decode_devices=1),
        pipeserve=PipeServeConfig(
            max_num_seqs=max(batches),
            decode_batches=tuple(sorted(set(batches) - {max(batches)})),
            max_prefills=min(8, max(batches)),
            prefill_buckets=(512,),
            prefill_pool_tokens=min(8, max(batches)) * length,
            rounds_per_tick=max(1, settings.rounds // 4) if speculates else settings.rounds,
            enable_prefix_caching=False,
            max_logprobs=0,
        ),
        speculation=speculation,
    )
    return LLM.from_config(config)


def weight_bytes(params: Params) -> int:
    """Bytes of weights that a step reads: all but an input embedding that is not the head, too."""
    unread = params["embedding"] if "head" in params else ()
    return cache.num_bytes(params) - cache.num_bytes(unread)


def token_bytes(shapes: PairShapes) -> float:
    """Bytes of a token's keys and values in the target's cache."""
    pool = jax.eval_shape(shapes.decode_pools).target
    pages, _, page_size, _ = pool.layers[0].k.shape
    return cache.num_bytes(pool) / (pages * page_size)


class SteadyWatch:
    """Listens to a pair's ticks, and counts those in which a whole batch decoded.

    A tick counts if all rows were in slots when it and the one before were dispatched, and none ended in it: prefill
    would be charged to decoding otherwise, and rows that do nothing to the rate.
    """

    def __init__(self, pair: Any, batch: int):
        self._pair, self._batch, self._step, self._read = pair, batch, pair.step, pair.read
        pair.step, pair.read = self.step, self.read
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.seconds, self.tokens, self.ticks, self.idle_s = 0.0, 0, 0, 0.0
        self._full: dict[int, bool] = {}
        self._last_s, self._last_full, self._ahead = 0.0, False, None

    def stop(self) -> None:
        """Listen no longer."""
        self._pair.step, self._pair.read = self._step, self._read

    def _is_full(self) -> bool:
        return self._pair.num_slots - self._pair.free_slots == self._batch

    def step(self, tier: int, plan: Any) -> Any:
        """Dispatch, and see whether the device had run dry."""
        dry = self._ahead is None or self._pair.programs.is_ready(self._ahead.packed)
        if dry and self._last_full and self._is_full():
            self.idle_s += time.perf_counter() - self._last_s
        self._ahead = self._step(tier, plan)
        self._full[id(self._ahead)] = self._is_full()
        return self._ahead

    def read(self, pending: Any) -> Any:
        """Read, and count."""
        output = self._read(pending)
        now_s, runs = time.perf_counter(), not np.any(np.asarray(output.finish)[: self._batch])
        full = self._full.pop(id(pending)) and runs
        if full and self._last_full:
            self.seconds += now_s - self._last_s
            self.tokens += int((np.asarray(output.tokens)[:, 1:] != EMPTY_TOKEN).sum())
            self.ticks += 1
        self._last_s, self._last_full = now_s, full
        if pending is self._ahead:
            self._ahead = None
        return output


def measure(engine: LLM, batch: int, yardstick: Yardstick, settings: Settings) -> dict[str, Any]:
    """Decode a batch; gives tokens a second, the roof of plain decoding, and the host's gaps.

    Raises:
      RunError: outputs are too short for all rows to decode at once.
    """
    watch, rates, gaps, a_round, ticks = SteadyWatch(engine.pairs[0], batch), [], [], [], 0
    for turn in range(settings.repeats + 1):
        watch.clear()
        prompts = random_prompts(batch, settings.context, seed=turn, vocab=engine.pairs[0].programs.vocab_size)
        outputs = engine.generate(prompts, greedy(settings.output_tokens), use_tqdm=False)
        if not watch.ticks:
            raise common.RunError(f"{batch} rows never decoded at once: --output_tokens must be larger")
        if turn:
            ticks += watch.ticks
            rates.append(watch.tokens / watch.seconds)
            gaps.append(watch.idle_s / watch.seconds)
            a_round += [metrics.accepted_per_step for output in outputs for metrics in output.metrics]
    watch.stop()
    programs = engine.pairs[0].programs
    mean_context = settings.context + settings.output_tokens / 2
    step_bytes = weight_bytes(programs.decode_params[0]) + batch * mean_context * token_bytes(programs.shapes)
    roof = batch * yardstick.bytes_per_s / step_bytes
    return {
        "batch": batch,
        "ticks": ticks,
        "tokens_per_s": spread(rates),
        "bytes_a_step": step_bytes,
        "roof_tokens_per_s": roof,
        "of_roof": spread([rate / roof for rate in rates]),
        "host_gap_share_at_most": spread(gaps),
        "accepted_per_round": sum(map(sum, a_round)) / max(1, sum(map(len, a_round))),
    }


def main(argv: Sequence[str]) -> None:
    """Measure plain decoding, then speculation; write after each figure."""
    del argv
    values = flags.FLAGS
    settings = Settings(**{field.name: getattr(values, field.name) for field in dataclasses.fields(Settings)})
    path, batches = pathlib.Path(values.output), sorted(map(int, values.batches))
    if not path.parent.is_dir():
        common.stop(f"cannot write {str(path)!r}: there is no such folder")
    yardstick = measure_yardstick(settings.repeats, tiny=jax.default_backend() == "cpu")
    command = ("python", "-m", "experiments.bench_decode", *sys.argv[1:])
    record = {
        "environment": common.environment(share_devices=False, command=command),
        "settings": dataclasses.asdict(settings),
        "yardstick": yardstick._asdict(),
        "rows": [],
    }
    for speculates in (False, True) if settings.draft else (False,):
        with tempfile.TemporaryDirectory() as folder:
            try:
                engine = make_engine(settings, pathlib.Path(folder), speculates=speculates, batches=batches)
                for batch in batches:
                    row = {"speculates": speculates} | measure(engine, batch, yardstick, settings)
                    record["rows"].append(row)
                    common.write_json(path, record)
                    print(summary(row), flush=True)
                engine.close()
            except (common.RunError, ValueError) as error:
                common.stop(str(error))
        del engine


def summary(row: Mapping[str, Any]) -> str:
    """Say a row in a line."""
    kind = "synthetic speculation" if row["speculates"] else "plain"
    share, gap = 100 * row["of_roof"]["median"], 100 * row["host_gap_share_at_most"]["median"]
    rate = row["tokens_per_s"]["median"]
    return f"batch {row['batch']}, {kind}: {rate:.0f} tokens/s, {share:.0f} % of the roof, host gap at most {gap:.1f} %"


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
