"""Decode with the engine at a well-known model's shape: tokens a second against the roof of bytes, and the host's gaps.

COMMAND   python -m experiments.bench_decode --output=benchmarks/h200/decode.json
          (options: --shape=llama3_8b --layers=32 --batches=1,8,64 --context=960 --output_tokens=128 --dtype=bfloat16
          --draft=llama3_1b --acceptance=iid:0.8 --depth=3; on a CPU: --shape=tiny --draft=tiny --dtype=float32
          --batches=1,2 --context=64 --output_tokens=32 --repeats=2)
DURATION  on a GPU a minute or two of compilation, then seconds a figure; the line for a CPU above about two minutes.
EXPECTED  exit code 0. Weights are random: nothing is said of text, only of time.

The roof: a step reads all weights but the rows of the input embedding that no token names, and every row's keys and
values, at the bandwidth of a large copy that is measured in the same run. Speculation is synthetic: every matrix is
multiplied, and what is accepted is drawn at random (--acceptance), so that its output is not the target's.

Exit codes: 0 done; 2 arguments are unusable.
"""

import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags

from experiments import common, model_shapes
from experiments.bench_common import Yardstick, greedy, measure_yardstick, random_prompts, spread
from experiments.bench_serving import TickWatch
from streamserve import LLM, Config
from streamserve.config import ModelArgs, PipeServeConfig, SpeculationConfig, TopologyConfig
from streamserve.kv import cache
from streamserve.pipeserve.shapes import PairShapes
from streamserve.types import Params

_OUTPUT = flags.DEFINE_string("output", None, "JSON file.", required=True)
_SHAPE = flags.DEFINE_string("shape", "llama3_8b", "Target, of experiments/model_shapes.py.")
_DRAFT = flags.DEFINE_string(
    "draft", "llama3_1b", "Draft model of the same vocabulary; empty for plain decoding alone."
)
_LAYERS = flags.DEFINE_integer("layers", None, "Layers of the target, instead of its own number.", lower_bound=1)
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "64"], "Requests that decode at once.")
_CONTEXT = flags.DEFINE_integer("context", 960, "Tokens of a prompt.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("output_tokens", 128, "Tokens of an output.", lower_bound=2)
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of weights and cache.")
_ACCEPTANCE = flags.DEFINE_string("acceptance", "iid:0.8", "What synthetic speculation draws from.")
_DEPTH = flags.DEFINE_integer("depth", 3, "Of speculation.", lower_bound=1, upper_bound=8)
_ROUNDS = flags.DEFINE_integer("rounds", 16, "Rounds of a tick without speculation; with it, a quarter.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each figure.", lower_bound=1)


def make_engine(folder: pathlib.Path, *, speculates: bool, batches: Sequence[int]) -> LLM:
    """Build a colocated engine over random weights: one mesh, so that decoding is what is measured."""
    target = model_shapes.write(folder, _SHAPE.value, layers=_LAYERS.value)
    speculation = SpeculationConfig()
    if speculates:
        draft = model_shapes.write(folder, _DRAFT.value)
        speculation = SpeculationConfig(
            method="synthetic",
            model=str(draft),
            num_speculative_tokens=_DEPTH.value,
            tiers=(_DEPTH.value,),
            acceptance=_ACCEPTANCE.value,
        )
    length = -(-(_CONTEXT.value + _TOKENS.value) // 64) * 64
    config = Config(
        model=ModelArgs(
            model=str(target), skip_tokenizer_init=True, load_format="dummy", dtype=_DTYPE.value, max_model_len=length
        ),
        topology=TopologyConfig(topology="colocated", num_pairs=1, decode_devices=1),
        pipeserve=PipeServeConfig(
            max_num_seqs=max(batches),
            decode_batches=tuple(sorted(set(batches) - {max(batches)})),
            max_prefills=min(8, max(batches)),
            prefill_buckets=(512,),
            prefill_pool_tokens=min(8, max(batches)) * length,
            rounds_per_tick=max(1, _ROUNDS.value // 4) if speculates else _ROUNDS.value,
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


def measure(engine: LLM, batch: int, yardstick: Yardstick, *, repeats: int) -> dict[str, Any]:
    """Decode a batch; gives tokens a second, the roof of plain decoding, and the host's gaps."""
    watch, rates, gaps, a_round = TickWatch(engine.pairs[0]), [], [], []
    for turn in range(repeats + 1):
        watch.clear()
        prompts = random_prompts(batch, _CONTEXT.value, seed=turn, vocab=engine.pairs[0].programs.vocab_size)
        outputs = engine.generate(prompts, greedy(_TOKENS.value), use_tqdm=False)
        if turn:
            tokens = sum(len(output.outputs[0].token_ids) - 1 for output in outputs)  # prefill computes the first
            rates.append(tokens / watch.wall_s)
            gaps.append(watch.gap_s / watch.wall_s)
            a_round += [metrics.accepted_per_step for output in outputs for metrics in output.metrics]
    watch.stop()
    programs = engine.pairs[0].programs
    mean_context = _CONTEXT.value + _TOKENS.value / 2
    step_bytes = weight_bytes(programs.decode_params[0]) + batch * mean_context * token_bytes(programs.shapes)
    roof = batch * yardstick.bytes_per_s / step_bytes
    return {
        "batch": batch,
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
    path, batches = pathlib.Path(_OUTPUT.value), sorted(map(int, _BATCHES.value))
    if not path.parent.is_dir():
        common.stop(f"cannot write {str(path)!r}: there is no such folder")
    yardstick = measure_yardstick(_REPEATS.value, tiny=jax.default_backend() == "cpu")
    command = ("python", "-m", "experiments.bench_decode", *sys.argv[1:])
    record = {
        "environment": common.environment(share_devices=False, command=command),
        "shape": dataclasses.asdict(_Shape(_SHAPE.value, _LAYERS.value, _CONTEXT.value, _TOKENS.value, _DTYPE.value)),
        "yardstick": yardstick._asdict(),
        "synthetic": f"{_ACCEPTANCE.value} at depth {_DEPTH.value}, with {_DRAFT.value}",
        "repeats": _REPEATS.value,
        "rows": [],
    }
    for speculates in (False, True) if _DRAFT.value else (False,):
        with tempfile.TemporaryDirectory() as folder:
            try:
                engine = make_engine(pathlib.Path(folder), speculates=speculates, batches=batches)
            except (common.RunError, ValueError) as error:
                common.stop(str(error))
            for batch in batches:
                row = {"speculates": speculates} | measure(engine, batch, yardstick, repeats=_REPEATS.value)
                record["rows"].append(row)
                common.write_json(path, record)
                told = (
                    f"{row['tokens_per_s']['median']:.0f} tokens/s, {100 * row['of_roof']['median']:.0f} % of the roof"
                )
                gap = f"host gap at most {100 * row['host_gap_share_at_most']['median']:.1f} %"
                print(f"batch {batch}, {'synthetic speculation' if speculates else 'plain'}: {told}, {gap}", flush=True)
            engine.close()
            del engine


@dataclasses.dataclass(frozen=True, slots=True, kw_only=False)
class _Shape:
    """What was decoded."""

    model: str
    layers: int | None
    context: int
    output_tokens: int
    dtype: str


if __name__ == "__main__":
    app.run(main)
