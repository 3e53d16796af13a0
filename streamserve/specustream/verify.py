"""Verification rules: which drafted tokens stand, and what comes after them. Pure; all but `drawn_counts` are lossless.

They are for any `draft.length` that `Draft` allows: whether a position is drafted is settled by the tokens before it
and by draft distributions, so it tells nothing of the token itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from streamserve import sampling
from streamserve.sampling import RoundKeys
from streamserve.types import Draft, RowContext, Verdict


class Verifier(NamedTuple):
    """A verification rule.

    Attributes:
      verify: `(target_probs_BTV, draft_probs_BKV, draft, keys) -> Verdict`. Not asked where all rows are greedy: there
        every lossless rule is `greedy`. It does not read `draft.logits`.
      keys: `(context, width) -> RoundKeys`: the random numbers of a round, for drafter and rule.
    """

    verify: Callable[[jax.Array, jax.Array, Draft, RoundKeys], Verdict]
    keys: Callable[[RowContext, int], RoundKeys]


def rejection() -> Verifier:
    """Build speculative sampling: accept token by token, correct the first that fails.

    Token d_k, drawn from q_k, is accepted with probability min(1, p_k(d_k) / q_k(d_k)). The first refused position is
    drawn anew from max(p - q, 0); if none is refused, a bonus token is drawn from the position after the draft. The
    output is then distributed as p (Leviathan et al., arXiv 2211.17192, theorem 1; Chen et al., arXiv 2302.01318).
    """
    return Verifier(verify=_rejection, keys=sampling.independent_keys)


def block() -> Verifier:
    """Build block verification: accept the longest prefix that the block as a whole lets stand.

    A prefix of i drafted tokens has the weight w_i = min(1, w_{i-1} p_i(d_i) / q_i(d_i)), w_0 = 1: a token that is too
    likely under the draft may be made up for by its successors. Every prefix is tried on its own, with probability
    w_i at the end of the draft and e_i / (e_i + 1 - w_i) before it, e_i = sum max(w_i p_{i+1} - q_{i+1}, 0); the
    longest that passes stands. The token after it is drawn from max(w_i p_{i+1} - q_{i+1}, 0), or from p after a whole
    draft. The output is distributed as p, and no fewer tokens are accepted in expectation than by `rejection` (Sun et
    al., arXiv 2403.10444, algorithm 2). A row's block ends at `draft.length`: a drafted prefix is kept with probability
    w_i whether or not the draft goes on after it, which is all that the proof asks.
    """
    return Verifier(verify=_block, keys=sampling.independent_keys)


def coupled() -> Verifier:
    """Build drafter-invariant verification: each token is the one that plain sampling draws with its position's key.

    A drafted token stands while it is that token. The drafter draws with the same key, so the two agree with
    probability at least (1 - TV(p, q)) / (1 + TV(p, q)); speculative sampling attains 1 - TV, but here the output does
    not depend on drafter, depth or policy, as long as the target's logits do not: a pass of another width may round
    them differently (Daliri et al., arXiv 2408.07978). Draft probabilities are not read.
    """
    return Verifier(verify=_coupled, keys=sampling.position_keys)


def greedy(logits_BTV: jax.Array, draft: Draft) -> Verdict:
    """Accept what agrees with the largest logits: what every lossless rule does where all rows are point masses.

    Args:
      logits_BTV: adjusted, with T = K + 1 positions.
      draft: K proposed tokens and how many count for each row; its logits are not read.
    """
    return _follow(jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32), draft)


def drawn_counts(acceptance_K: jax.Array, length_B: jax.Array, key_B: jax.Array) -> jax.Array:
    """Draw how many tokens to accept without looking at them.

    Position k is accepted with probability `acceptance_K[k]` if all before it were. The output is then NOT distributed
    as the target's: this is for measurements whose acceptance must be known.

    Args:
      acceptance_K: probabilities, one a position.
      length_B: drafted positions; none beyond is accepted.
      key_B: typed keys, consumed.

    Returns:
      int32 [B], `num_accepted` for `forced`.
    """
    return _count_leading(_uniform(key_B, acceptance_K.shape[0]) < acceptance_K[None], length_B)


def forced(num_accepted_B: jax.Array, next_BT: jax.Array) -> Verdict:
    """Accept a given number of tokens.

    Args:
      num_accepted_B: int32 in [0, K].
      next_BT: the token to follow, for each number of accepted tokens.
    """
    return Verdict(
        num_accepted=num_accepted_B, next_token=jnp.take_along_axis(next_BT, num_accepted_B[:, None], axis=1)[:, 0]
    )


def _rejection(target_probs_BTV: jax.Array, draft_probs_BKV: jax.Array, draft: Draft, keys: RoundKeys) -> Verdict:
    keys_B2 = jax.vmap(jax.random.split)(keys.verify)
    p_BK, q_BK = _of_drafted(target_probs_BTV, draft), _of_drafted(draft_probs_BKV, draft)
    accept_BK = _uniform(keys_B2[:, 0], p_BK.shape[1]) * q_BK < p_BK
    num_accepted_B = _count_leading(accept_BK, draft.length)
    next_BV = _next_weights(
        target_probs_BTV, draft_probs_BKV, draft, num_accepted_B, jnp.ones(p_BK.shape[:1], jnp.float32)
    )
    return Verdict(num_accepted=num_accepted_B, next_token=sampling.sample(next_BV, keys_B2[:, 1]))


def _block(target_probs_BTV: jax.Array, draft_probs_BKV: jax.Array, draft: Draft, keys: RoundKeys) -> Verdict:
    keys_B2 = jax.vmap(jax.random.split)(keys.verify)
    weight_BT = _prefix_weights(_of_drafted(target_probs_BTV, draft), _of_drafted(draft_probs_BKV, draft))
    depth = draft.tokens.shape[1]
    inner_BK1 = weight_BT[:, 1:depth, None]  # prefixes of 1 .. K - 1 tokens: the draft may go on after them
    excess_BK = jnp.sum(jnp.maximum(inner_BK1 * target_probs_BTV[:, 1:depth] - draft_probs_BKV[:, 1:], 0.0), axis=-1)
    total_BK = excess_BK + 1.0 - inner_BK1[..., 0]
    # Nothing in excess at full weight: a longer prefix is accepted almost surely, and if rounding says no, this one is.
    inner_BK = jnp.where(total_BK == 0, 1.0, excess_BK / total_BK)
    size_1K = jnp.arange(1, depth + 1)[None]
    ends_BK = size_1K == draft.length[:, None]
    pass_BK = jnp.where(ends_BK, weight_BT[:, 1:], jnp.pad(inner_BK, ((0, 0), (0, 1))))
    accept_BK = (_uniform(keys_B2[:, 0], depth) < pass_BK) & (size_1K <= draft.length[:, None])
    num_accepted_B = jnp.max(jnp.where(accept_BK, size_1K, 0), axis=1).astype(jnp.int32)
    weight_B = jnp.take_along_axis(weight_BT, num_accepted_B[:, None], axis=1)[:, 0]
    next_BV = _next_weights(target_probs_BTV, draft_probs_BKV, draft, num_accepted_B, weight_B)
    return Verdict(num_accepted=num_accepted_B, next_token=sampling.sample(next_BV, keys_B2[:, 1]))


def _coupled(target_probs_BTV: jax.Array, draft_probs_BKV: jax.Array, draft: Draft, keys: RoundKeys) -> Verdict:
    del draft_probs_BKV
    return _follow(sampling.sample_each(target_probs_BTV, keys.token), draft)


def _follow(choice_BT: jax.Array, draft: Draft) -> Verdict:
    """Let drafted tokens stand while they are the target's choice, and go on with its own."""
    return forced(_count_leading(draft.tokens == choice_BT[:, :-1], draft.length), choice_BT)


def _count_leading(accept_BK: jax.Array, length_B: jax.Array) -> jax.Array:
    """Count accepted positions before the first that is refused or not drafted."""
    drafted_BK = jnp.arange(accept_BK.shape[1])[None] < length_B[:, None]
    return jnp.sum(jnp.cumprod(accept_BK & drafted_BK, axis=1, dtype=jnp.int32), axis=1)


def _prefix_weights(p_BK: jax.Array, q_BK: jax.Array) -> jax.Array:
    """Weights w_0 .. w_K of the drafted prefixes, [B, T]; 1 exactly where p == q, 0 after a token that p rules out."""
    weights = [jnp.ones(p_BK.shape[:1], jnp.float32)]
    for k in range(p_BK.shape[1]):
        reach_B = weights[-1] * p_BK[:, k]
        weights.append(jnp.where(reach_B >= q_BK[:, k], (reach_B > 0).astype(reach_B.dtype), reach_B / q_BK[:, k]))
    return jnp.stack(weights, axis=1)


def _next_weights(
    target_probs_BTV: jax.Array,
    draft_probs_BKV: jax.Array,
    draft: Draft,
    num_accepted_B: jax.Array,
    weight_B: jax.Array,
) -> jax.Array:
    """Unnormalised distribution [B, V] of the token after the accepted ones: the residual, or p after a whole draft."""
    p_BV = _at(target_probs_BTV, num_accepted_B)
    q_BV = _at(jnp.pad(draft_probs_BKV, ((0, 0), (0, 1), (0, 0))), num_accepted_B)
    residual_BV = jnp.maximum(weight_B[:, None] * p_BV - q_BV, 0.0)
    refused_B1 = (num_accepted_B < draft.length)[:, None]
    # p == q up to rounding leaves no residual; then p itself is the limit of the rule.
    proper_B1 = jnp.sum(residual_BV, axis=-1, keepdims=True) > 0
    return jnp.where(refused_B1 & proper_B1, residual_BV, p_BV)


def _of_drafted(probs_BXV: jax.Array, draft: Draft) -> jax.Array:
    depth = draft.tokens.shape[1]
    return jnp.take_along_axis(probs_BXV[:, :depth], draft.tokens[..., None], axis=-1)[..., 0]


def _at(probs_BTV: jax.Array, position_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(probs_BTV, position_B[:, None, None], axis=1)[:, 0]


def _uniform(key_B: jax.Array, depth: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.uniform(key, (depth,)))(key_B)
