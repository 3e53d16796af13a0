"""Verification rules: which drafted tokens stand, and what comes after them. Pure and lossless."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from streamserve import sampling
from streamserve.types import Draft, Verdict

VerifyFn = Callable[[jax.Array, Draft, jax.Array], Verdict]


def rejection(target_probs_BTV: jax.Array, draft: Draft, key_B: jax.Array) -> Verdict:
    """Speculative sampling: accept token by token, correct the first that fails.

    Token d_k, drawn from q_k, is accepted with probability min(1, p_k(d_k) / q_k(d_k)). The first refused position is
    drawn anew from max(p - q, 0); if none is refused, a bonus token is drawn from the position after the draft. The
    output is then distributed as p (Leviathan et al., arXiv 2211.17192, theorem 1; Chen et al., arXiv 2302.01318).
    Greedy rows come as point masses and need no rule of their own.

    Args:
      target_probs_BTV: p, with T = K + 1 positions.
      draft: K proposed tokens, their distributions q, and how many count for each row.
      key_B: typed keys, consumed.

    Returns:
      Accepted tokens and the token after them, for each row.
    """
    depth = draft.tokens.shape[1]
    keys_B2 = jax.vmap(jax.random.split)(key_B)
    p_BK = jnp.take_along_axis(target_probs_BTV[:, :depth], draft.tokens[..., None], axis=-1)[..., 0]
    q_BK = jnp.take_along_axis(draft.probs, draft.tokens[..., None], axis=-1)[..., 0]
    uniform_BK = jax.vmap(lambda key: jax.random.uniform(key, (depth,)))(keys_B2[:, 0])
    counts_BK = jnp.arange(depth)[None] < draft.length[:, None]
    accept_BK = (uniform_BK * q_BK < p_BK) & counts_BK
    num_accepted_B = jnp.sum(jnp.cumprod(accept_BK, axis=1, dtype=jnp.int32), axis=1)
    p_BV = _at(target_probs_BTV, num_accepted_B)
    refused_B1 = (num_accepted_B < draft.length)[:, None]
    q_BV = _at(jnp.pad(draft.probs, ((0, 0), (0, 1), (0, 0))), num_accepted_B)
    residual_BV = jnp.maximum(p_BV - q_BV, 0.0)
    # p == q up to rounding leaves no residual; then p itself is the limit of the rule.
    proper_B1 = jnp.sum(residual_BV, axis=-1, keepdims=True) > 0
    next_BV = jnp.where(refused_B1 & proper_B1, residual_BV, p_BV)
    return Verdict(num_accepted=num_accepted_B, next_token=sampling.sample(next_BV, keys_B2[:, 1]))


def greedy(logits_BTV: jax.Array, draft: Draft) -> Verdict:
    """Accept what agrees with the largest logits: what every lossless rule does where all rows are point masses.

    Args:
      logits_BTV: adjusted, with T = K + 1 positions.
      draft: K proposed tokens and how many count for each row; its distributions are not read.
    """
    depth = draft.tokens.shape[1]
    best_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
    accept_BK = (draft.tokens == best_BT[:, :depth]) & (jnp.arange(depth)[None] < draft.length[:, None])
    num_accepted_B = jnp.sum(jnp.cumprod(accept_BK, axis=1, dtype=jnp.int32), axis=1)
    return Verdict(
        num_accepted=num_accepted_B, next_token=jnp.take_along_axis(best_BT, num_accepted_B[:, None], axis=1)[:, 0]
    )


def _at(probs_BTV: jax.Array, position_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(probs_BTV, position_B[:, None, None], axis=1)[:, 0]
