"""The programs of the prefill mesh: a padded prompt in, a `Prefix` out. Pure functions.

The models run in one program a prompt bucket; the first token is sampled in a second one, the same for all buckets,
because sampling costs more to compile than a small model.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from streamserve import sampling
from streamserve.kv import cache
from streamserve.specustream.drafters import Drafter
from streamserve.types import ForwardFns, KVShape, PrefillOutput, RowContext, RowParams, TokenLogprobs

PrefillFn = Callable[..., PrefillOutput]
_LOGPROB_CHUNK = 64  # positions whose logits exist at once: all of a long prompt's would not fit in memory


def make_prefill(
    target: ForwardFns, kv_shape: KVShape, drafter: Drafter, *, vocab_size: int, max_logprobs: int
) -> PrefillFn:
    """Build the prefill of target and drafter.

    Returns:
      `(target_params, draft_params, tokens_1S, length_1, wants_prompt_logprobs) -> PrefillOutput`. The prompt is padded
      on the right; what is computed for the padding lies beyond `length` and is never read.
    """

    def prefill(
        target_params: Any,
        draft_params: Any,
        tokens_1S: jax.Array,
        length_1: jax.Array,
        wants_prompt_logprobs: jax.Array,
    ) -> PrefillOutput:
        empty = cache.zeros(kv_shape, 1, tokens_1S.shape[1])
        hidden_1SE, target_kv = target.forward(target_params, tokens_1S, empty, jnp.zeros((1,), jnp.int32))
        tail_1E = jnp.take_along_axis(hidden_1SE, length_1[:, None, None] - 1, axis=1)
        valid_S = jnp.arange(tokens_1S.shape[1]) < length_1[0]
        return PrefillOutput(
            target=target_kv,
            draft=drafter.prefill(draft_params, tokens_1S),
            tail_logits=target.logits(target_params, tail_1E),
            prompt_seen=jnp.zeros((1, vocab_size), bool).at[0, tokens_1S[0]].max(valid_S),
            prompt_logprobs=_prompt_logprobs(
                target, target_params, hidden_1SE[0], tokens_1S[0], wants_prompt_logprobs, max_logprobs
            ),
        )

    return prefill


def sample_first(
    tail_logits_11V: jax.Array, prompt_seen_1V: jax.Array, row: RowParams, *, max_logprobs: int
) -> tuple[jax.Array, TokenLogprobs]:
    """Sample the token after the prompt.

    Returns:
      The token [1] and its log-probabilities.
    """
    counts_1V = jnp.zeros(prompt_seen_1V.shape, jnp.int32)
    context = RowContext(row=row, prompt_seen=prompt_seen_1V, output_counts=counts_1V, emitted=jnp.zeros(1, jnp.int32))
    adjusted_11V = sampling.adjust(tail_logits_11V, context, jnp.zeros((1, 0), jnp.int32), 0)
    probs_1V = sampling.probabilities(adjusted_11V, row)[:, 0]
    first_1 = sampling.sample(probs_1V, sampling.round_keys(row.key, context.emitted))
    return first_1, sampling.token_logprobs(tail_logits_11V[:, 0], first_1, row.wants_logprobs[0], max_logprobs)


def _prompt_logprobs(
    target: ForwardFns, params: Any, hidden_SE: jax.Array, tokens_S: jax.Array, wanted: jax.Array, max_logprobs: int
) -> TokenLogprobs:
    """Score each prompt token given those before it; entry s is about token s + 1."""
    size = tokens_S.shape[0]
    chunk = min(_LOGPROB_CHUNK, size)
    pad = -size % chunk
    next_S = jnp.pad(jnp.roll(tokens_S, -1), (0, pad))
    hidden_SE = jnp.pad(hidden_SE, ((0, pad), (0, 0)))

    def score(part: tuple[jax.Array, jax.Array]) -> TokenLogprobs:
        return sampling.token_logprobs(target.logits(params, part[0]), part[1], jnp.bool_(True), max_logprobs)

    def compute() -> TokenLogprobs:
        chunks = jax.lax.map(score, (hidden_SE.reshape(-1, chunk, hidden_SE.shape[1]), next_S.reshape(-1, chunk)))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:size], chunks)

    shape = jax.eval_shape(compute)
    return jax.lax.cond(wanted, compute, lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape))
