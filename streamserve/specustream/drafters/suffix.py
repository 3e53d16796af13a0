"""Drafting from what was written before: the row's own text and a memory of earlier answers. No model and no pages."""

import jax
import jax.numpy as jnp
import numpy as np

from streamserve.specustream.drafters.base import Drafter, DraftRows, without_pages
from streamserve.specustream.drafters.lookup import (
    BLOCK,
    LONGEST_MATCH,
    UNKNOWN,
    certain_draft,
    known_tokens,
    latest_places,
    match_lengths,
    suffixes,
    take,
)
from streamserve.types import Draft


def suffix(
    vocab_size: int,
    *,
    memory_tokens: int = 8192,
    max_match: int = 8,
    max_places: int = 32,
    min_probability: float = 0.1,
    max_spec_factor: float = 1.0,
) -> Drafter:
    """Build a drafter by suffix decoding (Oliaro et al., arXiv 2411.04975), without the tree.

    The places where the longest suffix has occurred vote on the next token; those that agree with the choice vote on
    the one after it. The share of the votes estimates a token's probability, their product that of the path. Drafting
    ends where that falls below `min_probability`, or after `max_spec_factor` times as many tokens as matched.

    Of equally frequent tokens the latest written is chosen. Where a text ends it has no vote.

    Args:
      vocab_size: of the target.
      memory_tokens: room for earlier answers; the oldest are dropped.
      max_match: longest suffix that is compared.
      max_places: places that vote, the latest ones.
      min_probability: of a path, below which it is not followed.
      max_spec_factor: drafted tokens per matched one, at most.

    Raises:
      ValueError: a size is not positive, or `max_match` beyond LONGEST_MATCH.
    """
    if min(memory_tokens, max_match, max_places) < 1 or max_match > LONGEST_MATCH:
        raise ValueError(f"must be in 1...: {memory_tokens=}, {max_places=}; in 1..{LONGEST_MATCH}: {max_match=}")

    def propose(params: jax.Array, rows: DraftRows, *, depth: int) -> Draft:
        with jax.named_scope("draft"):
            text_BX, match_BX = _search(params, rows, max_match)
            longest_B = jnp.max(match_BX, axis=1)
            place_BS = latest_places(match_BX, longest_B, max_places)
            index_BSK = place_BS[..., None] + 1 + jnp.arange(depth)[None, None]
            next_BSK = jnp.where(place_BS[..., None] == UNKNOWN, UNKNOWN, take(text_BX, index_BSK, UNKNOWN))
            tokens_BK, probability_BK = _vote(next_BSK)
            limit_B = max_spec_factor * longest_B.astype(jnp.float32)
            index_K = jnp.arange(1, depth + 1, dtype=jnp.float32)
            likely_BK = (probability_BK >= min_probability) & (index_K[None] <= limit_B[:, None])
            return certain_draft(rows, tokens_BK, likely_BK & (tokens_BK != UNKNOWN), vocab_size)

    return without_pages(propose, params=np.full((memory_tokens,), UNKNOWN, np.int32), remember=remember)


def remember(params: np.ndarray, tokens: tuple[int, ...]) -> np.ndarray:
    """Put a text behind those in the memory, and drop whole texts from the front until there is room.

    Args:
      params: int32 [memory_tokens], texts from old to new, UNKNOWN between them and after the last.
      tokens: the text; of one that is longer than the memory its end is kept.

    Returns:
      The new memory; `params` stays as it is.
    """
    room = len(params)
    if not tokens:
        return params
    new = np.asarray(tokens[-room:], np.int32)
    (used,) = np.nonzero(params != UNKNOWN)
    old = params[: used[-1] + 1] if len(used) else params[:0]
    excess = len(old) + 1 + len(new) - room
    if excess > 0:
        (gaps,) = np.nonzero(old[:-1] == UNKNOWN)
        starts = gaps[gaps + 1 >= excess] + 1
        old = old[starts[0] :] if len(starts) else old[:0]
    parts = [old, [UNKNOWN], new] if len(old) else [new]
    filled = np.concatenate(parts)
    return np.concatenate([filled, np.full((room - len(filled),), UNKNOWN)]).astype(np.int32)


def _search(memory: jax.Array, rows: DraftRows, size: int) -> tuple[jax.Array, jax.Array]:
    """Lay out the texts that each row searches, from old to new, and the match that ends at each place.

    Memory and history are compared one by one: laid out first, they took half as long again on CPU.

    Returns:
      Tokens [B, X], int32 with UNKNOWN between texts, and matches [B, X] as of `match_lengths`; X in whole blocks.
    """
    history_BC = known_tokens(rows)
    batch, capacity = history_BC.shape
    suffix_Bn = suffixes(rows, size)
    rest = -(len(memory) + 1 + capacity) % BLOCK

    def lay_out(old_BX: jax.Array, new_BX: jax.Array, fill: int) -> jax.Array:
        border_B1, rest_BX = (jnp.full((batch, width), fill, old_BX.dtype) for width in (1, rest))
        return jnp.concatenate([old_BX, border_B1, new_BX, rest_BX], axis=1)

    memory_BX = jnp.broadcast_to(memory[None], (batch, len(memory)))
    old_BX, new_BX = match_lengths(memory[None], suffix_Bn), match_lengths(history_BC, suffix_Bn)
    return lay_out(memory_BX, history_BC, UNKNOWN), lay_out(old_BX, new_BX, 0)


def _vote(next_BSK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Choose the most frequent continuation token by token.

    Args:
      next_BSK: int32, what follows at each place, the latest place first; UNKNOWN where nothing is known.

    Returns:
      Tokens [B, K], UNKNOWN where no place goes on, and the probability [B, K] of the path up to each.
    """
    batch, _, depth = next_BSK.shape
    voting_BS = jnp.ones(next_BSK.shape[:2], bool)
    probability_B = jnp.ones((batch,), jnp.float32)
    tokens, probabilities = [], []
    for k in range(depth):
        next_BS = next_BSK[..., k]
        voting_BS = voting_BS & (next_BS != UNKNOWN)
        agree_BSS = (next_BS[:, :, None] == next_BS[:, None]) & voting_BS[:, None]
        votes_BS = jnp.where(voting_BS, jnp.sum(agree_BSS, axis=-1, dtype=jnp.int32), 0)
        first_B1 = jnp.argmax(votes_BS, axis=1)[:, None]
        token_B1 = jnp.take_along_axis(next_BS, first_B1, axis=1)
        cast_B = jnp.maximum(jnp.sum(voting_BS, axis=1, dtype=jnp.int32), 1)
        probability_B = probability_B * (jnp.max(votes_BS, axis=1) / cast_B).astype(jnp.float32)
        voting_BS = voting_BS & (next_BS == token_B1)
        tokens.append(jnp.where(probability_B > 0, token_B1[:, 0], UNKNOWN))
        probabilities.append(probability_B)
    return jnp.stack(tokens, axis=1), jnp.stack(probabilities, axis=1)
