"""One request on the host: collects what its rows emit and turns it into a `CompletionOutput`.

It lives from submission to end, through preemptions. It knows nothing of lanes or order. Stop strings end a request
here, since only the host sees text; stop tokens and lengths have ended it on the device already.
"""

from collections.abc import Callable

import numpy as np

from streamserve.lifecycle import Life
from streamserve.tokenizer import StopMatch, TextStream
from streamserve.types import (
    EMPTY_TOKEN,
    CompletionOutput,
    FinishCode,
    Job,
    Logprob,
    Request,
    RequestMetrics,
    StepOutput,
    TokenLogprobs,
)

MakeTextStream = Callable[[Request], TextStream]
DecodeToken = Callable[[int], str | None]


class Stamps:
    """When the loop saw a request pass a stage for the first time; None until then. Seconds of the loop's clock."""

    def __init__(self, arrival_s: float):
        self.arrival_s = arrival_s
        self.scheduled_s: float | None = None
        self.prefilled_s: float | None = None
        self.handed_off_s: float | None = None
        self.transferred_s: float | None = None
        self.inserted_s = arrival_s  # when it came into its slot, the latest
        self.token_s: list[float] = []  # of every tick that brought tokens

    def scheduled(self, now_s: float) -> None:
        """Note the first prefill call."""
        self.scheduled_s = now_s if self.scheduled_s is None else self.scheduled_s

    def prefilled(self, now_s: float) -> None:
        """Note the end of prefill."""
        self.prefilled_s = now_s if self.prefilled_s is None else self.prefilled_s

    def handed_off(self, now_s: float) -> None:
        """Note the dispatch of the hand-off."""
        self.handed_off_s = now_s if self.handed_off_s is None else self.handed_off_s

    def transferred(self, now_s: float) -> None:
        """Note the arrival on the decode mesh."""
        self.transferred_s = now_s if self.transferred_s is None else self.transferred_s


class RunningRequest:
    """A request and its output so far."""

    def __init__(self, request: Request, text: TextStream, decode_token: DecodeToken, *, arrival_s: float):
        """Begin an empty output.

        Args:
          request: what is generated.
          text: detokenizes it.
          decode_token: text of a single token, for log-probabilities.
          arrival_s: clock reading when the scheduler took it.
        """
        self.request = request
        self.life = Life(request.request_id)
        self.stamps = Stamps(arrival_s)
        self.prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
        self.lane = -1
        self.cached_tokens = 0
        self.num_preemptions = 0
        self.num_charged = 0  # tokens that its tenant has been charged for
        self.transfer_pages = 0
        self.transfer_bytes = 0
        self.invalid = False  # the model gave a number that is not finite
        self._drafted: list[int] = []
        self._accepted: list[int] = []
        self._text, self._decode_token = text, decode_token
        self._tokens: list[int] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._match: StopMatch | None = None

    @property
    def request_id(self) -> str:
        """Its id."""
        return self.request.request_id

    @property
    def rank(self) -> tuple[int, float]:
        """What orders requests that compete for pages: the lower comes first."""
        return self.request.priority, self.stamps.arrival_s

    @property
    def num_tokens(self) -> int:
        """Tokens emitted so far."""
        return len(self._tokens)

    @property
    def num_positions(self) -> int:
        """Tokens of prompt and output so far."""
        return len(self.request.prompt_token_ids) + len(self._tokens)

    @property
    def max_positions(self) -> int:
        """Most tokens of prompt and output."""
        return len(self.request.prompt_token_ids) + self.request.params.max_tokens

    def job(self) -> Job:
        """Say from where it goes on."""
        return Job(request=self.request, output=tuple(self._tokens))

    def take(self, output: StepOutput, slot: int, now_s: float) -> bool:
        """Take over what row `slot` emitted in one tick.

        Returns:
          Whether the request has ended.
        """
        columns = np.flatnonzero(output.tokens[slot] != EMPTY_TOKEN)
        tokens = [int(token) for token in output.tokens[slot, columns]]
        ran = output.drafted[slot] != EMPTY_TOKEN
        self._drafted += [int(count) for count in output.drafted[slot, ran]]
        self._accepted += [int(count) for count in output.accepted[slot, ran]]
        self._tokens += tokens
        if tokens:
            self.stamps.token_s.append(now_s)
        if output.logprobs is not None and self.request.params.logprobs is not None:
            logprobs = output.logprobs
            entries = (_entry(logprobs, slot, int(column)) for column in columns)
            self._logprobs += [self._named(entry, token) for entry, token in zip(entries, tokens, strict=True)]
        self._match = self._text.push(tokens) if tokens else None
        self.invalid = int(output.finish[slot]) == FinishCode.INVALID
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
        """Give times and counts of an answered request; `finished_s` is a clock reading."""
        stamps = self.stamps
        passed = (stamps.scheduled_s, stamps.prefilled_s, stamps.handed_off_s, stamps.transferred_s)
        scheduled_s, prefilled_s, handed_off_s, transferred_s = (
            finished_s if stamp is None else stamp for stamp in passed
        )
        return RequestMetrics(
            arrival_s=stamps.arrival_s,
            scheduled_s=scheduled_s,
            prefilled_s=prefilled_s,
            # It is dispatched ahead, behind the prompt's last call. Where nothing moves, nothing takes time.
            handed_off_s=max(prefilled_s, handed_off_s) if self.transfer_pages else transferred_s,
            transferred_s=transferred_s,
            first_token_s=stamps.token_s[0] if stamps.token_s else finished_s,
            finished_s=finished_s,
            itls_s=tuple(float(gap) for gap in np.diff(stamps.token_s)),
            lane=self.lane,
            cached_tokens=self.cached_tokens,
            num_preemptions=self.num_preemptions,
            drafted_per_step=tuple(self._drafted),
            accepted_per_step=tuple(self._accepted),
            transfer_pages=self.transfer_pages,
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
