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

    Attributes:
      empty: `(batch, capacity) -> state`, for `batch` rows of `capacity` tokens.
      prefill: `(params, tokens_1S) -> prefix`, on the prefill mesh.
      insert: `(state, prefix, slot) -> state`, on the decode mesh.
      propose: `(params, state, rows, key_B, *, depth) -> (Draft, state)`; `depth` is static and at least 1.
    """

    empty: Callable[[int, int], Any]
    prefill: Callable[[Any, jax.Array], Any]
    insert: Callable[[Any, Any, jax.Array], Any]
    propose: Callable[..., tuple[Draft, Any]]
