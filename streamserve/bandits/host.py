"""Runs a pure policy: keeps its state and its random numbers between decisions."""

from typing import Any

import numpy as np

from streamserve.bandits.base import Policy

_BLOCK = 256  # decisions whose random numbers are drawn at once; a generator call costs as much as a whole policy


class HostPolicy:
    """A policy between two decisions. The same seed, contexts and feedback give the same decisions."""

    def __init__(self, policy: Policy, *, num_arms: int, seed: int):
        """Begin in the policy's first state.

        Args:
          policy: three pure functions.
          num_arms: A.
          seed: of the policy's random numbers.
        """
        self._policy, self._num_arms = policy, num_arms
        self._generator = np.random.default_rng(np.random.SeedSequence(seed))
        self._noise, self._used = np.zeros((0, num_arms, 2)), 0
        self._state = self._proposed = policy.init()

    def propose(self, context: Any) -> Any:
        """Choose an arm as if nothing had been chosen; `commit` makes it so. Gives what the policy calls a decision.

        Each proposal has random numbers of its own: those of one that did not stand are no longer random.

        Raises:
          TypeError: the policy's `choose` returns no pair.
        """
        told = self._policy.choose(self._state, context, self._next_noise())
        if type(told) is not tuple or len(told) != 2:  # a decision alone may be a named tuple of two
            raise TypeError(f"a policy's `choose` must return (decision, state), got {told!r}")
        decision, self._proposed = told
        return decision

    def commit(self) -> None:
        """Let the latest proposal stand."""
        self._state = self._proposed

    def skip(self, count: int) -> None:
        """Use up the random numbers of proposals that did not stand."""
        for _ in range(count):
            self._next_noise()

    def choose(self, context: Any) -> Any:
        """Choose an arm; gives what the policy calls a decision."""
        decision = self.propose(context)
        self.commit()
        return decision

    def _next_noise(self) -> np.ndarray:
        if self._used == len(self._noise):
            # The generator gives [0, 1); policies take logarithms.
            self._noise, self._used = 1.0 - self._generator.random((_BLOCK, self._num_arms, 2)), 0
        self._used += 1
        return self._noise[self._used - 1]

    def update(self, context: Any, decision: Any, feedback: Any) -> None:
        """Tell the policy what came of a decision, whenever that is known."""
        self._state = self._policy.update(self._state, context, decision, feedback)
