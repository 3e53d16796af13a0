"""A policy: three pure functions over arrays, in the manner of an optax transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Decision(NamedTuple):
    """What a policy chose.

    Attributes:
      arm: int32 scalar, index of the choice.
      propensity: float32 scalar in (0, 1], probability with which this arm was chosen; off-policy estimates need it.
    """

    arm: jax.Array
    propensity: jax.Array


class Policy(NamedTuple):
    """A strategy of choosing among arms. Shapes and dtypes of its state never change.

    Attributes:
      init: `() -> state`.
      choose: `(state, context, key) -> (Decision, state)`; `context` is a float32 array whose layout the user of the
        policy defines; `key` is consumed.
      update: `(state, context, decision, reward) -> state`; feedback may come late and out of order.
    """

    init: Callable[[], Any]
    choose: Callable[[Any, jax.Array, jax.Array], tuple[Decision, Any]]
    update: Callable[[Any, jax.Array, Decision, jax.Array], Any]
