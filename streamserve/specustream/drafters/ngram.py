"""Drafting by prompt lookup: what followed the latest tokens the last time they occurred. No model and no pages."""

import jax
import jax.numpy as jnp

from streamserve.specustream.drafters.base import Drafter, DraftRows, without_pages
from streamserve.specustream.drafters.lookup import (
    LONGEST_MATCH,
    certain_draft,
    known_tokens,
    match_lengths,
    suffixes,
)
from streamserve.types import Draft


def ngram(vocab_size: int, *, min_ngram: int = 1, max_ngram: int = 4) -> Drafter:
    """Build a drafter that looks the row's last tokens up in its own prompt and output (prompt lookup, Saxena 2023).

    Of the longest n in [min_ngram, max_ngram] whose last n tokens have occurred before, the latest occurrence counts:
    what was written last resembles most what is being written. It proposes the tokens that followed there, and where
    they end with the row's last one it goes round, as a row that repeats itself does: a loop of one token would
    otherwise be drafted one token at a time.

    Args:
      vocab_size: of the target.
      min_ngram: shortest match that is followed.
      max_ngram: longest suffix that is compared.

    Raises:
      ValueError: `min_ngram` is not in [1, max_ngram], or `max_ngram` beyond LONGEST_MATCH.
    """
    if not 1 <= min_ngram <= max_ngram <= LONGEST_MATCH:
        raise ValueError(f"1 <= min_ngram <= max_ngram <= {LONGEST_MATCH} does not hold: {min_ngram=}, {max_ngram=}")

    def propose(params: tuple, rows: DraftRows, *, depth: int) -> Draft:
        del params
        with jax.named_scope("draft"):
            known_BC = known_tokens(rows)
            capacity = known_BC.shape[1]
            match_BC = match_lengths(known_BC, suffixes(rows, max_ngram))
            # One maximum finds the longest match and the latest place of it: int32 holds max_ngram * C with room.
            score_BC = match_BC.astype(jnp.int32) * capacity + jnp.arange(capacity)[None]
            best_B = jnp.max(score_BC, axis=1)
            found_B = best_B // capacity >= min_ngram
            place_B = jnp.where(found_B, best_B % capacity, 0)
            period_B = jnp.maximum(rows.length - place_B, 1)
            index_BK = place_B[:, None] + 1 + jnp.arange(depth)[None] % period_B[:, None]
            tokens_BK = jnp.take_along_axis(known_BC, jnp.minimum(index_BK, capacity - 1), axis=1)
            counts_BK = jnp.broadcast_to(found_B[:, None], tokens_BK.shape)
            return certain_draft(rows, tokens_BK, counts_BK, vocab_size)

    return without_pages(propose)
