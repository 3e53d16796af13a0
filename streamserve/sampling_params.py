"""How one request is sampled: the host record that users fill in.

Names and defaults are those of vLLM's `SamplingParams`, so that scripts move over unchanged. The record knows nothing
of devices; `streamserve.sampling` turns a batch of them into arrays.
"""

import dataclasses
import math
from collections.abc import Mapping

MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    It has more than fifteen fields because it is the vocabulary that users of LLM engines already know.

    Attributes:
      n: number of independent completions of the prompt.
      presence_penalty: subtracted from the logit of every token that the output already holds, in [-2, 2].
      frequency_penalty: subtracted once per occurrence in the output, in [-2, 2].
      repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output, > 0.
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_p: nucleus mass in (0, 1]; 1 keeps all.
      top_k: number of most likely tokens to keep; 0 or -1 keeps all.
      min_p: drops tokens less likely than `min_p` times the most likely one, in [0, 1].
      seed: makes the request reproducible on its own; None derives it from the engine's seed and the request's order.
      stop: strings that end the output; removed from it unless `include_stop_str_in_output`.
      stop_token_ids: token ids that end the output, kept in `token_ids`.
      ignore_eos: go on after the end-of-sequence token.
      max_tokens: most tokens to emit, at least 1.
      min_tokens: end-of-sequence and stop ids are forbidden before so many tokens.
      logprobs: log-probabilities of so many top tokens per emitted token, beside its own; None for none.
      prompt_logprobs: the same for the tokens of the prompt.
      skip_special_tokens: leave special tokens out of `text`.
      include_stop_str_in_output: keep the matched stop string in `text`.
      logit_bias: added to the logits of single token ids, each in [-100, 100].
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        """Normalise `stop` and `top_k`, then check every range.

        Raises:
          ValueError: a field has the wrong type or is out of range; the message names it and its value.
        """
        object.__setattr__(self, "stop", _as_tuple("stop", self.stop, str))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids, int))
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _as_bias(self.logit_bias))
        if any(not text for text in self.stop):
            raise ValueError("stop must not hold an empty string")
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        _check_int("n", self.n, 1)
        _check_int("top_k", self.top_k, 0)
        _check_int("max_tokens", self.max_tokens, 1)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _check_float("temperature", self.temperature, 0.0, math.inf)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        for name in ("seed", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_SEED)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken instead of a sample."""
        return self.temperature == 0.0


def _as_tuple(name: str, value: object, kind: type) -> tuple:
    """Turn None, one item or a sequence of items of `kind` into a tuple."""
    if value is None:
        return ()
    items = (value,) if isinstance(value, kind) else value
    if not isinstance(items, (list, tuple)):
        raise ValueError(f"{name} must be a list of {kind.__name__}, got {value!r}")
    for item in items:
        if not isinstance(item, kind) or isinstance(item, bool):
            raise ValueError(f"{name} must hold {kind.__name__} only, got {item!r}")
        if isinstance(item, int) and item < 0:
            raise ValueError(f"{name} must not be negative, got {item}")
    return tuple(items)


def _as_bias(value: object) -> dict[int, float]:
    """Check a logit bias; JSON gives its token ids as strings."""
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, got {value!r}")
    bias = {}
    for token, amount in value.items():
        try:
            token_id = int(token)
        except (TypeError, ValueError):
            raise ValueError(f"logit_bias must map token ids to numbers, got the key {token!r}") from None
        _check_int("logit_bias token id", token_id, 0)
        _check_float(f"logit_bias of token {token_id}", amount, -100.0, 100.0)
        bias[token_id] = float(amount)
    return bias


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def _check_float(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if value < low or value > high or (open_low and value == low):
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low}, {high}], got {value}")
