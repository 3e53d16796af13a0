"""Replay of logged decisions: the same contexts and feedbacks, in the same interleaving, must give the same ones."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from streamserve.bandits.host import HostPolicy


class Decided(NamedTuple):
    """A decision as it was logged.

    Attributes:
      context: what the policy saw.
      decision: what it chose, a NamedTuple.
      feedbacks: how many feedbacks it had seen by then.
      feedback: what it was told of this decision; None if nothing.
      order: how many feedbacks came before that one; -1 if nothing was told.
      skipped: proposals since the decision before that did not stand.
    """

    context: Any
    decision: Any
    feedbacks: int
    feedback: Any = None
    order: int = -1
    skipped: int = 0


class Difference(NamedTuple):
    """A field of a decision that came out differently on replay."""

    step: int
    field: str
    logged: Any
    replayed: Any


def replay(host: HostPolicy, decisions: Sequence[Decided]) -> list[Difference]:
    """Make decisions again. The policy is told the logged ones, also after its own came out differently.

    What the last feedbacks taught shows in no decision, so nothing is found out about those.

    Args:
      host: the policy that was logged, in its first state.
      decisions: all of them, in their order.

    Returns:
      Every field that differs; empty if all is reproduced.

    Raises:
      ValueError: feedbacks are missing, or one comes before its decision.
    """
    told = sorted((one.order, step) for step, one in enumerate(decisions) if one.order >= 0)
    num_told, differences = 0, []
    for step, one in enumerate(decisions):
        if not num_told <= one.feedbacks <= len(told):
            raise ValueError(f"step {step}: {one.feedbacks} feedbacks, after {num_told} and of {len(told)} in all")
        for index in range(num_told, one.feedbacks):
            order, of_step = told[index]
            if order != index or of_step >= step:
                raise ValueError(f"step {step}: feedback {index} is missing, or comes before its decision")
            past = decisions[of_step]
            host.update(past.context, past.decision, past.feedback)
        num_told = one.feedbacks
        host.skip(one.skipped)
        again = host.choose(one.context)
        differences += [
            Difference(step, field, was, now)
            for field, was, now in zip(one.decision._fields, one.decision, again, strict=True)
            if not np.array_equal(was, now)
        ]
    return differences
