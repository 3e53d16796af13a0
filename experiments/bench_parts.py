"""Benchmarks of the engine's parts: the paged step, the price of the engine over a bare loop, the draft's pages."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import streamserve
from experiments import bench_bare
from experiments.bench_common import bundled_engine, greedy, interleaved, random_engine, random_prompts, ratio, spread
from streamserve.models import from_hf, init_params
from streamserve.models.config import ModelConfig
from streamserve.types import Deferred, Job, LayerKV, Request

_SHAPE = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
PAGE_SIZE = 64
STEPS = 16  # a measurement


def paged_step(repeats: int) -> dict[str, Any]:
    """Time one decode step over pages against the same step over a cache of one piece a row.

    Two contiguous controls: one reads in the same blocks up to the longest row, one reads the whole capacity at once.
    """
    config = from_hf(_SHAPE)
    params = init_params(config, jax.random.key(0), dtype=jnp.float32, std=0.02)
    cells = []
    for batch in (1, 8):
        for context in (512, 2048):
            runs = {
                name: _stepper(config, params, batch, context, name)
                for name in ("paged", "contiguous", "contiguous_whole")
            }
            seconds = interleaved(runs, repeats)
            cells.append(
                {
                    "batch": batch,
                    "context": context,
                    "step_ms": {name: spread([1000 * s / STEPS for s in values]) for name, values in seconds.items()},
                    "paged_over_contiguous": ratio(seconds["paged"], seconds["contiguous"]),
                    "paged_over_contiguous_whole": ratio(seconds["paged"], seconds["contiguous_whole"]),
                }
            )
    told = ", ".join(
        f"B={cell['batch']} at {cell['context']}: {cell['paged_over_contiguous']['median']:.2f} "
        f"({cell['paged_over_contiguous_whole']['median']:.2f} of the whole)"
        for cell in cells
    )
    return {"cells": cells, "summary": f"paged step over contiguous {told}"}


def _stepper(config: ModelConfig, params: Any, batch: int, context: int, kind: str) -> Any:
    """Compile `STEPS` decode steps that end at `context` tokens, on caches full of random numbers."""
    scale, rng = config.head_dim**-0.5, np.random.default_rng(0)
    if kind == "paged":
        per_row = context // PAGE_SIZE
        table = jnp.asarray(1 + rng.permutation(batch * per_row).reshape(batch, per_row), jnp.int32)
        ops = bench_bare.paged_cache(scale, table)
        dims = (1 + batch * per_row, config.num_kv_heads, PAGE_SIZE, config.head_dim)
    else:
        ops = bench_bare.contiguous_cache(scale, bounded=kind == "contiguous")
        dims = (batch, config.num_kv_heads, context, config.head_dim)
    fill = lambda: jnp.asarray(rng.normal(size=dims), jnp.float32)  # noqa: E731
    state = [tuple(LayerKV(k=fill(), v=fill()) for _ in range(config.num_layers))]

    def steps(params: Any, layers: Any) -> tuple[jax.Array, Any]:
        def step(index: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            token_B, layers = carry
            start_B = jnp.full((batch,), context - STEPS, jnp.int32) + index
            logits, layers = bench_bare.forward(config, params, token_B[:, None], layers, start_B, ops)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), layers

        return jax.lax.fori_loop(0, STEPS, step, (jnp.zeros((batch,), jnp.int32), layers))

    compiled = jax.jit(steps, donate_argnums=1).lower(params, state[0]).compile()

    def run() -> jax.Array:
        tokens, state[0] = compiled(params, state[0])
        return tokens

    return run


def price(repeats: int) -> dict[str, Any]:
    """Compare output tokens a second of the whole engine with a bare device loop of the same model.

    128 prompt and 128 output tokens, greedy, one lane; both produce the same tokens. The engine's sizes are chosen for
    that: no row has more than 256 positions, and a prompt's two pages travel in one group.
    """
    sizes, length, output = (1, 8, 32), 128, 128
    engine = random_engine(
        model={"max_model_len": length + output},
        pipeserve={
            "max_num_seqs": 32, "decode_batches": (1, 8, 16), "max_prefills": 32, "rounds_per_tick": 8,
            "transfer_buckets": (2, 4),
            "prefill_buckets": (128, 1024), "enable_prefix_caching": False,
        },
    )  # fmt: skip
    config, programs = from_hf(_SHAPE), engine.pairs[0].programs
    params = jax.device_put(jax.device_get(programs.decode_params[0]), jax.devices()[0])
    cells = []
    for batch in sizes:
        prompts = random_prompts(batch, length)
        tokens = np.asarray(prompts, np.int32)
        loop = bench_bare.compile_loop(config, params, batch=batch, prompt=length, output=output)
        made = [out.outputs[0].token_ids for out in engine.generate(prompts, greedy(output), use_tqdm=False)]
        same = sum(tuple(row) == got for row, got in zip(np.asarray(loop(params, tokens)), made, strict=True))
        runs = {
            "engine": lambda prompts=prompts: engine.generate(prompts, greedy(output), use_tqdm=False) and (),
            "bare": lambda tokens=tokens, loop=loop: loop(params, tokens),
        }
        seconds = interleaved(runs, repeats)
        total = batch * output
        rates = {name: spread([total / s for s in values]) for name, values in seconds.items()}
        share = ratio(seconds["bare"], seconds["engine"])
        cells.append({"batch": batch, "tokens_per_s": rates, "engine_over_bare": share, "same_rows": f"{same}/{batch}"})
    told = ", ".join(
        f"B={cell['batch']}: {cell['engine_over_bare']['median']:.2f} "
        f"({cell['tokens_per_s']['engine']['median']:.0f} of {cell['tokens_per_s']['bare']['median']:.0f} tok/s)"
        for cell in cells
    )
    return {"cells": cells, "summary": f"engine over bare loop {told}"}


def draft_kv(repeats: int) -> dict[str, Any]:
    """Time a hand-off with the draft's pages transferred against one where the draft reads the prompt anew."""
    pipeserve = {"max_num_seqs": 2, "enable_prefix_caching": False}
    engines = {
        name: bundled_engine(pipeserve=pipeserve | {"draft_kv": name, "prefill_buckets": (64, 256, 1024)})
        for name in ("transfer", "recompute")
    }
    cells = []
    for length in (64, 256, 1024, 2048):
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        moved: dict[str, int] = {}
        for turn in range(repeats + 1):
            for name, engine in engines.items():
                elapsed_s, moved[name] = _hand_over(engine, length)
                seconds[name] += [elapsed_s] if turn else []
        cells.append(
            {
                "prompt_tokens": length,
                "hand_off_ms": {name: spread([1000 * s for s in values]) for name, values in seconds.items()},
                "bytes": moved,
                "recompute_over_transfer": ratio(seconds["recompute"], seconds["transfer"]),
            }
        )
    told = ", ".join(f"{cell['prompt_tokens']}: {cell['recompute_over_transfer']['median']:.2f}" for cell in cells)
    return {"cells": cells, "summary": f"hand-off with the draft's pages recomputed over transferred, by tokens {told}"}


def _hand_over(engine: streamserve.LLM, length: int) -> tuple[float, int]:
    """Take one computed prompt to its decode slot; gives the seconds that took, prefill left out, and bytes moved."""
    pair, prompt = engine.pairs[0], tuple(random_prompts(1, length)[0])
    request = Request(request_id="a", prompt_token_ids=prompt, params=greedy(8), seed=0, stop_ids=())
    task = pair.begin(Job(request=request))
    assert not isinstance(task, Deferred), task
    while task.tail is None:
        pair.prefill()
    jax.block_until_ready(pair.prefill_store.pools)
    begin = time.perf_counter()
    item = pair.hand_off(task)
    assert not isinstance(item, Deferred), item
    slot = pair.insert(item)
    jax.block_until_ready(pair.decode_store.pools)
    elapsed_s = time.perf_counter() - begin
    pair.release(slot)
    return elapsed_s, item.transfer_bytes
