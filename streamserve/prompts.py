"""From prompts to requests and from ends to outputs: what the doors of the engine have in common.

Owns what a prompt may look like, its checks against the engine's limits, and the split of a prompt into its `n`
completions, until the last of them is in. Knows no device and no lane.
"""

import dataclasses
import hashlib
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from streamserve.config import PipeServeConfig
from streamserve.ending import Finished, Refused
from streamserve.sampling_params import SamplingParams
from streamserve.tokenizer import Tokenizer
from streamserve.types import Prompt, Request, RequestOutput

PromptLike = str | Sequence[int] | Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What an engine can serve.

    Attributes:
      max_model_len: most tokens of prompt and output together.
      vocab_size: tokens that the model knows.
      eos_ids: tokens that end an output unless a request ignores them.
      seed: of requests that bring none of their own.
      pipeserve: widths that the programs were compiled for.
    """

    max_model_len: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    seed: int
    pipeserve: PipeServeConfig


class OpenPrompt:
    """A prompt whose completions are not all in."""

    def __init__(self, prompt: Prompt, token_ids: tuple[int, ...], *, expected: int):
        self.prompt, self.token_ids, self.expected = prompt, token_ids, expected
        self._ends: dict[int, Finished] = {}

    def take(self, finished: Finished) -> RequestOutput | None:
        """Take the end of a completion; gives the output when it was the last."""
        self._ends[int(finished.request_id.rpartition(".")[2])] = finished
        if len(self._ends) < self.expected:
            return None
        ends = [self._ends[index] for index in sorted(self._ends)]
        error = next((end.error for end in ends if end.error is not None), None)
        done = [] if error is not None else ends
        return RequestOutput(
            request_id=self.prompt.request_id,
            prompt=self.prompt.text,
            prompt_token_ids=self.token_ids,
            prompt_logprobs=done[0].prompt_logprobs if done else None,
            outputs=tuple(
                dataclasses.replace(end.completion, index=index)
                for index, end in enumerate(done)
                if end.completion is not None
            ),
            finished=True,
            metrics=tuple(end.metrics for end in done if end.metrics is not None),
            error=error,
        )


class PromptReader:
    """Turns prompts into requests that an engine can serve."""

    def __init__(self, tokenizer: Tokenizer | None, limits: EngineLimits):
        self._tokenizer, self._limits = tokenizer, limits

    def requests(self, prompt: Prompt, order: int) -> tuple[OpenPrompt, list[Request | Refused]]:
        """Split a prompt into one request a completion; their ids are `order.index`.

        Args:
          prompt: tokenized or not.
          order: place in the engine's input, from which its random streams derive.

        Returns:
          The prompt, open, and its requests; a refusal where it cannot be served.
        """
        try:
            tokens = self.tokens(prompt)
        except ValueError as error:
            return OpenPrompt(prompt, (), expected=1), [Refused(f"{order}.0", str(error))]
        room = self._limits.max_model_len - len(tokens)
        params = dataclasses.replace(
            prompt.params,
            max_tokens=min(prompt.params.max_tokens, room),
            min_tokens=min(prompt.params.min_tokens, room),
        )
        requests: list[Request | Refused] = [
            Request(
                request_id=f"{order}.{index}",
                prompt_token_ids=tokens,
                params=params,
                seed=_derived_seed(self._limits.seed, order, index, params.seed),
                stop_ids=self._stop_ids(params),
                priority=prompt.priority,
                tenant=prompt.tenant,
                timeout_s=prompt.timeout_s,
            )
            for index in range(params.n)
        ]
        return OpenPrompt(prompt, tokens, expected=params.n), requests

    def read(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Prompt]:
        """Accept one prompt or many as users of other engines give them; they are numbered and tokenized.

        Raises:
          ValueError: one of them or its parameters cannot be served.
        """
        items: list[Any] = [prompts] if is_one_prompt(prompts) else list(prompts)
        several = isinstance(sampling_params, Sequence)
        params = list(sampling_params) if several else [sampling_params or SamplingParams()] * len(items)
        if len(params) != len(items):
            raise ValueError(f"{len(items)} prompts but {len(params)} sampling parameters")
        ready = []
        for index, (item, one) in enumerate(zip(items, params, strict=True)):
            try:
                prompt = as_prompt(str(index), item, one)
                ready.append(dataclasses.replace(prompt, token_ids=self.tokens(prompt)))
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from None
        return ready

    def tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """Tokenize a prompt and check that it can be served.

        Raises:
          ValueError: it cannot; the message says why.
        """
        tokens, limits = prompt.token_ids, self._limits
        if tokens is None:
            if self._tokenizer is None:
                raise ValueError("the engine has no tokenizer (skip_tokenizer_init); give prompt_token_ids")
            if prompt.text is None:
                raise ValueError("a prompt needs text or token ids")
            tokens = self._tokenizer.encode(prompt.text)
        if not tokens:
            raise ValueError("the prompt is empty")
        if prompt.timeout_s is not None and not prompt.timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {prompt.timeout_s}")
        if len(tokens) >= limits.max_model_len:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens; with at least one token of output the model takes at most "
                f"{limits.max_model_len - 1} (max_model_len is {limits.max_model_len})"
            )
        params, widths = prompt.params, limits.pipeserve
        named = {"prompt token": tokens, "stop_token_ids": params.stop_token_ids, "logit_bias": params.logit_bias or ()}
        for name, ids in named.items():
            wrong = next((token for token in ids if not 0 <= token < limits.vocab_size), None)
            if wrong is not None:
                raise ValueError(f"{name} {wrong} is outside the vocabulary of {limits.vocab_size}")
        for name, count, room in (
            ("stop_token_ids and end-of-sequence ids", len(self._stop_ids(params)), widths.max_stop_ids),
            ("entries of logit_bias", len(params.logit_bias or ()), widths.max_logit_bias),
        ):
            if count > room:
                raise ValueError(f"{count} {name}, but the engine is configured for at most {room}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > widths.max_logprobs:
                raise ValueError(
                    f"{name}={getattr(params, name)} exceeds the engine's max_logprobs={widths.max_logprobs}"
                )
        if params.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer (skip_tokenizer_init is set); use stop_token_ids")
        return tuple(tokens)

    def _stop_ids(self, params: SamplingParams) -> tuple[int, ...]:
        """Token ids that end a request."""
        return tuple(dict.fromkeys((*params.stop_token_ids, *(() if params.ignore_eos else self._limits.eos_ids))))


class OpenPrompts:
    """The prompts of a stream that have been pulled and not been answered, by their place in the engine's input."""

    def __init__(self, reader: PromptReader):
        self._reader = reader
        self._num_prompts = 0
        self._opened: dict[str, OpenPrompt] = {}

    def requests(self, prompts: Iterable[Prompt]) -> Iterator[Request | Refused]:
        """Turn prompts into requests, one a completion, and keep them open."""
        for prompt in prompts:
            order = self._num_prompts
            self._num_prompts += 1
            self._opened[str(order)], requests = self._reader.requests(prompt, order)
            yield from requests

    def outputs(self, ends: Iterable[Finished]) -> Iterator[RequestOutput]:
        """Gather the completions of each prompt; those of an earlier stream that was given up are forgotten.

        They are when the first end comes, not before: a stream that is refused, since another runs, must not take it.
        """
        first, is_first = self._num_prompts, True
        for finished in ends:
            if is_first:
                self._opened = {order: entry for order, entry in self._opened.items() if int(order) >= first}
                is_first = False
            order = finished.request_id.partition(".")[0]
            output = self._opened[order].take(finished)
            if output is not None:
                del self._opened[order]
                yield output

    def request_ids(self, request_id: str) -> list[str]:
        """List the requests of the open prompts that a caller has given an id."""
        return [
            f"{order}.{index}"
            for order, entry in self._opened.items()
            if entry.prompt.request_id == request_id
            for index in range(entry.expected)
        ]


def is_one_prompt(prompts: Any) -> bool:
    """Whether a caller gave a single prompt."""
    if isinstance(prompts, (str, Mapping)):
        return True
    return len(prompts) > 0 and all(isinstance(item, numbers.Integral) for item in prompts)


def as_prompt(request_id: str, item: PromptLike, params: SamplingParams) -> Prompt:
    """Accept the forms that users of other engines know."""
    if isinstance(item, str):
        return Prompt(request_id=request_id, params=params, text=item)
    if isinstance(item, Mapping):
        unknown = set(item) - {"prompt", "prompt_token_ids"}
        if unknown or not item:
            raise ValueError(f"a prompt mapping holds 'prompt' or 'prompt_token_ids', got {sorted(item)}")
        if not isinstance(item.get("prompt", ""), str):
            raise ValueError(f"'prompt' must be a string, got {item['prompt']!r}")
        tokens = item.get("prompt_token_ids")
        return Prompt(
            request_id=request_id,
            params=params,
            text=item.get("prompt"),
            token_ids=None if tokens is None else tuple(int(token) for token in tokens),
        )
    return Prompt(request_id=request_id, params=params, token_ids=tuple(int(token) for token in item))


def _derived_seed(engine_seed: int, order: int, index: int, own: int | None) -> int:
    """Give completion `index` of a prompt its own random stream; no two origins share one.

    A request with a seed of its own depends on that alone, others on the engine's seed and their place in the input.
    """
    name = f"engine {engine_seed} {order} {index}" if own is None else f"request {own} {index}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
