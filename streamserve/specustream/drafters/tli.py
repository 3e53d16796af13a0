"""Token-level intersection: a draft model with another tokenizer, seen through the target's vocabulary."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamserve.types import ForwardFns, KVCache


def tli_fns(
    fns: ForwardFns,
    target_vocab: Mapping[str, int],
    draft_vocab: Mapping[str, int],
    target_size: int,
    draft_size: int,
    *,
    unknown_id: int = 0,
) -> ForwardFns:
    """Wrap a draft model so that it reads and writes the target's token ids (Timor et al., arXiv 2502.05202).

    Tokens of both vocabularies with the same string are the same token. The draft proposes only such tokens: its
    distribution is q restricted to the intersection and renormalised, which is a distribution as good as any to
    rejection sampling, so everything downstream stays as it is and lossless.

    Args:
      fns: the draft model, over its own vocabulary.
      target_vocab: token string to id; ids at or beyond `target_size` are left out.
      draft_vocab: the same of the draft.
      target_size: V, logits of the target.
      draft_size: logits of the draft.
      unknown_id: draft id which stands for tokens that the draft lacks.

    Raises:
      ValueError: no token is in both, or `unknown_id` is none of the draft's.
    """
    if not 0 <= unknown_id < draft_size:
        raise ValueError(f"{unknown_id=} is not among the draft's {draft_size} tokens")
    read_V = np.full((target_size,), unknown_id, np.int32)
    shared_V = np.zeros((target_size,), bool)
    for token, target_id in target_vocab.items():
        draft_id = draft_vocab.get(token, draft_size)
        if target_id < target_size and draft_id < draft_size:
            read_V[target_id], shared_V[target_id] = draft_id, True
    if not shared_V.any():
        raise ValueError(
            f"0 tokens in common between target ({len(target_vocab)} tokens) and draft ({len(draft_vocab)} tokens)"
        )

    def forward(params: Any, tokens_BT: jax.Array, cache: KVCache, start_B: jax.Array) -> tuple[jax.Array, KVCache]:
        return fns.forward(params, jnp.asarray(read_V)[tokens_BT], cache, start_B)

    def logits(params: Any, hidden_XE: jax.Array) -> jax.Array:
        draft_XV = fns.logits(params, hidden_XE)
        return jnp.where(shared_V, jnp.take(draft_XV, read_V, axis=-1), -jnp.inf)

    return ForwardFns(forward=forward, logits=logits)
