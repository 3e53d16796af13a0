"""What a drafter is: a bundle of pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax

from streamserve.types import Draft, RowContext


@flax.struct.dataclass
class DraftRows:
    """What a drafter sees of the decode state when a round begins."""

    active: jax.Array  # [B] bool
    length: jax.Array  # [B] int32, tokens in the target's cache
    prev_token: jax.Array  # [B] int32, the token at position length - 1
    last_token: jax.Array  # [B] int32, the token at position length, in no cache yet
    context: RowContext


class Drafter(NamedTuple):
    """A strategy of drafting. Rollback is a change of the rows' length, which the decode state holds; never a copy.

    What a drafter keeps between rounds is paged like the target's cache, under the same page numbers: it is handed
    over, shared between prompts and dropped together with it.

    Attributes:
      pool: `(num_pages, page_size) -> pool`, its empty pages; `()` where it keeps nothing.
      prefill: `(params, pool, tokens_XP, table_XM, start_X) -> pool`, reads tiles of prompts.
      propose: `(params, pool, table_BM, rows, *, depth) -> (Draft, pool)`; `depth` is static and at least 1. Random
        numbers come from `sampling.draft_keys(rows.context)`. Where `sampling.all_greedy` holds, nobody reads `probs`.
    """

    pool: Callable[[int, int], Any]
    prefill: Callable[..., Any]
    propose: Callable[..., tuple[Draft, Any]]
