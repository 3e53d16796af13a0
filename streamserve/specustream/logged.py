"""A decision of a depth policy, and how it is written as a line of JSON.

An array is `[dtype, values]`, since float32 arithmetic replayed in float64 would differ. JSON numbers are Python's
`repr`, which gives every float back bit for bit. NaN and infinity are refused.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from streamserve.specustream.depth import DepthContext, Plan, StepStats, StopRule

FORMAT = 1


class Outcome(NamedTuple):
    """What came of a decision.

    Attributes:
      stats: the feedback.
      order: how many feedbacks of this lane came before it.
      learned_s: when it came, on the caller's clock.
    """

    stats: StepStats
    order: int
    learned_s: float

    @property
    def tokens(self) -> int:
        """Emitted tokens of all slots."""
        return int(np.maximum(self.stats.emitted_B, 0).sum())  # slots that did not run may hold NOT_RUN

    @property
    def reward(self) -> float | None:
        """Emitted tokens per measured second; None if the clock did not move."""
        return self.tokens / self.stats.seconds if self.stats.seconds > 0 else None


class Logged(NamedTuple):
    """One decision.

    Attributes:
      lane: whose policy chose.
      step: how many decisions of this lane came before it.
      context: what the policy saw.
      plan: what it chose.
      feedbacks: how many feedbacks the policy had seen by then.
      chosen_s: when it chose, on the caller's clock.
      outcome: what came of it; None if its tick was lost.
    """

    lane: int
    step: int
    context: DepthContext
    plan: Plan
    feedbacks: int
    chosen_s: float
    outcome: Outcome | None = None


def encode(one: Logged) -> str:
    """Encode a decision as a line."""
    outcome = stats = None
    if one.outcome is not None:
        outcome = one.outcome
        stats = _plain(outcome.stats)
        if not outcome.stats.divergence_BR.any():  # it was not asked for: leave out the zeros
            stats["divergence_BR"][1] = None
    line = {
        "lane": one.lane,
        "step": one.step,
        "feedbacks": one.feedbacks,
        "chosen_s": float(one.chosen_s),
        "context": _plain(one.context),
        "plan": _plain(one.plan),
        "learned_s": outcome and float(outcome.learned_s),
        "order": outcome and outcome.order,
        "reward": outcome and outcome.reward,
        "stats": stats,
    }
    return _json(line, f"lane {one.lane} step {one.step}")


def encode_header(header: Mapping[str, Any]) -> str:
    """Encode line 1."""
    return _json({"format": FORMAT, "header": dict(header)}, "the header")


def decode_header(line: bytes) -> dict[str, Any]:
    """Decode line 1.

    Raises:
      ValueError, KeyError, TypeError: what is wrong with it.
    """
    raw = json.loads(line, parse_constant=_refuse)
    if raw["format"] != FORMAT:
        raise ValueError(f"format {raw['format']} is not {FORMAT}")
    return dict(raw["header"])


def decode(line: bytes) -> Logged:
    """Decode a decision.

    Raises:
      ValueError, KeyError, TypeError: what is wrong with it.
    """
    raw = json.loads(line, parse_constant=_refuse)
    context, plan = DepthContext(**_fields(DepthContext, raw["context"])), Plan(**_fields(Plan, raw["plan"]))
    plan = plan._replace(rule=StopRule(plan.rule))
    if not (0 <= plan.arm < len(context.tiers_A) and 0 < plan.propensity <= 1):
        raise ValueError(f"{plan.arm=} and {plan.propensity=} of {len(context.tiers_A)} arms")
    outcome = None
    if raw["stats"] is not None:
        fields = _fields(StepStats, raw["stats"])
        outcome = Outcome(StepStats(**fields), int(raw["order"]), float(raw["learned_s"]))
    if raw["reward"] != (outcome and outcome.reward):
        raise ValueError(f"reward {raw['reward']} is not that of its tokens and seconds")
    return Logged(
        int(raw["lane"]), int(raw["step"]), context, plan, int(raw["feedbacks"]), float(raw["chosen_s"]), outcome
    )


def _fields(kind: type[DepthContext] | type[Plan] | type[StepStats], raw: dict[str, Any]) -> dict[str, Any]:
    """Give a record's fields, all of them, with arrays for what was encoded as such."""
    if raw.keys() != set(kind._fields):
        raise ValueError(f"{kind.__name__} has fields {sorted(raw)}")
    if "divergence_BR" in raw and raw["divergence_BR"][1] is None:
        raw["divergence_BR"][1] = np.zeros(np.shape(raw["drafted_BR"][1])).tolist()
    return {name: _array(*value) if isinstance(value, list) else value for name, value in raw.items()}


def _array(dtype: str, values: list[Any]) -> np.ndarray:
    array = np.array(values, dtype)
    if array.tolist() != values:  # numpy would cut 1.5 to the integer 1
        raise ValueError(f"{values} is not of type {dtype}")
    return array


def _plain(record: DepthContext | Plan | StepStats) -> dict[str, Any]:
    """Give a record's fields as what JSON can hold."""
    return {name: _plain_value(value) for name, value in record._asdict().items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def _json(value: Mapping[str, Any], name: str) -> str:
    """Encode as a line.

    Args:
      value: to encode; NaN and infinity are a mistake of whoever made it.
      name: of it, for the message.
    """
    try:
        return json.dumps(value, allow_nan=False) + "\n"
    except ValueError as error:
        raise AssertionError(f"{name}: {error}: {value}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")
