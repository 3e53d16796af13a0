"""From logits to tokens: penalties, filters, sampling and log-probabilities, as pure array functions.

Target and drafter go through the same functions, so that a draft is judged against the distribution that plain
decoding would have sampled from. Every costly branch sits behind a `lax.cond` on "does any row want it": one compiled
program serves every mix of requests, and a branch leaves rows that do not want it exactly as they were.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from streamserve.types import EMPTY_TOKEN, Request, RowContext, RowParams, TokenLogprobs

_TINY = 1e-6  # nearest to zero that a factor comes: its quotients stay within float32
_MAX_INT32 = 2**31 - 1
KEY_IMPL = "threefry2x32"  # named, so that tokens do not depend on jax_default_prng_impl


def make_row(request: Request, *, max_stop_ids: int, max_logit_bias: int) -> RowParams:
    """Turn a request's parameters into numpy arrays of one row.

    Raises:
      ValueError: more stop ids or biases than the programs have room for.
    """
    params = request.params
    bias = dict(params.logit_bias or {})
    for name, items, room in (("stop token ids", request.stop_ids, max_stop_ids), ("logit_bias", bias, max_logit_bias)):
        if len(items) > room:
            raise ValueError(f"{len(items)} {name} given, the engine is configured for at most {room}")
    real, whole = functools.partial(_filled, np.float32), functools.partial(_filled, np.int32)
    return RowParams(
        key=_key_data(request.seed),
        temperature=real(params.temperature and min(max(params.temperature, _TINY), 1 / _TINY)),
        top_p=real(params.top_p),
        top_k=whole(min(params.top_k, _MAX_INT32)),
        min_p=real(params.min_p),
        presence_penalty=real(params.presence_penalty),
        frequency_penalty=real(params.frequency_penalty),
        repetition_penalty=real(min(max(params.repetition_penalty, _TINY), 1 / _TINY)),
        bias_ids=_padded(list(bias), max_logit_bias, EMPTY_TOKEN, np.int32),
        bias=_padded(list(bias.values()), max_logit_bias, 0.0, np.float32),
        stop_ids=_padded(list(request.stop_ids), max_stop_ids, EMPTY_TOKEN, np.int32),
        min_tokens=whole(min(params.min_tokens, _MAX_INT32)),
        max_tokens=whole(min(params.max_tokens, _MAX_INT32)),
        wants_logprobs=_filled(np.bool_, params.logprobs is not None),
    )


def round_keys(key_B2: jax.Array, emitted_B: jax.Array) -> jax.Array:
    """Derive each row's keys from its own stream and the number of tokens it has emitted, from nothing else.

    That makes samples independent of slot, lane, neighbours and arrival.

    Returns:
      Typed keys [B].
    """
    return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_B2, impl=KEY_IMPL), emitted_B)


class RoundKeys(NamedTuple):
    """Typed keys of one round of draft and verification. Which ones are equal is the verification rule's choice."""

    token: jax.Array  # [B, T], the t-th token that the round may emit is drafted with key t
    verify: jax.Array  # [B], for whatever else the rule draws


def independent_keys(context: RowContext, width: int) -> RoundKeys:
    """Give keys that no other round uses, and that tell the verification nothing of the draft."""
    keys_B2 = jax.vmap(jax.random.split)(round_keys(context.row.key, context.emitted))
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return RoundKeys(token=fold(keys_B2[:, 0], jnp.arange(width)), verify=keys_B2[:, 1])


def position_keys(context: RowContext, width: int) -> RoundKeys:
    """Give each output position of a request the same key in every round that reaches it."""
    position_BT = context.emitted[:, None] + jnp.arange(width)[None]
    at = lambda position_B: round_keys(context.row.key, position_B)  # noqa: E731
    return RoundKeys(token=jax.vmap(at, 1, 1)(position_BT), verify=at(context.emitted))


def all_greedy(row: RowParams) -> jax.Array:
    """Whether no row of the batch samples: then its tokens are those of the largest logits, and keys are not needed."""
    return jnp.all(row.temperature == 0)


def adjust(logits_BTV: jax.Array, context: RowContext, drafted_BX: jax.Array, first: int | jax.Array) -> jax.Array:
    """Apply bias, penalties and the ban of stop ids before `min_tokens`.

    Position t of `logits_BTV` is judged as if the first `first + t` tokens of `drafted_BX` had been emitted on top of
    the context. So the (K+1)-wide verification sees the penalties that plain decoding would see at each position.

    Args:
      logits_BTV: float32.
      context: of the rows.
      drafted_BX: drafted tokens; those from `first + T - 1` on are not looked at.
      first: drafted tokens before position 0.
    """
    row = context.row
    neutral = (
        jnp.all(row.bias_ids == EMPTY_TOKEN)
        & jnp.all(row.presence_penalty == 0)
        & jnp.all(row.frequency_penalty == 0)
        & jnp.all(row.repetition_penalty == 1)
        & jnp.all(context.emitted >= row.min_tokens)
    )
    return jax.lax.cond(
        neutral,
        lambda logits, *_: logits,
        _adjust,
        logits_BTV,
        context,
        _before(drafted_BX, logits_BTV.shape[1], first),
    )


def probabilities(logits_BTV: jax.Array, row: RowParams) -> jax.Array:
    """Turn adjusted logits into the distribution that is sampled: temperature, then min-p, top-k and top-p.

    A greedy row gives a point mass on the largest logit, so that verification needs no second rule for it. Tokens
    that tie with the last one kept by top-k or top-p are kept too.

    Returns:
      float32 [B, T, V]; each distribution sums to one.
    """
    best_BTV = jax.nn.one_hot(jnp.argmax(logits_BTV, axis=-1), logits_BTV.shape[-1], dtype=jnp.float32)
    greedy_B = row.temperature == 0

    def sampled(logits: jax.Array) -> jax.Array:
        temperature_B = jnp.where(greedy_B, 1.0, row.temperature)
        probs = jax.nn.softmax(logits / temperature_B[:, None, None], axis=-1)
        unfiltered = jnp.all(greedy_B | ((row.min_p == 0) & (row.top_k == 0) & (row.top_p == 1)))
        probs = jax.lax.cond(unfiltered, lambda p, _: p, _filter, probs, row)
        return jnp.where(greedy_B[:, None, None], best_BTV, probs)

    return jax.lax.cond(jnp.all(greedy_B), lambda _: best_BTV, sampled, logits_BTV)


def sample(probs_BV: jax.Array, key_B: jax.Array) -> jax.Array:
    """Draw one token a row; the distributions need not be normalised.

    Args:
      probs_BV: non-negative.
      key_B: typed keys, consumed.

    Returns:
      int32 [B].
    """

    def draw(probs: jax.Array) -> jax.Array:
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, probs.shape[1:]))(key_B)
        return jnp.argmax(jnp.log(probs) + gumbel, axis=-1)

    point_mass = jnp.all(jnp.max(probs_BV, axis=-1) == jnp.sum(probs_BV, axis=-1))
    return jax.lax.cond(point_mass, lambda probs: jnp.argmax(probs, axis=-1), draw, probs_BV).astype(jnp.int32)


def sample_each(probs_BTV: jax.Array, key_BT: jax.Array) -> jax.Array:
    """Draw one token a row and position, each with its own key: int32 [B, T]."""
    batch, length, vocab = probs_BTV.shape
    return sample(probs_BTV.reshape(batch * length, vocab), key_BT.reshape(batch * length)).reshape(batch, length)


def token_logprobs(logits_XV: jax.Array, tokens_X: jax.Array, wanted: jax.Array, max_logprobs: int) -> TokenLogprobs:
    """Log-probabilities of given tokens and of the most likely ones, from unmodified logits.

    Args:
      logits_XV: raw float32 logits, any leading dimensions X.
      tokens_X: tokens to score.
      wanted: scalar bool; zeros are returned when it is false.
      max_logprobs: most likely tokens to list.
    """
    top_k = min(max_logprobs, logits_XV.shape[-1])

    def compute(logits: jax.Array, tokens: jax.Array) -> TokenLogprobs:
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(logprobs, jnp.maximum(tokens, 0)[..., None], axis=-1)
        top, top_ids = jax.lax.top_k(logprobs, top_k)
        rank = 1 + jnp.sum(logprobs > chosen, axis=-1, dtype=jnp.int32)
        return TokenLogprobs(chosen=chosen[..., 0], rank=rank, top_ids=top_ids.astype(jnp.int32), top=top)

    def skip(logits: jax.Array, tokens: jax.Array) -> TokenLogprobs:
        del logits
        return empty_logprobs(tokens.shape, top_k)

    return jax.lax.cond(wanted, compute, skip, logits_XV, tokens_X)


def empty_logprobs(shape: tuple[int, ...], top_k: int) -> TokenLogprobs:
    """Zeros for `shape` tokens."""
    return TokenLogprobs(
        chosen=jnp.zeros(shape, jnp.float32),
        rank=jnp.zeros(shape, jnp.int32),
        top_ids=jnp.zeros((*shape, top_k), jnp.int32),
        top=jnp.zeros((*shape, top_k), jnp.float32),
    )


def count_tokens(counts_BV: jax.Array, tokens_BX: jax.Array) -> jax.Array:
    """Add occurrences of tokens to each row's counts; EMPTY_TOKEN counts nothing."""
    batch_B1 = jnp.arange(tokens_BX.shape[0])[:, None]
    return counts_BV.at[batch_B1, jnp.maximum(tokens_BX, 0)].add((tokens_BX != EMPTY_TOKEN).astype(counts_BV.dtype))


def _before(drafted_BX: jax.Array, length: int, first: int | jax.Array) -> jax.Array:
    """Drafted tokens before each of `length` positions: [B, T, X], EMPTY_TOKEN from `first + t` on."""
    index_X = jnp.arange(drafted_BX.shape[1])
    seen_TX = index_X[None] < first + jnp.arange(length)[:, None]
    return jnp.where(seen_TX[None], drafted_BX[:, None], EMPTY_TOKEN)


def _adjust(logits_BTV: jax.Array, context: RowContext, before_BTX: jax.Array) -> jax.Array:
    row = context.row
    batch, length, vocab = logits_BTV.shape
    flat_tokens = before_BTX.reshape(batch * length, -1)
    counts = jnp.repeat(context.output_counts, length, axis=0)
    counts_BTV = count_tokens(counts, flat_tokens).reshape(batch, length, vocab)
    column = lambda value_B: value_B[:, None, None]  # noqa: E731
    batch_B1 = jnp.arange(batch)[:, None]

    # Order of the field (vLLM): bias and bans, then repetition, then frequency and presence.
    bias_BV = jnp.zeros((batch, vocab), jnp.float32).at[batch_B1, jnp.maximum(row.bias_ids, 0)].add(row.bias)
    logits = logits_BTV + bias_BV[:, None]
    stop_BV = jnp.zeros((batch, vocab), bool).at[batch_B1, jnp.maximum(row.stop_ids, 0)].max(row.stop_ids >= 0)
    position_BT = context.emitted[:, None] + jnp.sum(before_BTX != EMPTY_TOKEN, axis=-1)
    early_BT = position_BT < row.min_tokens[:, None]
    logits = jnp.where(early_BT[..., None] & stop_BV[:, None], -jnp.inf, logits)
    repetition = column(row.repetition_penalty)
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where((counts_BTV > 0) | context.prompt_seen[:, None], repeated, logits)
    logits = logits - column(row.frequency_penalty) * counts_BTV.astype(jnp.float32)
    return logits - column(row.presence_penalty) * (counts_BTV > 0).astype(jnp.float32)


def _filter(probs_BTV: jax.Array, row: RowParams) -> jax.Array:
    """Apply min-p, top-k and top-p, one after the other, and renormalise."""
    vocab = probs_BTV.shape[-1]
    floor_BT = row.min_p[:, None] * jnp.max(probs_BTV, axis=-1)
    probs = jnp.where(probs_BTV >= floor_BT[..., None], probs_BTV, 0.0)
    ordered = -jnp.sort(-probs, axis=-1)
    top_k_B = jnp.where(row.top_k == 0, vocab, jnp.minimum(row.top_k, vocab))
    kth_BT1 = jnp.take_along_axis(ordered, (top_k_B - 1)[:, None, None], axis=-1)
    probs = jnp.where(probs >= kth_BT1, probs, 0.0)
    ordered = jnp.where(ordered >= kth_BT1, ordered, 0.0)
    mass = jnp.cumsum(ordered, axis=-1)
    # A token is kept while the mass before it is short of top_p of the whole; the most likely one always is.
    kept = (mass - ordered) < row.top_p[:, None, None] * mass[..., -1:]
    kept = kept.at[..., 0].set(True)  # a product below float32's range would keep none
    smallest_BT1 = jnp.min(jnp.where(kept & (ordered > 0), ordered, jnp.inf), axis=-1, keepdims=True)
    probs = jnp.where((row.top_p[:, None, None] < 1) & (probs < smallest_BT1), 0.0, probs)
    filtered = probs / jnp.sum(probs, axis=-1, keepdims=True)
    plain_B = (row.min_p == 0) & (row.top_k == 0) & (row.top_p == 1)
    return jnp.where(plain_B[:, None, None], probs_BTV, filtered)  # a row's numbers do not depend on its neighbours


def _key_data(seed: int) -> Any:
    return np.random.SeedSequence(seed).generate_state(2, np.uint32)[None]


def _filled(dtype: type, value: float) -> Any:
    return np.full((1,), value, dtype)


def _padded(items: list, room: int, fill: float, dtype: type) -> Any:
    out = np.full((1, room), fill, dtype)
    out[0, : len(items)] = items
    return out
