"""Looking up what a row has written last in texts, for the drafters that propose what followed it there."""

import jax
import jax.numpy as jnp

from streamserve.specustream.drafters.base import DraftRows
from streamserve.types import Draft

UNKNOWN = -1  # in place of a token: none is known there, or one text ends
LONGEST_MATCH = 127  # that is counted, in int8
BLOCK = 64  # places that are looked through at once; 16 and 32 take as long on CPU, 256 a third longer
_BEFORE = -2  # in place of a token before the beginning of a row; equal to no token and not to UNKNOWN


def known_tokens(rows: DraftRows) -> jax.Array:
    """Take the history as far as it is known: int32 [B, C], UNKNOWN after `length`."""
    return jnp.where(jnp.arange(rows.history.shape[1])[None] <= rows.length[:, None], rows.history, UNKNOWN)


def suffixes(rows: DraftRows, size: int) -> jax.Array:
    """Take the last tokens of each row, the latest first: int32 [B, size]."""
    position_BX = rows.length[:, None] - jnp.arange(size)[None]
    tokens_BX = jnp.take_along_axis(rows.history, jnp.maximum(position_BX, 0), axis=1)
    return jnp.where(position_BX >= 0, tokens_BX, _BEFORE)


def match_lengths(tokens_BX: jax.Array, suffix_Bn: jax.Array) -> jax.Array:
    """Count at each place how many tokens up to it equal the end of a suffix; 0 where the token after it is UNKNOWN.

    Args:
      tokens_BX: int32, with UNKNOWN where no match goes through; the first dimension may be 1.
      suffix_Bn: int32, the latest token first.

    Returns:
      int8 [B, X] in [0, n]: bytes, since memory traffic is what it costs on CPU.
    """
    size, places = suffix_Bn.shape[1], tokens_BX.shape[1]
    padded = jnp.pad(tokens_BX, ((0, 0), (size - 1, 1)), constant_values=UNKNOWN)
    match_BX = jnp.zeros((suffix_Bn.shape[0], places), jnp.int8)
    for back in reversed(range(size)):
        same_BX = padded[:, size - 1 - back : size - 1 - back + places] == suffix_Bn[:, back, None]
        match_BX = jnp.where(same_BX, match_BX + 1, 0)
    return jnp.where(padded[:, size:] == UNKNOWN, 0, match_BX)


def latest_places(match_BX: jax.Array, longest_B: jax.Array, count: int) -> jax.Array:
    """Find the last places of the longest match: int32 [B, S], the latest first, UNKNOWN where there are no more.

    Among the S latest blocks that have such a place are its S latest places: so top-k never sees all of X.
    """
    batch, places = match_BX.shape
    match_BWX = match_BX.reshape(batch, -1, BLOCK)
    longest_B1 = jnp.maximum(longest_B, 1)[:, None]
    has_BW = jnp.max(match_BWX, axis=-1) == longest_B1
    block_BS = _latest(has_BW, jnp.arange(places // BLOCK)[None], count)
    is_BSX = (take(match_BWX, block_BS, 0) == longest_B1[..., None]) & (block_BS != UNKNOWN)[..., None]
    index_BSX = block_BS[..., None] * BLOCK + jnp.arange(BLOCK)[None, None]
    return _latest(is_BSX.reshape(batch, -1), index_BSX.reshape(batch, -1), count)


def _latest(is_BX: jax.Array, index_BX: jax.Array, count: int) -> jax.Array:
    """Find the largest indices that qualify: int32 [B, S], descending, then UNKNOWN.

    XLA has a fast top-k of float32 alone on CPU; indices below 2^24 are exact.
    """
    index_BX = jnp.where(is_BX, index_BX, UNKNOWN).astype(jnp.float32)
    return jax.lax.top_k(index_BX, min(count, index_BX.shape[1]))[0].astype(jnp.int32)


def take(array_BX: jax.Array, index_BX: jax.Array, fill: int) -> jax.Array:
    """Index each row of an array by its own indices, non-negative or not used."""
    return jax.vmap(lambda row_X, index_X: row_X.at[index_X].get(mode="fill", fill_value=fill))(array_BX, index_BX)


def certain_draft(rows: DraftRows, tokens_BK: jax.Array, counts_BK: jax.Array, vocab_size: int) -> Draft:
    """Make a draft of tokens that were not drawn: each is a point mass, whatever the temperature.

    Args:
      rows: those that are inactive draft nothing, and none drafts more than its plan.
      tokens_BK: int32, proposed.
      counts_BK: whether each is; what follows the first that is not does not count.
      vocab_size: of the target.
    """
    planned_BK = jnp.arange(tokens_BK.shape[1])[None] < jnp.where(rows.active, rows.plan.depth, 0)[:, None]
    counts_BK = jnp.cumprod(counts_BK & planned_BK, axis=1, dtype=jnp.int32)
    tokens_BK = tokens_BK * counts_BK
    index_V = jnp.arange(vocab_size)
    return Draft(
        tokens=tokens_BK,
        logits=jnp.where(index_V[None, None] == tokens_BK[..., None], 0.0, -jnp.inf).astype(jnp.float32),
        length=jnp.sum(counts_BK, axis=1, dtype=jnp.int32),
    )
