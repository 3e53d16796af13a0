"""The drafter that drafts nothing: plain decoding through the same step."""

from typing import Any

import jax

from streamserve.specustream.drafters.base import Drafter, DraftRows
from streamserve.types import Draft


def none() -> Drafter:
    """Build a drafter for depth 0."""

    def propose(params: Any, state: tuple, rows: DraftRows, key_B: jax.Array, *, depth: int) -> tuple[Draft, tuple]:
        del params, state, rows, key_B
        raise ValueError(f"nothing drafts, so the depth must be 0, got {depth=}")

    return Drafter(
        empty=lambda batch, capacity: (),
        prefill=lambda params, tokens_1S: (),
        insert=lambda state, prefix, slot: (),
        propose=propose,
    )
