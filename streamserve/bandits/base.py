"""A policy: three pure functions over numpy arrays, in the manner of an optax transformation.

Policies run on the host, between two ticks, while the devices work. They are numpy and not JAX because a decision is
some dozen operations on arrays of nine numbers: numpy takes tens of microseconds for it and needs no device, where a
jitted function takes a third of a millisecond and waits behind the models on a device that it shares.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Decision(NamedTuple):
    """What a policy chose among arms.

    Attributes:
      arm: index of the choice.
      propensity: probability in (0, 1] with which this arm was chosen; off-policy estimates need it.
    """

    arm: int
    propensity: float


class Policy(NamedTuple):
    """A strategy of choosing among arms. It is pure: arguments are never written to, the same ones give the same.

    Attributes:
      init: `() -> state`, any pytree of numpy arrays and numbers.
      choose: `(state, context, noise_A2) -> (decision, state)`. What a context and a decision are, the user of the
        policy defines; `noise_A2` are two independent uniform numbers in (0, 1) an arm, all the randomness there is.
      update: `(state, context, decision, feedback) -> state`; `context` and `decision` are those of the choice that the
        feedback is about. Feedback comes late: other choices are made in between.
    """

    init: Callable[[], Any]
    choose: Callable[[Any, Any, np.ndarray], tuple[Any, Any]]
    update: Callable[[Any, Any, Any, Any], Any]
