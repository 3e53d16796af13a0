"""The decode slots of a simulated stream pair: who holds them, and what comes out of a tick.

It knows neither time nor pages; a row's tokens are all alike, and it ends at `max_tokens`.
"""

from typing import Any, NamedTuple

import numpy as np

from streamserve.pipeserve.store import Holding
from streamserve.types import EMPTY_TOKEN, FinishCode, Job, StepOutput

TOKEN = 1  # every token that a simulated pair emits


class SimulatedTick(NamedTuple):
    """A tick whose output can be read from `done_s` on."""

    output: StepOutput
    done_s: float


class Rows:
    """Decode slots: who holds them, and how far each row is. B slots."""

    def __init__(self, slots: int):
        self.holdings: dict[int, Holding] = {}
        self.emitted_B = np.zeros(slots, np.int64)
        self.most_B = np.zeros(slots, np.int64)
        self.length_B = np.zeros(slots, np.int64)
        self.pending_B = np.zeros(slots, bool)  # the first token waits for the next tick

    def insert(self, job: Job, holding: Holding) -> int:
        """Fill the lowest free slot.

        Raises:
          ValueError: there is none.
        """
        slot = next((slot for slot in range(len(self.most_B)) if slot not in self.holdings), None)
        if slot is None:
            raise ValueError(f"no free slot for {job.request.request_id}")
        self.holdings[slot] = holding
        self.emitted_B[slot], self.most_B[slot] = len(job.output) or 1, job.request.params.max_tokens
        self.length_B[slot], self.pending_B[slot] = len(job.tokens), not job.output
        return slot

    def release(self, slot: int) -> Holding:
        """Empty a slot."""
        self.emitted_B[slot] = self.most_B[slot] = self.length_B[slot] = 0
        self.pending_B[slot] = False
        return self.holdings.pop(slot)

    def advance(self, batch: int, run_BR: np.ndarray, depth_B: np.ndarray, tier: int) -> tuple[StepOutput, int, float]:
        """Let the first rows emit.

        Args:
          batch: how many.
          run_BR: drafted tokens that would be accepted, had the row no end, at most `depth_B`.
          depth_B: drafted tokens a round.
          tier: depth of the program.

        Returns:
          What came out; rounds in which any row ran; tokens in the cache of such a row before the tick, the mean.
        """
        rounds = run_BR.shape[1]
        left_B = self.most_B[:batch] - self.emitted_B[:batch]
        end_BR = np.cumsum(run_BR + 1, axis=1)
        begin_BR = end_BR - run_BR - 1
        ran_BR = begin_BR < left_B[:, None]
        emitted_BR = np.where(ran_BR, np.minimum(end_BR, left_B[:, None]) - begin_BR, 0)
        tokens = np.full((batch, 1 + rounds * (tier + 1)), EMPTY_TOKEN, np.int32)
        tokens[self.pending_B[:batch], 0] = TOKEN
        tokens[:, 1:].reshape(batch, rounds, tier + 1)[np.arange(tier + 1) < emitted_BR[..., None]] = TOKEN
        mean_length = float(self.length_B[:batch][left_B > 0].mean()) if (left_B > 0).any() else 0.0
        self.emitted_B[:batch] += emitted_BR.sum(axis=1)
        self.length_B[:batch] += emitted_BR.sum(axis=1)
        self.pending_B[:batch] = False
        ended_B = self.emitted_B[:batch] >= self.most_B[:batch]
        array: Any = np.asarray
        output = StepOutput(
            tokens=array(tokens),
            accepted=array(np.where(ran_BR, np.minimum(run_BR, emitted_BR), EMPTY_TOKEN), np.int32),
            drafted=array(np.where(ran_BR, depth_B[:, None], EMPTY_TOKEN), np.int32),
            divergence=array(np.zeros(run_BR.shape), np.float32),
            finish=array(np.where(ended_B, FinishCode.LENGTH, FinishCode.RUNNING), np.int32),
            logprobs=None,
        )
        return output, int(ran_BR.any(axis=0).sum()), mean_length
