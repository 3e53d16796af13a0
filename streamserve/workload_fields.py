"""Fields of input lines: which exist, what they may hold, and what a wrong one is told. Used by `workload` alone."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from streamserve.sampling_params import SamplingParams

SAMPLING_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))
ALIASES = {"max_new_tokens": "max_tokens", "sampling_seed": "seed"}
SERVICE_FIELDS = frozenset({"user", "priority", "timeout_s"})  # who asks, how urgently, and for how long it waits
PROMPT_FIELDS = frozenset({"id", "prompt", "prompt_token_ids"}) | SERVICE_FIELDS
QUESTION_FIELDS = frozenset({"question_id", "category", "turns", "reference"})
BATCH_FIELDS = frozenset({"custom_id", "method", "url", "body"})
COMPLETIONS_URL, CHAT_URL = "/v1/completions", "/v1/chat/completions"

# Fields of OpenAI bodies that never change the answer, and those accepted only with a value that asks for nothing.
WITHOUT_EFFECT = frozenset(
    {"metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls", "store"}
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "structured_outputs": (),
}
MAX_SHOWN = 100  # characters of a wrong value that a message quotes
CHAT_ALIASES = ALIASES | {"max_completion_tokens": "max_tokens"}


def batch_body(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check the envelope of an OpenAI batch line; return its body."""
    unknown = without(value, BATCH_FIELDS)
    if unknown:
        raise ValueError(unknown_field(next(iter(unknown)), BATCH_FIELDS))
    if value.get("url") not in (COMPLETIONS_URL, CHAT_URL):
        raise ValueError(f"url must be {COMPLETIONS_URL} or {CHAT_URL}, got {shown(value.get('url'))}")
    if value.get("method") != "POST":
        raise ValueError(f"method must be POST, got {shown(value.get('method'))}")
    if not isinstance(value.get("body"), dict):
        raise ValueError(f"body must be an object, got {shown(value.get('body'))}")
    return value["body"]


def service(value: Mapping[str, Any]) -> dict[str, Any]:
    """Read who asks and how urgently, as fields of `Prompt`.

    Raises:
      ValueError: a value of a wrong type.
    """
    user, priority, timeout_s = (value.get(name) for name in ("user", "priority", "timeout_s"))
    if user is not None and not isinstance(user, str):
        raise ValueError(f"user must be a string, got {shown(user)}")
    if priority is not None and (not isinstance(priority, int) or isinstance(priority, bool)):
        raise ValueError(f"priority must be an integer, got {shown(priority)}")
    if timeout_s is not None and (not isinstance(timeout_s, (int, float)) or isinstance(timeout_s, bool)):
        raise ValueError(f"timeout_s must be a number of seconds, got {shown(timeout_s)}")
    if timeout_s is not None and not timeout_s > 0:
        raise ValueError(f"timeout_s must be positive, got {shown(timeout_s)}")
    return {"tenant": user or "", "priority": priority or 0, "timeout_s": timeout_s}


def without(value: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """Leave fields out."""
    return {name: item for name, item in value.items() if name not in names}


def without_neutral(body: Mapping[str, Any], own: frozenset[str]) -> dict[str, Any]:
    """Drop the fields of an OpenAI body that are its own or change nothing; refuse those that ask for more."""
    fields = {}
    for name, value in without(body, own | WITHOUT_EFFECT | SERVICE_FIELDS).items():
        if name not in NEUTRAL:
            fields[name] = value
        elif value is not None and value not in NEUTRAL[name] and not (name == "best_of" and value == body.get("n")):
            raise ValueError(f"{name} is not supported, got {shown(value)}")
    return fields


def chat_logprobs(body: Mapping[str, Any]) -> dict[str, int]:
    """Translate `logprobs` (a bool) and `top_logprobs` (a count) of chat bodies."""
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if wanted is not None and not isinstance(wanted, bool):
        raise ValueError(f"logprobs must be true or false in a chat body, got {shown(wanted)}")
    if not wanted and top:
        raise ValueError("top_logprobs needs logprobs to be true")
    return {"logprobs": 0 if top is None else top} if wanted else {}


def sampling_params(
    defaults: Mapping[str, Any],
    fields: Mapping[str, Any],
    aliases: Mapping[str, str],
    own: frozenset[str] = frozenset(),
) -> SamplingParams:
    """Put fields over defaults.

    Raises:
      ValueError: an unknown field, two names for one field, or a value out of range.
    """
    chosen = {}
    for given, value in fields.items():
        name = aliases.get(given, given)
        if name not in SAMPLING_FIELDS:
            raise ValueError(unknown_field(given, SAMPLING_FIELDS | own | aliases.keys()))
        if value is None:
            continue
        if name in chosen and chosen[name] != value:
            raise ValueError(f"{name} is given twice with different values")
        chosen[name] = value
    named_defaults = {aliases.get(name, name): value for name, value in defaults.items()}
    unknown = named_defaults.keys() - SAMPLING_FIELDS
    if unknown:
        raise ValueError(unknown_field(sorted(unknown)[0], SAMPLING_FIELDS))
    return SamplingParams(**(named_defaults | chosen))


def unknown_field(name: str, known: Iterable[str]) -> str:
    """Say that a field does not exist, and which ones are close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(names)}"
    return f"unknown field {shown(name)}; {hint}"


def text_of(name: str, value: Any) -> str:
    """Check a prompt that is text."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {shown(value)}")
    if not value:
        raise ValueError(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a surrogate pair, which is no text") from None
    return value


def shown(value: Any) -> str:
    """Return a value as messages quote it, cut where it is long."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def tokens_of(value: Any) -> tuple[int, ...]:
    """Check a prompt that is token ids; whether the model has them is the engine's to say."""
    if not isinstance(value, list):
        raise ValueError(f"prompt_token_ids must be a list of token ids, got {shown(value)}")
    if not value:
        raise ValueError("the prompt is empty")
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ValueError(f"prompt_token_ids must hold token ids, got {shown(token)}")
    return tuple(value)


def refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python's JSON reader would accept."""
    raise ValueError(f"{name} is no JSON number")
