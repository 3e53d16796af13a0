"""The drafter that drafts nothing: plain decoding through the same step."""

from typing import Any

import jax

from streamserve.specustream.drafters.base import Drafter, DraftRows
from streamserve.types import Draft


def none() -> Drafter:
    """Build a drafter for depth 0."""

    def propose(params: Any, pool: tuple, table_BM: jax.Array, rows: DraftRows, *, depth: int) -> tuple[Draft, tuple]:
        del params, pool, table_BM, rows
        raise ValueError(f"nothing drafts, so the depth must be 0, got {depth=}")

    return Drafter(
        pool=lambda num_pages, page_size: (),
        prefill=lambda params, pool, tokens_XP, table_XM, start_X: (),
        propose=propose,
    )
