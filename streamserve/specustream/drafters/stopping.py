"""When a row stops drafting within a round. Each decision is given no more than it may see, which keeps it lossless.

Whether position k counts may depend on the draft's distribution at k and on tokens before k, never on token k itself;
so the rules that decide about k take no token, and those that take token k decide about k + 1.
"""

import jax
import jax.numpy as jnp

from streamserve.specustream.depth import StopRule
from streamserve.types import StepPlan

_ENTROPY_WEIGHT = 0.2  # gamma of AdaEDL, arXiv 2410.18351


def stops_before(plan: StepPlan, logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """Tell which rows do not count the position that has these logits: StopRule.ENTROPY.

    Args:
      plan: with rule and threshold.
      logits_BV: adjusted logits of the position.
      temperature_B: 0 for greedy rows, which are judged at 1.

    Returns:
      bool [B].
    """

    def entropy(logits_BV: jax.Array) -> jax.Array:
        logprobs_BV = jax.nn.log_softmax(_scaled(logits_BV, temperature_B), axis=-1)
        probs_BV = jnp.exp(logprobs_BV)
        entropy_B = -jnp.sum(jnp.where(probs_BV > 0, probs_BV * logprobs_BV, 0.0), axis=-1)
        return 1.0 - jnp.sqrt(_ENTROPY_WEIGHT * jnp.maximum(entropy_B, 0.0)) < plan.threshold

    return jax.lax.cond(plan.rule == StopRule.ENTROPY, entropy, _no_row, logits_BV)


def stops_after(plan: StepPlan, logits_BV: jax.Array, temperature_B: jax.Array, token_B: jax.Array) -> jax.Array:
    """Tell which rows draft no further once they have drafted a token: StopRule.CONFIDENCE.

    Args:
      plan: with rule and threshold.
      logits_BV: adjusted logits of the position.
      temperature_B: 0 for greedy rows, which are judged at 1.
      token_B: int32, drafted at the position; it counts whatever is decided here.

    Returns:
      bool [B].
    """

    def confidence(logits_BV: jax.Array) -> jax.Array:
        probs_BV = jax.nn.softmax(_scaled(logits_BV, temperature_B), axis=-1)
        return jnp.take_along_axis(probs_BV, token_B[:, None], axis=-1)[:, 0] < plan.threshold

    return jax.lax.cond(plan.rule == StopRule.CONFIDENCE, confidence, _no_row, logits_BV)


def _scaled(logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    return logits_BV / jnp.where(temperature_B == 0, 1.0, temperature_B)[:, None]


def _no_row(logits_BV: jax.Array) -> jax.Array:
    return jnp.zeros(logits_BV.shape[:1], bool)
