"""One running request on the host: collects what its row emits and turns it into a `CompletionOutput`.

It knows nothing of lanes or order. Stop strings end a request here, since only the host sees text; stop tokens and
lengths have ended it on the device already.
"""

from collections.abc import Callable

import numpy as np

from streamserve.tokenizer import StopMatch, TextStream
from streamserve.types import (
    EMPTY_TOKEN,
    CompletionOutput,
    FinishCode,
    Logprob,
    Request,
    RequestMetrics,
    StepOutput,
    TokenLogprobs,
)

MakeTextStream = Callable[[Request], TextStream]
DecodeToken = Callable[[int], str | None]


class RunningRequest:
    """Output of one request so far."""

    def __init__(
        self,
        request: Request,
        text: TextStream,
        decode_token: DecodeToken,
        *,
        lane: int,
        arrival_s: float,
        scheduled_s: float,
    ):
        """Begin an empty output.

        Args:
          request: what is generated.
          text: detokenizes it.
          decode_token: text of a single token, for log-probabilities.
          lane: the stream pair that serves it.
          arrival_s: clock reading when the scheduler took it.
          scheduled_s: clock reading when its prefill was dispatched.
        """
        self.request = request
        self.prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
        self.transfer_bytes = 0
        self.drafted: list[int] = []
        self.accepted: list[int] = []
        self._text, self._decode_token = text, decode_token
        self._lane, self._arrival_s, self._scheduled_s = lane, arrival_s, scheduled_s
        self._tokens: list[int] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._first_token_s: float | None = None
        self._match: StopMatch | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens emitted so far."""
        return len(self._tokens)

    def take(self, output: StepOutput, slot: int, now_s: float) -> bool:
        """Take over what row `slot` emitted in one tick.

        Returns:
          Whether the request has ended.
        """
        columns = np.flatnonzero(output.tokens[slot] != EMPTY_TOKEN)
        tokens = [int(token) for token in output.tokens[slot, columns]]
        if tokens and self._first_token_s is None:
            self._first_token_s = now_s
        ran = output.drafted[slot] != EMPTY_TOKEN
        self.drafted += [int(count) for count in output.drafted[slot, ran]]
        self.accepted += [int(count) for count in output.accepted[slot, ran]]
        self._tokens += tokens
        if self.request.params.logprobs is not None:
            entries = (_entry(output.logprobs, slot, int(column)) for column in columns)
            self._logprobs += [self._named(entry, token) for entry, token in zip(entries, tokens, strict=True)]
        self._match = self._text.push(tokens) if tokens else None
        return self._match is not None or int(output.finish[slot]) != FinishCode.RUNNING

    def set_prompt_logprobs(self, scored: TokenLogprobs) -> None:
        """Keep the log-probabilities of the prompt's tokens, the first of which has none."""
        tokens = self.request.prompt_token_ids
        entries = (_entry(scored, index) for index in range(len(tokens) - 1))
        count = self.request.params.prompt_logprobs
        named = (self._named(entry, token, count) for entry, token in zip(entries, tokens[1:], strict=True))
        self.prompt_logprobs = (None, *named)

    def completion(self, index: int = 0) -> CompletionOutput:
        """Give the finished output. Tokens after a stop string's last are dropped."""
        params, match = self.request.params, self._match
        kept = len(self._tokens) if match is None else match.num_tokens
        tokens = tuple(self._tokens[:kept])
        ended_by_token = match is None and tokens[-1] in self.request.stop_ids
        stop_reason: str | int | None = match.stop if match is not None else None
        if ended_by_token and tokens[-1] in params.stop_token_ids:
            stop_reason = tokens[-1]
        logprobs = tuple(self._logprobs[:kept]) if params.logprobs is not None else None
        total = None
        if logprobs is not None:
            total = sum(entry[token].logprob for entry, token in zip(logprobs, tokens, strict=True))
        return CompletionOutput(
            index=index,
            text=self._text.finish(stop_token=ended_by_token),
            token_ids=tokens,
            cumulative_logprob=total,
            logprobs=logprobs,
            finish_reason="stop" if match is not None or ended_by_token else "length",
            stop_reason=stop_reason,
        )

    def metrics(self, finished_s: float) -> RequestMetrics:
        """Give times and counts; `finished_s` is a clock reading."""
        return RequestMetrics(
            arrival_s=self._arrival_s,
            scheduled_s=self._scheduled_s,
            first_token_s=finished_s if self._first_token_s is None else self._first_token_s,
            finished_s=finished_s,
            lane=self._lane,
            drafted_per_step=tuple(self.drafted),
            accepted_per_step=tuple(self.accepted),
            transfer_bytes=self.transfer_bytes,
        )

    def _named(self, entry: TokenLogprobs, token: int, count: int | None = None) -> dict[int, Logprob]:
        """Turn arrays of one position into records: the token itself, and the `count` most likely ones."""
        count = self.request.params.logprobs if count is None else count
        listed = {token: (float(entry.chosen), int(entry.rank))}
        for place in range(min(count or 0, len(entry.top_ids))):
            listed.setdefault(int(entry.top_ids[place]), (float(entry.top[place]), place + 1))
        return {
            token_id: Logprob(logprob=logprob, rank=rank, decoded_token=self._decode_token(token_id))
            for token_id, (logprob, rank) in listed.items()
        }


def _entry(logprobs: TokenLogprobs, *index: int) -> TokenLogprobs:
    return TokenLogprobs(
        chosen=logprobs.chosen[index],
        rank=logprobs.rank[index],
        top_ids=logprobs.top_ids[index],
        top=logprobs.top[index],
    )
