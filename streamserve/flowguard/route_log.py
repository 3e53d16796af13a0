"""FlowGuard's decisions as a file of JSON lines: enough of what it saw, chose and got to make each again.

Line 1 is `{"format": 1, "header": {...}}`, each other line a decision, written when its outcome is known; those without
one, whose request was cancelled or routed anew, come last. An array is a list of JSON numbers, which give every float64
back bit for bit. Times and names are the caller's.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from streamserve.bandits import Decided, HostPolicy, Policy, replay
from streamserve.bandits.replay import Difference
from streamserve.flowguard.signals import Objective, Route, RouteContext, RouteOutcome, is_good, utility

FORMAT = 1
_BOOLS = ("eligible_A", "local_A")


class LoggedRoute(NamedTuple):
    """One decision.

    Attributes:
      step: how many decisions came before it.
      request_id: whom it is about.
      context: what the policy saw.
      route: what it chose.
      feedbacks: how many outcomes the policy had seen by then.
      skipped: proposals since the decision before that no lane could follow.
      chosen_s: when it chose, on the caller's clock.
      outcome: what came of it; None if nobody knows.
      order: how many outcomes came before that one; -1 without one.
      learned_s: when it came; None without one.
    """

    step: int
    request_id: str
    context: RouteContext
    route: Route
    feedbacks: int
    skipped: int
    chosen_s: float
    outcome: RouteOutcome | None = None
    order: int = -1
    learned_s: float | None = None


class RouteLog:
    """Writes decisions, from one thread."""

    def __init__(self, path: str | os.PathLike[str], *, header: Mapping[str, Any]):
        """Create the file, or empty it.

        Args:
          path: of the file.
          header: what a reader must know to replay: policy, lanes, seed, versions. JSON values only.

        Raises:
          OSError: it cannot be written.
        """
        self.path = pathlib.Path(path)
        self._lines = self.path.open("w", encoding="utf-8", newline="\n")
        self._open: dict[int, LoggedRoute] = {}
        self._steps = self._outcomes = 0
        self._lines.write(json.dumps({"format": FORMAT, "header": dict(header)}, allow_nan=False) + "\n")
        self._lines.flush()

    def choose(
        self, request_id: str, context: RouteContext, route: Route, feedbacks: int, skipped: int, now_s: float
    ) -> int:
        """Note a decision; gives the number to hand in with its outcome."""
        step, self._steps = self._steps, self._steps + 1
        self._open[step] = LoggedRoute(step, request_id, context, route, feedbacks, skipped, now_s)
        return step

    def learn(self, step: int, outcome: RouteOutcome, now_s: float) -> None:
        """Note what came of a decision; call it in the order in which the policy is told.

        Raises:
          OSError: the file cannot be written.
        """
        one = self._open.pop(step)._replace(outcome=outcome, order=self._outcomes, learned_s=now_s)
        self._outcomes += 1
        self._lines.write(_encode(one))
        self._lines.flush()

    def close(self) -> None:
        """Write the decisions without an outcome and close the file; a second call does nothing.

        Raises:
          OSError: the file cannot be written; it is closed all the same.
        """
        left, self._open = self._open, {}
        try:
            if left:
                self._lines.writelines(_encode(one) for one in left.values())
        finally:
            self._lines.close()


def read_routes(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[LoggedRoute]]:
    """Read a file of decisions.

    Returns:
      the header and the decisions, in their order.

    Raises:
      OSError: it cannot be read.
      ValueError: a line is damaged, or one is missing; the message says which.
    """
    header: dict[str, Any] = {}
    found: dict[int, LoggedRoute] = {}
    number = 0
    with pathlib.Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if number == 1:
                    if record["format"] != FORMAT:
                        raise ValueError(f"format {record['format']!r} is not {FORMAT}")
                    header = dict(record["header"])
                    continue
                one = _decode(record)
                if one.step in found:
                    raise ValueError(f"step {one.step} for the second time")
                found[one.step] = one
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
    if number == 0:
        raise ValueError(f"{path}, line 1: no header, the file is empty")
    missing = sorted(set(range(len(found))) - set(found))
    if missing:
        raise ValueError(f"{path}: step {missing[0]} is missing")
    return header, [found[step] for step in sorted(found)]


def replay_routes(policy: Policy, logged: Sequence[LoggedRoute], *, num_lanes: int, seed: int) -> list[Difference]:
    """Make every decision again.

    Args:
      policy: the one that was logged, in its first state.
      logged: all decisions, in their order.
      num_lanes: as given to `FlowGuard`.
      seed: likewise.

    Returns:
      every field of a route that differs; empty if all is reproduced.

    Raises:
      ValueError: outcomes are missing, or one comes before its decision.
    """
    decided = [Decided(one.context, one.route, one.feedbacks, one.outcome, one.order, one.skipped) for one in logged]
    return replay(HostPolicy(policy, num_arms=num_lanes, seed=seed), decided)


def _encode(one: LoggedRoute) -> str:
    context = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in one.context._asdict().items()
    }
    line: dict[str, Any] = {
        "step": one.step,
        "request_id": one.request_id,
        "feedbacks": one.feedbacks,
        "skipped": one.skipped,
        "chosen_s": one.chosen_s,
        "context": context | {"objective": one.context.objective._asdict()},
        "route": one.route._asdict(),
    }
    if one.outcome is not None:
        line |= {
            "order": one.order,
            "learned_s": one.learned_s,
            "outcome": one.outcome._asdict(),
            "good": is_good(one.outcome, one.context.objective),
            "reward": utility(one.outcome, one.context.objective),
        }
    return json.dumps(line, allow_nan=False) + "\n"


def _decode(record: Mapping[str, Any]) -> LoggedRoute:
    fields = dict(record["context"])
    for name, value in fields.items():
        if name.endswith("_A"):
            fields[name] = np.array(value, bool if name in _BOOLS else np.float64)
    fields["objective"] = Objective(**fields["objective"])
    known = "outcome" in record
    return LoggedRoute(
        step=record["step"],
        request_id=record["request_id"],
        context=RouteContext(**fields),
        route=Route(**record["route"]),
        feedbacks=record["feedbacks"],
        skipped=record["skipped"],
        chosen_s=record["chosen_s"],
        outcome=RouteOutcome(**record["outcome"]) if known else None,
        order=record["order"] if known else -1,
        learned_s=record["learned_s"] if known else None,
    )
