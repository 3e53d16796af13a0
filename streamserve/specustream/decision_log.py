"""The decisions of depth policies as a file of JSON lines: enough of what each saw, chose and got to make it again.

Owns the file, its reader and the replay. It knows nothing of clocks, requests or which policy runs: times and counts
are the caller's. Line 1 is `{"format": 1, "header": {...}}`, each other line a decision, written when its outcome is
known; decisions without one, whose tick was lost, come last.
"""

import collections
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from streamserve.bandits import Decided, HostPolicy, Policy
from streamserve.bandits import replay as replay_decisions
from streamserve.specustream.depth import DepthContext, Plan, StepStats
from streamserve.specustream.logged import Logged, Outcome, decode, decode_header, encode, encode_header


class Mismatch(NamedTuple):
    """A field of a plan that came out differently on replay."""

    lane: int
    step: int
    field: str
    logged: Any
    replayed: Any


class DecisionLog:
    """Writes decisions, from one thread. Between batches it only appends to a list.

    What it is given it keeps until the batch is written: nobody may write to those arrays any more.
    """

    def __init__(self, path: str | os.PathLike[str], *, header: Mapping[str, Any], flush_every: int = 16):
        """Create the file, or empty it.

        Args:
          path: of the file.
          header: what a reader must know to replay: policy, tiers, slots, seeds, versions. JSON values only.
          flush_every: decisions a batch. One takes some 40 us with 8 slots, 80 us with 32, so 16 hold a loop up for
            about a millisecond.

        Raises:
          OSError: it cannot be written.
        """
        self.path = pathlib.Path(path)
        self._lines = self.path.open("w", encoding="utf-8", newline="\n")
        self._flush_every = flush_every
        self._open: dict[int, Logged] = {}
        self._done: list[Logged] = []
        self._chosen: collections.Counter[int] = collections.Counter()  # decisions of each lane
        self._learned: collections.Counter[int] = collections.Counter()  # feedbacks of each lane
        self._next_token = 0
        self._lines.write(encode_header(header))
        self._lines.flush()

    def choose(self, lane: int, context: DepthContext, plan: Plan, feedbacks: int, now_s: float) -> int:
        """Note a decision.

        Args:
          lane: whose policy chose, counted from 0.
          context: what it saw.
          plan: what it chose.
          feedbacks: how many feedbacks the lane's policy had seen before.
          now_s: the time.

        Returns:
          a token to hand in with the outcome.
        """
        token, self._next_token = self._next_token, self._next_token + 1
        self._open[token] = Logged(lane, self._chosen[lane], context, plan, feedbacks, now_s)
        self._chosen[lane] += 1
        return token

    def learn(self, token: int, stats: StepStats, now_s: float) -> None:
        """Note what came of a decision; call it in the order in which the lane's policy is told.

        Raises:
          OSError: the file cannot be written.
        """
        assert token in self._open, f"decision {token} is not open"
        opened = self._open.pop(token)
        self._done.append(opened._replace(outcome=Outcome(stats, self._learned[opened.lane], now_s)))
        self._learned[opened.lane] += 1
        if len(self._done) >= self._flush_every:
            self._flush()

    def close(self) -> None:
        """Write what is left, decisions without an outcome last, and close the file; a second call does nothing.

        Raises:
          OSError: the file cannot be written; it is closed all the same.
        """
        self._done += self._open.values()
        self._open = {}
        try:
            self._flush()
        finally:
            self._lines.close()

    def _flush(self) -> None:
        if self._done:
            done, self._done = self._done, []
            self._lines.writelines(map(encode, done))
            self._lines.flush()


def read_log(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Logged]]:
    """Read a file of decisions.

    Returns:
      the header and the decisions, by lane and step.

    Raises:
      OSError: it cannot be read.
      ValueError: a line is damaged; the message says which and why.
    """
    header: dict[str, Any] = {}
    decisions: dict[tuple[int, int], Logged] = {}
    number = 0
    with pathlib.Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if number == 1:
                    header = decode_header(line)
                    continue
                one = decode(line)
                if (one.lane, one.step) in decisions:
                    raise ValueError(f"lane {one.lane} step {one.step} for the second time")
                decisions[one.lane, one.step] = one
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
    if number == 0:
        raise ValueError(f"{path}, line 1: no header, the file is empty")
    return header, [decisions[key] for key in sorted(decisions)]


def replay(policy: Policy, logged: Iterable[Logged], *, num_arms: int, seed: int) -> list[Mismatch]:
    """Make every decision again, each lane for itself: the logged contexts and feedbacks in the logged interleaving.

    A policy is told the logged plan, also after its own came out differently. What the last feedbacks of a lane taught
    shows in no plan, so nothing is found out about those.

    Args:
      policy: the one that was logged, in its first state.
      logged: all decisions of these lanes, in any order.
      num_arms: as given to `HostPolicy`.
      seed: lane l's `HostPolicy` has `seed + l`, as `SpecuStream` gives it.

    Returns:
      every field of a plan that differs; empty if all is reproduced.

    Raises:
      ValueError: decisions or feedbacks are missing, or a feedback comes before its decision.
    """
    lanes: dict[int, list[Logged]] = collections.defaultdict(list)
    for one in sorted(logged, key=lambda one: (one.lane, one.step)):
        lanes[one.lane].append(one)
    mismatches = []
    for lane, decisions in lanes.items():
        for step, one in enumerate(decisions):
            if one.step != step:
                raise ValueError(f"lane {lane} step {one.step}: step {step} should come here")
        try:
            found = replay_decisions(
                HostPolicy(policy, num_arms=num_arms, seed=seed + lane), [_decided(one) for one in decisions]
            )
        except ValueError as error:
            raise ValueError(f"lane {lane} {error}") from error
        mismatches += [Mismatch(lane, *difference) for difference in found]
    return mismatches


def _decided(one: Logged) -> Decided:
    if one.outcome is None:
        return Decided(one.context, one.plan, one.feedbacks)
    return Decided(one.context, one.plan, one.feedbacks, one.outcome.stats, one.outcome.order)
