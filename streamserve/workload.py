"""Input files of offline runs: JSON lines of four kinds, mixed freely, read one at a time.

Every line that is not blank becomes a `WorkItem` or a `BadLine`, never an exception: a bad line must not cost the rest
of the file. The kinds:

  prompt      {"prompt": str} or {"prompt_token_ids": [int, ...]}, with an optional "id" and sampling fields.
  question    {"question_id", "category"?, "turns": [str], "reference"?}, as Spec-Bench and EAGLE write them. Its turn
              is the prompt, as plain text. More than one turn is refused: later ones would need the earlier answers.
  completion  {"custom_id", "method", "url": "/v1/completions", "body"}, an OpenAI batch line.
  chat        the same for "/v1/chat/completions"; the messages go through the tokenizer's chat template.

Ids must differ over the whole file, whatever the kind. Questions are told apart by category and question_id, so that
the files of several benchmarks can be joined. A sampling field that is null or absent takes the run's default. It
knows nothing of engines, nor of how answers are written (`answers`).
"""

import dataclasses
import enum
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from streamserve.sampling_params import SamplingParams
from streamserve.types import Prompt
from streamserve.workload_fields import (
    ALIASES,
    BATCH_FIELDS,
    CHAT_ALIASES,
    CHAT_URL,
    COMPLETIONS_URL,
    PROMPT_FIELDS,
    QUESTION_FIELDS,
    batch_body,
    chat_logprobs,
    refuse_constant,
    sampling_params,
    service,
    shown,
    text_of,
    tokens_of,
    without,
    without_neutral,
)

RenderChat = Callable[[list[Mapping[str, Any]]], tuple[int, ...]]


class LineKind(enum.Enum):
    """Form of an input line, which decides the form of its answer."""

    PROMPT = "prompt"
    QUESTION = "question"
    COMPLETION = "completion"
    CHAT = "chat"
    BATCH = "batch"  # an OpenAI batch line whose url is neither of the two
    UNKNOWN = "unknown"  # not a JSON object


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a request came from, and what its answer must carry.

    Attributes:
      index: order among lines that are not blank, from 0.
      line_number: in the file, from 1.
      kind: form of the line.
      id: as the line gives it; None where it gives none.
      category: of a question.
      model: that an OpenAI body names.
    """

    index: int
    line_number: int
    kind: LineKind
    id: str | int | None = None
    category: str | None = None
    model: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkItem:
    """A line that is a request."""

    origin: Origin
    prompt: Prompt


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """A line that is none, and why."""

    origin: Origin
    message: str


class LineReader:
    """Parses lines; remembers only the ids that it has seen."""

    def __init__(self, *, defaults: Mapping[str, Any] | None = None, render_chat: RenderChat | None = None):
        """Prepare for one file.

        Args:
          defaults: sampling fields for requests that do not give them.
          render_chat: turns messages into token ids, with ValueError for those it cannot; None without a tokenizer.

        Raises:
          ValueError: the defaults name an unknown field, or one is out of range.
        """
        self._defaults = dict(defaults or {})
        self._render_chat = render_chat
        self._lines_of_ids: dict[str, int] = {}
        sampling_params(self._defaults, {}, ALIASES)

    def read(self, lines: Iterable[bytes]) -> Iterator[WorkItem | BadLine]:
        """Parse lines as they are pulled; blank ones are skipped.

        An id belongs to the first line that bears it, bad or not.
        """
        index = 0
        for line_number, line in enumerate(lines, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf") if line_number == 1 else line
            if content.strip():
                yield self._parse(content, Origin(index=index, line_number=line_number, kind=LineKind.UNKNOWN))
                index += 1

    def _parse(self, line: bytes, origin: Origin) -> WorkItem | BadLine:
        try:
            value = json.loads(line.decode("utf-8"), parse_constant=refuse_constant)
        except json.JSONDecodeError as error:  # its "line" would be that of this one line
            return BadLine(origin=origin, message=f"not valid JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            return BadLine(origin=origin, message=f"not valid JSON: {error}")
        if not isinstance(value, dict):
            return BadLine(origin=origin, message=f"a line must be a JSON object, got {type(value).__name__}")
        origin = _identify(value, origin)
        try:
            request_id = self._take_id(value, origin)
            text, token_ids, params = self._understand(value, origin.kind)
            asked = service(value.get("body", value))
        except ValueError as error:
            return BadLine(origin=origin, message=str(error))
        return WorkItem(
            origin=origin,
            prompt=Prompt(request_id=request_id, params=params, text=text, token_ids=token_ids, **asked),
        )

    def _take_id(self, value: Mapping[str, Any], origin: Origin) -> str:
        """Claim the line's id, or one made from its number."""
        name = {LineKind.PROMPT: "id", LineKind.QUESTION: "question_id"}.get(origin.kind, "custom_id")
        given = value.get(name)
        if given is not None and origin.id is None:
            raise ValueError(f"{name} must be a string or an integer, got {shown(given)}")
        if origin.id is None and origin.kind is not LineKind.PROMPT:
            raise ValueError(f"{name} is missing")
        key = f"line-{origin.line_number}" if origin.id is None else str(origin.id)
        if origin.category:
            key = f"{origin.category}/{key}"
        first = self._lines_of_ids.setdefault(key, origin.line_number)
        if first != origin.line_number:
            raise ValueError(f"duplicate id {key!r}: line {first} has it already")
        return key

    def _understand(
        self, value: Mapping[str, Any], kind: LineKind
    ) -> tuple[str | None, tuple[int, ...] | None, SamplingParams]:
        """Return text or token ids of the prompt, and the sampling parameters."""
        if kind is LineKind.PROMPT:
            return self._plain(value)
        if kind is LineKind.QUESTION:
            return self._question(value)
        body = batch_body(value)
        return self._completion(body) if kind is LineKind.COMPLETION else self._chat(body)

    def _plain(self, value: Mapping[str, Any]) -> tuple[str | None, tuple[int, ...] | None, SamplingParams]:
        params = sampling_params(self._defaults, without(value, PROMPT_FIELDS), ALIASES, PROMPT_FIELDS)
        text, token_ids = value.get("prompt"), value.get("prompt_token_ids")
        if (text is None) == (token_ids is None):
            raise ValueError("a line needs either prompt or prompt_token_ids")
        return (text_of("prompt", text), None, params) if token_ids is None else (None, tokens_of(token_ids), params)

    def _question(self, value: Mapping[str, Any]) -> tuple[str, None, SamplingParams]:
        params = sampling_params(self._defaults, without(value, QUESTION_FIELDS), ALIASES, QUESTION_FIELDS)
        turns = value.get("turns")
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"turns must be a list of one string, got {shown(turns)}")
        if len(turns) > 1:
            raise ValueError(f"turns holds {len(turns)} turns; only single-turn questions can be run offline")
        return text_of("turns[0]", turns[0]), None, params

    def _completion(self, body: Mapping[str, Any]) -> tuple[str | None, tuple[int, ...] | None, SamplingParams]:
        own = frozenset({"prompt", "model"})
        params = sampling_params(self._defaults, without_neutral(body, own), ALIASES, own)
        prompt = body.get("prompt")
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
            if len(prompt) > 1:
                raise ValueError(f"body.prompt holds {len(prompt)} prompts; give each a line of its own")
            prompt = prompt[0]
        if isinstance(prompt, list):
            return None, tokens_of(prompt), params
        return text_of("body.prompt", prompt), None, params

    def _chat(self, body: Mapping[str, Any]) -> tuple[None, tuple[int, ...], SamplingParams]:
        own = frozenset({"messages", "model", "logprobs", "top_logprobs"})
        fields = without_neutral(body, own) | chat_logprobs(body)
        params = sampling_params(self._defaults, fields, CHAT_ALIASES, own)
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ValueError("body.messages must be a list of at least one message")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"a message needs a role and a content, got {shown(message)}")
        if self._render_chat is None:
            raise ValueError("chat messages need a tokenizer; this run has none")
        return None, tokens_of(list(self._render_chat(messages))), params


def _identify(value: Mapping[str, Any], origin: Origin) -> Origin:
    """Tell the kind of a line and read its id, leniently: the answer needs them even when the line is bad."""
    if not BATCH_FIELDS.isdisjoint(value):
        kind, name = LineKind.BATCH, "custom_id"
        url = value.get("url")
        if isinstance(url, str):
            kind = {COMPLETIONS_URL: LineKind.COMPLETION, CHAT_URL: LineKind.CHAT}.get(url, kind)
    elif "question_id" in value or "turns" in value:
        kind, name = LineKind.QUESTION, "question_id"
    else:
        kind, name = LineKind.PROMPT, "id"
    given, category, body = value.get(name), value.get("category"), value.get("body")
    model = body.get("model") if isinstance(body, dict) else None
    return dataclasses.replace(
        origin,
        kind=kind,
        id=given if isinstance(given, (str, int)) and not isinstance(given, bool) else None,
        category=category if kind is LineKind.QUESTION and isinstance(category, str) else None,
        model=model if isinstance(model, str) else None,
    )
