"""What the drafters' tests share: a model that is a table, rows of every kind, and references in plain Python."""

import dataclasses
import functools
from collections import Counter
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import append
from streamserve.specustream.depth import StopRule
from streamserve.specustream.drafters import Drafter, DraftRows, draft_model, ngram, suffix, tli_fns
from streamserve.types import Draft, ForwardFns, KVCache, KVPool, KVShape, LayerKV, RowContext, RowParams, StepPlan

VOCAB, DRAFT_VOCAB = 13, 9
CAPACITY, PAGE, BATCH = 48, 8, 6
KV_SHAPE = KVShape(num_layers=1, num_kv_heads=1, head_dim=1, dtype=jnp.float32)
TARGET_TOKENS = {f"t{index}": index for index in range(VOCAB)}
DRAFT_TOKENS = {f"t{12 - 2 * index}": index for index in range(5)} | {f"d{index}": index for index in range(5, 9)}


def _forward(params, tokens_BT, kv: KVCache, start_B):
    """Add up a number for every token in the pages up to each position: any wrong page, token or position shows."""
    token_BTGD = tokens_BT[..., None, None].astype(jnp.float32)
    pages = kv.pool.layers[0]
    layer = LayerKV(*append(pages.k, pages.v, token_BTGD, token_BTGD, kv.table, start_B))
    token_BC = layer.k[kv.table].reshape(kv.table.shape[0], -1).astype(jnp.int32)
    position_C = jnp.arange(token_BC.shape[1])
    value_BCE = params["mix"][position_C[None] % 7, token_BC]
    position_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])[None]
    seen_BTC = position_C[None, None] <= position_BT[..., None]
    return jnp.einsum("btc,bce->bte", seen_BTC.astype(jnp.float32), value_BCE), KVCache(
        pool=KVPool(layers=(layer,)), table=kv.table
    )


TABLE_FNS = ForwardFns(forward=_forward, logits=lambda params, hidden: jnp.sin(hidden) @ params["head"])


def table_params(vocab: int) -> dict[str, jax.Array]:
    mix, head = jax.random.split(jax.random.key(7))
    return {"mix": jax.random.normal(mix, (7, vocab, 6)), "head": 2.0 * jax.random.normal(head, (6, vocab))}


def table_logits(params, tokens: list[int]) -> np.ndarray:
    """Logits [V] after all of `tokens`, as float64 numpy."""
    mix, head = np.asarray(params["mix"], np.float64), np.asarray(params["head"], np.float64)
    return np.sin(sum(mix[position % 7, token] for position, token in enumerate(tokens))) @ head


class Case(NamedTuple):
    drafter: Drafter
    params: Any


def _draft_model() -> Case:
    return Case(draft_model(TABLE_FNS, KV_SHAPE), table_params(VOCAB))


def _tli() -> Case:
    fns = tli_fns(TABLE_FNS, TARGET_TOKENS, DRAFT_TOKENS, VOCAB, DRAFT_VOCAB, unknown_id=7)
    return Case(draft_model(fns, KV_SHAPE), table_params(DRAFT_VOCAB))


def _ngram() -> Case:
    return Case(ngram(VOCAB), ())


def _suffix() -> Case:
    drafter = suffix(VOCAB, memory_tokens=70, max_match=5, max_places=8, max_spec_factor=2.0)
    params = drafter.params
    for seed in range(3):
        params = drafter.remember(params, tuple(np.random.default_rng(seed).integers(0, 3, 20).tolist()))
    return Case(drafter, params)


MODELS = {"draft_model": _draft_model, "tli": _tli}
DRAFTERS = {**MODELS, "ngram": _ngram, "suffix": _suffix}


@functools.cache
def make_rows(seed: int = 0, *, depth: int = 4, rule: StopRule = StopRule.NEVER, threshold: float = 0.0) -> DraftRows:
    """Rows of all kinds: greedy, sampled, filtered and penalised, long and short, one that may not draft, one idle."""
    rng = np.random.default_rng(seed)
    real = lambda *values: jnp.asarray(values, jnp.float32)  # noqa: E731
    whole = lambda *values: jnp.asarray(values, jnp.int32)  # noqa: E731
    history_BC = rng.integers(0, 3, (BATCH, CAPACITY))
    length_B = np.array([17, 30, 1, 40, 23, 0])
    row = RowParams(
        key=jnp.zeros((BATCH, 2), jnp.uint32),
        temperature=real(0.0, 0.7, 1.0, 1.3, 1.0, 0.0),
        top_p=real(1, 1, 0.8, 1, 0.6, 1),
        top_k=whole(0, 0, 5, 0, 3, 0),
        min_p=real(0, 0, 0, 0.1, 0, 0),
        presence_penalty=real(0, 0, 0.5, 0, 0, 0),
        frequency_penalty=real(0, 0, 0, 0.4, 0, 0),
        repetition_penalty=real(1, 1, 1, 1.2, 1, 1),
        bias_ids=whole(3, -1, -1, -1, 4, -1)[:, None],
        bias=real(1, 0, 0, 0, -2, 0)[:, None],
        stop_ids=whole(5, 5, 6, 6, 6, -1)[:, None],
        min_tokens=whole(0, 0, 30, 0, 0, 0),
        max_tokens=whole(*[99] * BATCH),
        wants_logprobs=jnp.zeros((BATCH,), bool),
    )
    context = RowContext(
        row=row,
        prompt_seen=jnp.asarray(rng.integers(0, 2, (BATCH, VOCAB)), bool),
        output_counts=jnp.asarray(rng.integers(0, 3, (BATCH, VOCAB)), jnp.int32),
        emitted=whole(*rng.integers(1, 20, BATCH)),
    )
    plan = StepPlan(
        depth=whole(9, 4, 3, 4, 0, 4),
        rule=jnp.asarray(rule, jnp.int32),
        threshold=jnp.asarray(threshold, jnp.float32),
        wants_divergence=jnp.zeros((), bool),
        acceptance=jnp.zeros((depth,)),
    )
    rows = DraftRows(
        active=jnp.asarray([True] * 5 + [False]),
        length=jnp.asarray(length_B, jnp.int32),
        prev_token=whole(*[0] * BATCH),
        last_token=whole(*[0] * BATCH),
        history=jnp.asarray(history_BC, jnp.int32),
        keys=jax.random.split(jax.random.key(seed), (BATCH, depth)),
        plan=plan,
        context=context,
    )
    return with_history(rows, history_BC)


def with_history(rows: DraftRows, history_BC: np.ndarray) -> DraftRows:
    """Give rows another history, and the latest tokens that belong to it."""
    batch, length_B = np.arange(len(history_BC)), np.asarray(rows.length)
    at = lambda position_B: jnp.asarray(history_BC[batch, np.maximum(position_B, 0)], jnp.int32)  # noqa: E731
    return dataclasses.replace(
        rows, history=jnp.asarray(history_BC, jnp.int32), prev_token=at(length_B - 1), last_token=at(length_B)
    )


@functools.cache
def _jitted(prefill):
    return jax.jit(prefill)


def pages(case: Case, rows: DraftRows) -> tuple[Any, jax.Array]:
    """Pages in which the drafter has read the history, and the table [B, M] of them. The idle row's are scratch."""
    columns = CAPACITY // PAGE + 1  # drafts of the longest row go on here
    batch = len(rows.length)
    table_BM = np.where(np.asarray(rows.active)[:, None], 1 + np.arange(batch * columns).reshape(batch, columns), 0)
    pool = case.drafter.pool(1 + batch * columns, PAGE)
    starts = np.tile(np.arange(0, CAPACITY, PAGE), batch)
    tables = np.repeat(table_BM, CAPACITY // PAGE, axis=0)
    tokens_XP = jnp.asarray(np.asarray(rows.history).reshape(-1, PAGE), jnp.int32)
    table_XM, start_X = jnp.asarray(tables, jnp.int32), jnp.asarray(starts, jnp.int32)
    return _jitted(case.drafter.prefill)(case.params, pool, tokens_XP, table_XM, start_X), jnp.asarray(
        table_BM, jnp.int32
    )


def take_rows(rows: DraftRows, order: np.ndarray) -> DraftRows:
    """Put rows into other slots."""
    return jax.tree.map(lambda leaf: leaf[order] if leaf.ndim and len(leaf) == BATCH else leaf, rows)


def counted(draft: Draft, row: int) -> tuple[list[int], np.ndarray]:
    """Tokens and logits of a row that count."""
    length = int(draft.length[row])
    return np.asarray(draft.tokens[row, :length]).tolist(), np.asarray(draft.logits[row, :length])


def ngram_reference(tokens: list[int], low: int, high: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest suffix, round and round."""
    for size in range(min(high, len(tokens) - 1), low - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                return tokens[end:] * 9
    return []


def suffix_reference(
    texts: list[list[int]], own: list[int], *, max_match: int, max_places: int, min_probability: float, factor: float
) -> list[int]:
    """Follow the most frequent continuation of the longest match in all texts, `own` the latest of them."""
    for size in range(min(max_match, len(own)), 0, -1):
        ahead = []
        for text in [*texts, own]:
            for end in range(size, len(text)):
                if text[end - size : end] == own[-size:]:
                    ahead.append(text[end:])
        if ahead:
            break
    else:
        return []
    ahead, path, probability = ahead[::-1][:max_places], [], Fraction(1)
    while len(path) + 1 <= factor * size:
        ahead = [rest for rest in ahead if len(rest) > len(path)]
        if not ahead:
            break
        votes = Counter(rest[len(path)] for rest in ahead)  # of equals the first one met wins: the latest
        token, count = votes.most_common(1)[0]
        probability *= Fraction(count, len(ahead))
        if probability < min_probability:
            break
        ahead = [rest for rest in ahead if rest[len(path)] == token]
        path.append(token)
    return path
