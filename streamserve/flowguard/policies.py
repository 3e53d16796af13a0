"""Routing policies: pure `Policy` triples over the context of `signals.context`, one arm a lane."""

import jax
import jax.numpy as jnp

from streamserve.bandits import Decision, Policy
from streamserve.flowguard.signals import ELIGIBLE


def round_robin(num_lanes: int) -> Policy:
    """Take the lanes in turn, passing over those that may not take the request."""

    def init() -> jax.Array:
        return jnp.zeros((), jnp.int32)  # the lane whose turn it is

    def choose(turn: jax.Array, context_AF: jax.Array, key: jax.Array) -> tuple[Decision, jax.Array]:
        del key
        order_A = (turn + jnp.arange(num_lanes)) % num_lanes
        arm = order_A[jnp.argmax(context_AF[order_A, ELIGIBLE] > 0)]
        return Decision(arm=arm, propensity=jnp.ones((), jnp.float32)), (arm + 1) % num_lanes

    def update(turn: jax.Array, context_AF: jax.Array, decision: Decision, reward: jax.Array) -> jax.Array:
        del context_AF, decision, reward
        return turn

    return Policy(init=init, choose=choose, update=update)
