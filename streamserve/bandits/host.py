"""Runs a pure policy on the host: jitted once, on a device of its own, with state and keys kept here."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamserve.bandits.base import Decision, Policy


class HostPolicy:
    """A policy between two decisions.

    A device that is asked for decisions must not be one that runs models: a CPU device works off its programs one after
    the other, so a choice of 0.25 ms would wait for a whole prefill.
    """

    def __init__(self, policy: Policy, *, context_shape: tuple[int, ...], seed: int, device: Any):
        """Compile the policy for contexts of one shape.

        Args:
          policy: three pure functions.
          context_shape: of the float32 context.
          seed: of the policy's random numbers; decision t uses `fold_in(seed, t)`, so that a run replays.
          device: a jax.Device, where it runs.
        """
        where = jax.sharding.SingleDeviceSharding(device)
        self._where, self._steps = where, 0
        with jax.default_device(device):
            self._key = jax.random.key(seed, impl="threefry2x32")
            self._state = jax.jit(policy.init, out_shardings=where)()

            def choose(state: object, context: jax.Array, key: jax.Array, step: jax.Array) -> tuple[Decision, object]:
                return policy.choose(state, context, jax.random.fold_in(key, step))

            context = jax.device_put(np.zeros(context_shape, np.float32), where)
            step = jax.device_put(np.uint32(0), where)
            self._choose = jax.jit(choose).lower(self._state, context, self._key, step).compile()
            decision = jax.eval_shape(choose, self._state, context, self._key, step)[0]
            decision = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=where), decision)
            reward = jax.device_put(np.float32(0), where)
            self._update = jax.jit(policy.update).lower(self._state, context, decision, reward).compile()

    def choose(self, context: np.ndarray) -> Decision:
        """Choose an arm.

        Args:
          context: float32, of the declared shape.

        Returns:
          The decision as numpy scalars.
        """
        inputs = jax.device_put((context, np.uint32(self._steps)), self._where)
        decision, self._state = self._choose(self._state, inputs[0], self._key, inputs[1])
        self._steps += 1
        return jax.device_get(decision)

    def update(self, context: np.ndarray, decision: Decision, reward: float) -> None:
        """Tell the policy what came of a decision, whenever that is known."""
        inputs = jax.device_put((context, decision, np.float32(reward)), self._where)
        self._state = self._update(self._state, *inputs)
