"""What a drafter is: a bundle of functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax

from streamserve.types import Draft, RowContext, StepPlan


@flax.struct.dataclass
class DraftRows:
    """What a drafter sees of the decode state when a round begins."""

    active: jax.Array  # [B] bool
    length: jax.Array  # [B] int32, tokens in the target's cache
    prev_token: jax.Array  # [B] int32, the token at position length - 1
    last_token: jax.Array  # [B] int32, the token at position length, in no cache yet
    history: jax.Array  # [B, C] int32, the token at each position up to `length`; C = 0 unless `reads_history`
    keys: jax.Array  # [B, K] typed keys, the k-th drafted token is drawn with key k
    plan: StepPlan  # `plan.depth` and the rule that stops a row earlier
    context: RowContext


class Drafter(NamedTuple):
    """A strategy of drafting. Rollback is a change of the rows' length, which the decode state holds; never a copy.

    What a drafter keeps between rounds is paged like the target's cache, under the same page numbers: it is handed
    over, shared between prompts and dropped together with it. What it keeps between requests is in its parameters.

    Attributes:
      pool: `(num_pages, page_size) -> pool`, its empty pages; `()` where it keeps nothing.
      prefill: `(params, pool, tokens_XP, table_XM, start_X) -> pool`, reads P consecutive tokens of each of X rows.
      propose: `(params, pool, table_BM, rows, *, depth) -> (Draft, pool)`; `depth` is static and at least 1. No row
        drafts more than `rows.plan.depth`. Random numbers come from `rows.keys` alone.
      reads_history: whether `propose` reads `rows.history`.
      params: what it starts with where it is no model of its own, as numpy arrays.
      remember: `(params, tokens) -> params`, on the host, pure: learns from the tokens of an answered request, prompt
        and output; None for a drafter that does not learn.
    """

    pool: Callable[[int, int], Any]
    prefill: Callable[..., Any]
    propose: Callable[..., tuple[Draft, Any]]
    reads_history: bool = False
    params: Any = ()
    remember: Callable[[Any, tuple[int, ...]], Any] | None = None


def without_pages(
    propose: Callable[..., Draft],
    *,
    params: Any = (),
    remember: Callable[[Any, tuple[int, ...]], Any] | None = None,
) -> Drafter:
    """Make a drafter that keeps no pages and reads the history.

    Args:
      propose: `(params, rows, *, depth) -> Draft`.
      params: as in `Drafter`.
      remember: as in `Drafter`.
    """

    def propose_paged(
        params: Any, pool: tuple, table_BM: jax.Array, rows: DraftRows, *, depth: int
    ) -> tuple[Draft, tuple]:
        del table_BM
        return propose(params, rows, depth=depth), pool

    return Drafter(
        pool=lambda num_pages, page_size: (),
        prefill=lambda params, pool, tokens_XP, table_XM, start_X: (),
        propose=propose_paged,
        reads_history=True,
        params=params,
        remember=remember,
    )
