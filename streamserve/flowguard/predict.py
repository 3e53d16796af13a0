"""What a request would have to wait for on each lane: the arithmetic that latency-aware routers share.

Source of the form: Mooncake (arXiv 2407.00079), algorithm 1, queue + prefill + transfer; the wait for a decode slot and
the pace of decoding are ours. What a lane has not measured yet counts as nothing: it has to be tried to be known.
"""

from typing import NamedTuple

import numpy as np

from streamserve.flowguard.signals import RouteContext

_TICKS_AHEAD = 1.5  # of a tick that is dispatched now where one runs and one is queued, in the mean


class Prediction(NamedTuple):
    """Seconds on each lane, [A].

    Attributes:
      queue_s_A: until the prompts before it are computed.
      prefill_s_A: of its own prompt, without what the prefix cache holds.
      transfer_s_A: of its own hand-off, as long as those of late took a byte: what they waited for others is in that.
      slot_s_A: until a decode slot is free.
      tick_s_A: until its first token is read, once it is in a slot.
      tpot_s_A: a token after the first.
    """

    queue_s_A: np.ndarray
    prefill_s_A: np.ndarray
    transfer_s_A: np.ndarray
    slot_s_A: np.ndarray
    tick_s_A: np.ndarray
    tpot_s_A: np.ndarray

    @property
    def ttft_s_A(self) -> np.ndarray:
        """Until the first token, from now on; a slot may become free while the prompt is computed."""
        return np.maximum(self.queue_s_A + self.prefill_s_A + self.transfer_s_A, self.slot_s_A) + self.tick_s_A


def predict(context: RouteContext, *, local: bool = False) -> Prediction:
    """Predict from the signals.

    Args:
      context: of the request and the lanes.
      local: the prompt is computed where it is decoded: wholly, behind the ticks under way, at the pace of the prefill
        mesh, and without a hand-off.
    """
    new_A = context.prompt_tokens - (0 if local else context.hit_tokens_A)
    zero_A = np.zeros(len(context.eligible_A))
    own_bytes_A = context.prompt_tokens * context.token_bytes_A
    ticks_s_A = _TICKS_AHEAD * (context.running_A > 0) * context.tick_s_A
    queued_A = context.local_queued_A if local else context.queued_tokens_A
    ahead_A = np.maximum(context.in_transit_A + 1 - context.free_slots_A, 0)
    return Prediction(
        queue_s_A=ticks_s_A * local + queued_A * context.prefill_s_A,
        prefill_s_A=new_A * context.prefill_s_A,
        transfer_s_A=zero_A if local else own_bytes_A * context.transfer_s_A,
        slot_s_A=ahead_A * context.decode_s_A / np.maximum(context.slots_A, 1),
        tick_s_A=ticks_s_A + context.tick_s_A,
        tpot_s_A=context.tick_s_A / np.maximum(context.tick_tokens_A, 1e-9) * (context.tick_tokens_A > 0),
    )
