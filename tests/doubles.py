"""Test doubles: a model small enough to enumerate, and requests for it."""

import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import append, attention
from streamserve import mesh
from streamserve.bandits import Policy
from streamserve.config import PipeServeConfig, SchedulerConfig, TopologyConfig
from streamserve.ending import Finished, Refused
from streamserve.flowguard import FlowGuard, routers
from streamserve.kv import cache
from streamserve.kv.pages import PREFIX_CACHE
from streamserve.parts import VERIFIERS
from streamserve.pipeserve import LaneSizes, PairModels, Programs, StreamPair, lane_sizes, warm_up
from streamserve.sampling_params import SamplingParams
from streamserve.scheduler import StreamScheduler
from streamserve.sequence import RunningRequest
from streamserve.specustream import (
    DepthContext,
    Plan,
    SpecuStream,
    StopRule,
    drafters,
    nominal,
    policies,
    whole,
)
from streamserve.tokenizer import TextStream
from streamserve.types import ForwardFns, KVCache, KVPool, KVShape, LayerKV, Request

VOCAB = 13
MAX_MODEL_LEN = 96
TINY_SIZES = {
    "max_num_seqs": 4,
    "decode_batches": (2,),
    "max_prefills": 3,
    "prefill_buckets": (8, 32),
    "page_size": 8,
    "transfer_buckets": (4,),
    "rounds_per_tick": 2,
    "max_logprobs": 4,
}
KV_SHAPE = KVShape(num_layers=1, num_kv_heads=2, head_dim=8, dtype=jnp.float32)


def tiny_params(seed: int) -> dict[str, jax.Array]:
    """Random weights of one attention layer; large, so that the next token depends on the whole context."""
    keys = jax.random.split(jax.random.key(seed), 5)
    width = 16
    return {
        "embed": jax.random.normal(keys[0], (VOCAB, width)),
        "position": jax.random.normal(keys[1], (512, width)),
        "qkv": jax.random.normal(keys[2], (3, width, 2, 8)) / 2,
        "out": jax.random.normal(keys[3], (2, 8, width)) / 2,
        "head": jax.random.normal(keys[4], (width, VOCAB)) / 2,
    }


def _forward(params, tokens_BT, kv: KVCache, start_B):
    position_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])[None]
    x_BTE = params["embed"][tokens_BT] + params["position"][position_BT]
    q, k, v = (jnp.einsum("bte,ehd->bthd", x_BTE, weight) for weight in params["qkv"])
    pages = kv.pool.layers[0]
    layer = LayerKV(*append(pages.k, pages.v, k, v, kv.table, start_B))
    mixed_BTHD = attention(q, layer.k, layer.v, kv.table, start_B, scale=8**-0.5)
    after = KVCache(pool=KVPool(layers=(layer,)), table=kv.table)
    return x_BTE + jnp.einsum("bthd,hde->bte", mixed_BTHD, params["out"]), after


TINY_FNS = ForwardFns(forward=_forward, logits=lambda params, hidden: hidden @ params["head"])


# A new drafter is one more line: how it drafts for the tiny model.
DRAFTERS = {
    "draft_model": lambda: drafters.draft_model(TINY_FNS, KV_SHAPE),
    "synthetic": lambda: drafters.draft_model(TINY_FNS, KV_SHAPE),
    "ngram": lambda: drafters.ngram(VOCAB, max_ngram=3),
    "suffix": lambda: drafters.suffix(VOCAB, memory_tokens=64, max_match=4),
}


def make_request(
    name: str, prompt: tuple[int, ...], *, seed: int = 0, stop_ids: tuple[int, ...] = (), **params
) -> Request:
    """Build a request as the LLM would."""
    params.setdefault("temperature", 0.0)
    return Request(
        request_id=name, prompt_token_ids=prompt, params=SamplingParams(**params), seed=seed, stop_ids=stop_ids
    )


@jax.jit
def whole_logits(params, tokens_BS) -> jax.Array:
    """Logits after every token of whole sequences [B, S, V], computed without any cache from before."""
    batch, length = tokens_BS.shape
    hidden, _ = _forward(params, tokens_BS, cache.rows(KV_SHAPE, batch, length), jnp.zeros((batch,), jnp.int32))
    return hidden @ params["head"]


def plain_greedy(params, prompt: tuple[int, ...], count: int) -> list[int]:
    """Decode greedily by the whole sequence anew for every token: the law that everything else is held to."""
    tokens = list(prompt)
    for _ in range(count):
        padded = tokens + [0] * (96 - len(tokens))  # what follows a position cannot change it: one shape for all
        logits = whole_logits(params, jnp.asarray([padded]))
        tokens.append(int(jnp.argmax(logits[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@functools.cache
def tiny_pairs(
    depth: int,
    *,
    num_pairs: int = 2,
    draft_seed: int = 1,
    devices: int = 1,
    decode_devices: int | None = None,
    topology: str = "disaggregated",
    tiers: tuple[int, ...] = (),
    method: str = "draft_model",
    verifier: str = "rejection",
    max_model_len: int = MAX_MODEL_LEN,
    local_tokens: int = 0,
    **config,
) -> tuple[StreamPair, ...]:
    """Compile stream pairs of the tiny model; `draft_seed` 0 makes the draft equal to the target.

    `tiers` are several depths instead of `depth`.

    Pages of 8 tokens, calls of up to 4 of them, and slots in two sizes: prompts of the tests cross every border.
    """
    layout = TopologyConfig(
        topology=topology,
        num_pairs=num_pairs,
        prefill_devices=devices,
        decode_devices=devices if decode_devices is None else decode_devices,
    )
    settings = PipeServeConfig(**(TINY_SIZES | config))
    tiers = tiers or (depth,)
    drafter = DRAFTERS[method]() if max(tiers) else drafters.none()
    has_model = bool(max(tiers)) and method in ("draft_model", "synthetic")
    params = (tiny_params(0), tiny_params(draft_seed) if has_model else drafter.params)
    sizes = lane_sizes(settings, max_model_len=max_model_len, tiers=tiers, local_tokens=local_tokens)
    pairs = []
    for index, meshes in enumerate(mesh.make_pairs(layout, jax.devices())):
        models = PairModels(
            target=TINY_FNS,
            kv_shape=KV_SHAPE,
            vocab_size=VOCAB,
            drafter=drafter,
            verifier=VERIFIERS[verifier](),
            prefill_params=jax.device_put(params, mesh.replicated(meshes.prefill)),
            decode_params=jax.device_put(params, mesh.replicated(meshes.decode)),
            synthetic=method == "synthetic",
        )
        pairs.append(StreamPair(index, Programs(meshes, models, settings, sizes)))
    warm_up(pairs, use_tqdm=False)
    return tuple(pairs)


def restless(sizes: LaneSizes) -> Policy:
    """Make a policy that changes the depth of every tick and slot at random, and stops drafts by any rule."""
    tiers = sizes.tiers

    def choose(state: int, context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, int]:
        arm = int(noise_A2[0, 0] * len(tiers))
        depth_B = np.arange(sizes.slots) * 7 + int(noise_A2[0, 1] * 1000)
        plan = whole(context, arm, 1 / len(tiers))
        rule = StopRule(int(noise_A2[-1, 0] * 1e6) % 3)
        return plan._replace(depth_B=np.int32(depth_B % (tiers[arm] + 1)), rule=rule, threshold=noise_A2[-1, 1]), state

    return Policy(init=lambda: 0, choose=choose, update=lambda state, context, plan, stats: state)


def tiny_specustream(pair: StreamPair, policy: Policy | None = None, **options) -> SpecuStream:
    """Plan the ticks of a lane: by default always at its largest depth."""
    sizes = pair.sizes
    if policy is None:
        policy = policies.fixed(sizes.tiers, sizes.slots, depth=sizes.tiers[-1])
    costs = nominal(sizes.tiers, sizes.batches)
    return SpecuStream(policy, costs, slots=sizes.slots, rounds=sizes.rounds, lane=pair.index, **options)


def tiny_scheduler(
    pairs: Sequence[StreamPair],
    *,
    policy: Policy | None = None,
    specustreams: Sequence[SpecuStream] | None = None,
    sleep=time.sleep,
    tracer=None,
    **config,
) -> StreamScheduler:
    """Put a scheduler before lanes."""
    flowguard = FlowGuard(routers.round_robin, num_lanes=len(pairs), seed=0)
    settings = pairs[0].programs.config

    def start(request: Request, *, arrival_s: float) -> RunningRequest:
        return RunningRequest(request, TextStream(None, request.params), lambda token: None, arrival_s=arrival_s)

    return StreamScheduler(
        pairs,
        flowguard,
        SchedulerConfig(**config),
        specustreams=specustreams or [tiny_specustream(pair, policy) for pair in pairs],
        max_prefills=settings.max_prefills,
        keeps_pages=settings.preemption == "keep",
        start=start,
        sleep=sleep,
        tracer=tracer,
    )


def serve(pairs: Sequence[StreamPair], requests: Sequence[Request | Refused], **config) -> dict[str, Finished]:
    """Run requests to their ends; assert that each ended once and that nothing is held afterwards."""
    ends: dict[str, Finished] = {}
    for finished in tiny_scheduler(pairs, **config).run(requests):
        assert finished.request_id not in ends, f"{finished.request_id} ended twice"
        ends[finished.request_id] = finished
    assert set(ends) == {request.request_id for request in requests}
    assert_empty(pairs)
    return ends


def assert_empty(pairs: Sequence[StreamPair]) -> None:
    """Every slot is free, and every page is free or held by the prefix cache, where nobody reads it."""
    for pair in pairs:
        assert pair.free_slots == pair.num_slots
        for store in {id(store): store for store in (pair.prefill_store, pair.decode_store)}.values():
            store.ledger.check()
            held = store.ledger.held()
            assert set(held.values()) <= {PREFIX_CACHE}, held
            assert not any(store.ledger.num_readers(page) for page in held), "a reader has gone without leaving"
            assert len(held) == store.tree.num_pages, "a page of the prefix cache that cannot be found"
