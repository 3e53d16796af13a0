"""The exactness audit: every greedy answer decoded again without speculation, and where the two differ.

Greedy output of a pass that is K + 1 wide can differ from that of a pass of one by a rounding. So an answer is decoded
twice more: by the (K + 1)-wide program that drafts nothing, and by the one-wide program. The audit measures; it does
not judge: a divergence where the two best tokens lie within rounding of each other is no error of speculation.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from streamserve.types import CompletionOutput, Prompt, RequestOutput


class Engine(Protocol):
    """What the audit needs of `streamserve.LLM`."""

    def pin_depth(self, depth: int | None, /, *, tier: int | None = None) -> None:
        """Decode at one depth, whatever the policy says."""
        ...

    stream: Callable[[Iterator[Prompt]], Iterator[RequestOutput]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The first token of a completion that differs from plain decoding.

    Attributes:
      request_id: of the prompt.
      index: of the completion.
      position: in the output.
      got: token of the audited run; None where it had ended.
      plain: token of one-wide plain decoding; None where it had ended.
      margin: difference of the two largest log-probabilities there, in one-wide decoding; None where it had ended.
      wide_margin: the same in (K + 1)-wide decoding, as long as that had the same tokens before.
    """

    request_id: str
    index: int
    position: int
    got: int | None
    plain: int | None
    margin: float | None
    wide_margin: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What an audit found.

    Attributes:
      completions: audited ones: greedy and answered.
      left_out: answered completions that are sampled; under them only distributions are comparable.
      tokens: of the audited completions.
      identical: completions with the tokens of one-wide plain decoding.
      wide_identical: the same for (K + 1)-wide plain decoding, which isolates the width from the speculation.
      depth: K of the wide program.
      largest_logprob_difference: over all tokens listed by both plain runs, as far as their outputs agree.
      divergences: of the audited run from one-wide plain decoding.
    """

    completions: int
    left_out: int
    tokens: int
    identical: int
    wide_identical: int
    depth: int
    largest_logprob_difference: float
    divergences: tuple[Divergence, ...]

    def __str__(self) -> str:
        """Say it in one line."""
        exact = f"{self.identical} of {self.completions} greedy completions have the tokens of plain decoding"
        wide = f"{self.wide_identical} without speculation at the same width of {self.depth + 1}"
        margins = [one.margin for one in self.divergences if one.margin is not None]
        told = f"; largest top-2 margin at a divergence {max(margins):.2e}" if margins else ""
        return f"{exact} ({wide}; log-probabilities differ by up to {self.largest_logprob_difference:.2e}{told})"


def audit(engine: Engine, answered: Sequence[tuple[Prompt, RequestOutput]], *, depth: int) -> AuditReport:
    """Decode every greedy answer again, and compare.

    Args:
      engine: compiled for depths 0 and `depth`.
      answered: prompts and what was answered.
      depth: K of the widest program.
    """
    greedy = [(prompt, output) for prompt, output in answered if not output.error and prompt.params.temperature == 0]
    prompts = [_with_logprobs(prompt) for prompt, _ in greedy]
    try:
        engine.pin_depth(0, tier=depth)
        wide = _by_id(engine.stream(iter(prompts)))
        engine.pin_depth(0)
        plain = _by_id(engine.stream(iter(prompts)))
    finally:
        engine.pin_depth(None)
    divergences: list[Divergence] = []
    identical = wide_identical = tokens = 0
    largest = 0.0
    for _, output in greedy:
        triples = zip(output.outputs, wide[output.request_id].outputs, plain[output.request_id].outputs, strict=True)
        for got, by_wide, by_one in triples:
            tokens += len(got.token_ids)
            wide_identical += by_wide.token_ids == by_one.token_ids
            largest = max(largest, _largest_difference(by_wide, by_one))
            if got.token_ids == by_one.token_ids:
                identical += 1
            else:
                divergences.append(_divergence(output.request_id, got, by_wide, by_one))
    completions = sum(len(output.outputs) for _, output in greedy)
    return AuditReport(
        completions=completions,
        left_out=sum(len(output.outputs) for _, output in answered if not output.error) - completions,
        tokens=tokens,
        identical=identical,
        wide_identical=wide_identical,
        depth=depth,
        largest_logprob_difference=largest,
        divergences=tuple(divergences),
    )


def _with_logprobs(prompt: Prompt) -> Prompt:
    params = dataclasses.replace(prompt.params, logprobs=max(2, prompt.params.logprobs or 0))
    return dataclasses.replace(prompt, params=params, timeout_s=None)


def _by_id(outputs: Iterable[RequestOutput]) -> dict[str, RequestOutput]:
    done = {}
    for output in outputs:
        if output.error:
            raise RuntimeError(f"the audit could not decode {output.request_id} again: {output.error}")
        done[output.request_id] = output
    return done


def _largest_difference(one: CompletionOutput, other: CompletionOutput) -> float:
    """Compare log-probabilities listed by both, up to the first token that differs, that position included."""
    assert one.logprobs is not None, "the audit asks for them"
    assert other.logprobs is not None, "the audit asks for them"
    until = _first_difference(one.token_ids, other.token_ids) + 1
    return max(
        (
            abs(mine[token].logprob - its[token].logprob)
            for mine, its in zip(one.logprobs[:until], other.logprobs[:until], strict=False)
            for token in mine.keys() & its.keys()
        ),
        default=0.0,
    )


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Place of the first token that differs, or the length of the shorter."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _divergence(
    request_id: str, got: CompletionOutput, by_wide: CompletionOutput, by_one: CompletionOutput
) -> Divergence:
    position = _first_difference(got.token_ids, by_one.token_ids)
    same_so_far = by_wide.token_ids[:position] == by_one.token_ids[:position]
    return Divergence(
        request_id=request_id,
        index=got.index,
        position=position,
        got=_token(got, position),
        plain=_token(by_one, position),
        margin=_margin(by_one, position),
        wide_margin=_margin(by_wide, position) if same_so_far else None,
    )


def _token(completion: CompletionOutput, position: int) -> int | None:
    return completion.token_ids[position] if position < len(completion.token_ids) else None


def _margin(completion: CompletionOutput, position: int) -> float | None:
    """Difference of the two largest log-probabilities at a position."""
    if completion.logprobs is None or position >= len(completion.logprobs):
        return None
    first, second, *_ = sorted((entry.logprob for entry in completion.logprobs[position].values()), reverse=True)
    return first - second
