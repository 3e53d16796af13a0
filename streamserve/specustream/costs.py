"""What a round costs: seconds by batch, context length and depth, measured once and refreshed while serving.

It owns the numbers and how they are looked up. It must not know who measures them, nor what a policy does with them.
Form of the table as in vLLM's adaptive verification (pull request 47808): medians of measured programs, made monotone
in the batch, and a step up to the next size that is compiled, since the program of that size is what runs. Between
context lengths, which are no program's size, it is linear.
"""

import bisect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

_NOMINAL_ROUND = 1e-3  # s, a round of plain decoding in the table that nobody measured
_NOMINAL_SLOPE = 0.25  # of it, what a token of depth adds there; 0.1 of that is drafting
_NOMINAL_DRAFT = 0.1


class CostTable:
    """Predicted seconds of a round, and how much of it is drafting. N batch buckets, C context buckets, A arms."""

    def __init__(
        self,
        *,
        tiers: Sequence[int],
        batches: Sequence[int],
        contexts: Sequence[int],
        seconds_NCA: np.ndarray,
        draft_NCA: np.ndarray,
        fingerprint: Mapping[str, str] | None = None,
        rate: float = 0.05,
        shared: float = 0.3,
        reach: float = 2.0,
        clip: float = 0.25,
    ):
        """Take a table of measured medians.

        Args:
          tiers: depths, ascending, one an arm.
          batches: sizes that are compiled, ascending.
          contexts: tokens in the cache of a row at which was measured, ascending.
          seconds_NCA: s, median time of one round. Where a larger batch was faster, it counts as the smaller one.
          draft_NCA: s, the part of it that is drafting.
          fingerprint: where the numbers hold: machine, versions, model, sizes.
          rate: of an observation in (0, 1]: how much of what it differs by moves the prediction.
          shared: fraction in [0, 1] of that which moves every prediction, as a machine that runs slower does; the rest
            moves the observed batch bucket only.
          reach: tokens of depth after which that rest is down to 1/e: arms near the observed one are wrong alike, and
            an arm that is thought too costly to run would else never be known better.
          clip: the most that one observation is believed to differ by; 0.25 is 25 %. A host that stalls for a second
            thus moves a prediction by no more than rate * log(1 + clip), about 1 %.

        Raises:
          ValueError: buckets that do not ascend, or times that do not fit them.
        """
        for name, values in (("tiers", tiers), ("batches", batches), ("contexts", contexts)):
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"{name}={list(values)} must ascend and not be empty")
        shape = len(batches), len(contexts), len(tiers)
        if seconds_NCA.shape != shape or draft_NCA.shape != shape:
            raise ValueError(f"{seconds_NCA.shape=} and {draft_NCA.shape=} must be {shape}")
        if not (np.all(np.isfinite(seconds_NCA)) and np.all(seconds_NCA > 0)):
            raise ValueError("every measured time must be a positive number")
        if not np.all((draft_NCA >= 0) & (draft_NCA <= seconds_NCA)):
            raise ValueError("drafting is a part of the round, between 0 and all of it")
        self.tiers, self.batches, self.contexts = tuple(tiers), tuple(batches), tuple(contexts)
        self.fingerprint = dict(fingerprint or {})
        self._rate, self._shared, self._limit = rate, shared, math.log1p(clip)
        depth_A = np.asarray(self.tiers, np.float64)
        self._likeness_AA = np.exp(-np.abs(depth_A[:, None] - depth_A) / reach)
        self._share_NCA = draft_NCA / seconds_NCA
        self._seconds_NCA = np.maximum.accumulate(np.asarray(seconds_NCA, np.float64), axis=0)

    def lookup(self, batch: int, mean_length: float) -> tuple[np.ndarray, np.ndarray]:
        """Predict one round at each arm.

        Args:
          batch: rows that are held; a program of the next size that is compiled runs them.
          mean_length: tokens in the cache of a row, the mean; beyond the measured lengths the nearest one counts.

        Returns:
          cost_A and draft_A, s: the round, and the part of it that is drafting.

        Raises:
          ValueError: no program is that large.
        """
        bucket, left, weight = self._place(batch, mean_length)
        cost_A, share_A = self._seconds_NCA[bucket, left], self._share_NCA[bucket, left]
        if weight:
            cost_A = cost_A + weight * (self._seconds_NCA[bucket, left + 1] - cost_A)
            share_A = share_A + weight * (self._share_NCA[bucket, left + 1] - share_A)
            return cost_A, cost_A * share_A
        return cost_A.copy(), cost_A * share_A

    def observe(self, batch: int, mean_length: float, arm: int, seconds_per_round: float) -> None:
        """Refresh the table by a measured round, slowly.

        What is predicted moves by `rate` of the logarithm of measured / predicted, clipped. The newest measurement wins
        where it contradicts the order of the batches: smaller ones cost no more than this, larger ones no less.

        Args:
          batch: rows that were held.
          mean_length: tokens in the cache of a row.
          arm: that ran.
          seconds_per_round: s, measured; nothing is learnt unless it is positive.

        Raises:
          ValueError: no program is that large.
        """
        bucket, left, weight = self._place(batch, mean_length)
        if not 0 < seconds_per_round < math.inf:
            return
        line_C = self._seconds_NCA[bucket, :, arm]
        predicted = line_C[left] if not weight else line_C[left] + weight * (line_C[left + 1] - line_C[left])
        differs = math.log(seconds_per_round / predicted)
        step = self._rate * min(max(differs, -self._limit), self._limit)
        here_CA = self._seconds_NCA[bucket]
        self._seconds_NCA *= math.exp(self._shared * step)
        here_CA *= np.exp((1 - self._shared) * step * self._likeness_AA[arm])
        below_NCA, above_NCA = self._seconds_NCA[:bucket], self._seconds_NCA[bucket + 1 :]
        np.minimum(below_NCA, here_CA, out=below_NCA)
        np.maximum(above_NCA, here_CA, out=above_NCA)

    def to_json(self) -> str:
        """Write the table as it is now, with where it holds."""
        seconds_NCA = self._seconds_NCA
        return json.dumps(
            {
                "fingerprint": self.fingerprint,
                "tiers": self.tiers,
                "batches": self.batches,
                "contexts": self.contexts,
                "seconds": seconds_NCA.tolist(),
                "draft": (seconds_NCA * self._share_NCA).tolist(),
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str, fingerprint: Mapping[str, str]) -> Self:
        """Read a table that was measured in the same place.

        Args:
          text: of `to_json`.
          fingerprint: of this place: machine, versions, model, sizes.

        Raises:
          ValueError: it was measured elsewhere; the message names what differs. Or it is no cost table.
        """
        try:
            record = json.loads(text)
            measured = record["fingerprint"]
            names = sorted(measured.keys() | fingerprint.keys())
            differ = [
                f"{name} is {fingerprint.get(name)!r} here and {measured.get(name)!r} there"
                for name in names
                if measured.get(name) != fingerprint.get(name)
            ]
            table = cls(
                tiers=record["tiers"],
                batches=record["batches"],
                contexts=record["contexts"],
                seconds_NCA=np.array(record["seconds"], np.float64),
                draft_NCA=np.minimum(record["draft"], record["seconds"]),  # a division and a product may round up
                fingerprint=measured,
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no cost table: {type(error).__name__}: {error}") from error
        if differ:
            raise ValueError(f"this cost table was measured elsewhere: {'; '.join(differ)}")
        return table

    def _place(self, batch: int, mean_length: float) -> tuple[int, int, float]:
        """Find the batch bucket, the context bucket to the left, and the weight of the one to its right."""
        bucket = bisect.bisect_left(self.batches, batch)
        if bucket == len(self.batches):
            raise ValueError(f"{batch=} is more than the largest measured one, {self.batches[-1]}")
        contexts = self.contexts
        if mean_length <= contexts[0]:
            return bucket, 0, 0.0
        if mean_length >= contexts[-1]:
            return bucket, len(contexts) - 1, 0.0
        left = bisect.bisect_right(contexts, mean_length) - 1
        return bucket, left, (mean_length - contexts[left]) / (contexts[left + 1] - contexts[left])


def nominal(tiers: Sequence[int], batches: Sequence[int]) -> CostTable:
    """Make up a table without measuring: 1 ms for plain decoding and a quarter of it for each token of depth.

    Args:
      tiers: depths.
      batches: sizes that are compiled; all cost the same.
    """
    relative_A = 1 + _NOMINAL_SLOPE * np.asarray(tiers, np.float64)
    draft_A = _NOMINAL_DRAFT * np.asarray(tiers, np.float64)
    shape = len(batches), 1, 1
    return CostTable(
        tiers=tiers,
        batches=batches,
        contexts=(0,),
        seconds_NCA=np.tile(_NOMINAL_ROUND * relative_A, shape),
        draft_NCA=np.tile(_NOMINAL_ROUND * draft_A, shape),
        fingerprint={"nominal": "not measured"},
    )
