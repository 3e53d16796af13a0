"""Output lines of offline runs: a finished request in the form that its input line asked for.

OpenAI batch lines are answered as OpenAI's batch endpoint does, all others as
`{"id", "outputs": [{"text", "token_ids", "finish_reason", ...}], "metrics": {...}}`. A line that was refused or failed
gets an answer too, with `error` set. JSON objects exist at this door only.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from streamserve.types import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from streamserve.workload import BadLine, LineKind, Origin

JsonDict = dict[str, Any]
BATCH_KINDS = (LineKind.COMPLETION, LineKind.CHAT, LineKind.BATCH)
INVALID, FAILED = "invalid_request", "request_failed"  # refused when read; refused or failed by the engine


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """What answers say besides the output itself.

    Attributes:
      model_name: named in OpenAI answers to lines that name no model.
      num_spec_tokens: draft depth of the engine; 0 leaves speculation out of the metrics.
      created_s: time stamp of OpenAI answers, seconds since 1970.
      synthetic: what acceptance was drawn from where it is synthetic, so that no output passes for the target's.
    """

    model_name: str
    num_spec_tokens: int
    created_s: int
    synthetic: str | None = None


def answer(origin: Origin, output: RequestOutput, style: AnswerFormat) -> JsonDict:
    """Format a request that the engine is done with."""
    if output.error is not None:
        return _error(origin, FAILED, output.error)
    if origin.kind not in BATCH_KINDS:
        return _plain(origin, output, style)
    body = _chat(origin, output) if origin.kind is LineKind.CHAT else _completion(origin, output)
    body |= {"created": style.created_s, "model": origin.model or style.model_name, "usage": _usage(output)}
    if style.num_spec_tokens:
        body["metrics"] = {"speculative_decoding": speculation(output.metrics, style)}
    return _batch(origin, {"status_code": 200, "request_id": f"req_{origin.line_number}", "body": body}, None)


def refusal(bad: BadLine) -> JsonDict:
    """Format a line that never became a request."""
    return _error(bad.origin, INVALID, bad.message)


def request_metrics(output: RequestOutput) -> JsonDict:
    """Times of a request in milliseconds, what it cost, and where it ran.

    With `n` > 1 each stage ends when the first completion leaves it, and the last one when all have, so that stages
    add up to `e2el_ms`. `itls_ms` lists the gaps of all completions, one completion after the other; counts are sums.
    """
    if not output.metrics:
        return {}
    arrival_s = output.metrics[0].arrival_s
    scheduled_s = min(times.scheduled_s for times in output.metrics)
    prefilled_s = min(times.prefilled_s for times in output.metrics)
    handed_off_s = min(times.handed_off_s for times in output.metrics)
    transferred_s = min(times.transferred_s for times in output.metrics)
    first_s = min(times.first_token_s for times in output.metrics)
    end_s = max(times.finished_s for times in output.metrics)
    itls_ms = [round(1000 * gap_s, 3) for times in output.metrics for gap_s in times.itls_s]
    tokens = sum(len(completion.token_ids) for completion in output.outputs)
    result: JsonDict = {
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_output_tokens": tokens,
        "cached_tokens": sum(times.cached_tokens for times in output.metrics),
        "queue_ms": 1000 * (scheduled_s - arrival_s),
        "prefill_ms": 1000 * (prefilled_s - scheduled_s),
        "page_wait_ms": 1000 * (handed_off_s - prefilled_s),
        "transfer_ms": 1000 * (transferred_s - handed_off_s),
        "decode_ms": 1000 * (end_s - transferred_s),
        "ttft_ms": 1000 * (first_s - arrival_s),
        "e2el_ms": 1000 * (end_s - arrival_s),
        "lanes": [times.lane for times in output.metrics],
        "num_preemptions": sum(times.num_preemptions for times in output.metrics),
        "kv_transfer_pages": sum(times.transfer_pages for times in output.metrics),
        "kv_transfer_bytes": sum(times.transfer_bytes for times in output.metrics),
    }
    if itls_ms:
        result["itls_ms"] = itls_ms
    if len(output.outputs) == 1 and tokens > 1:
        result["tpot_ms"] = 1000 * (end_s - first_s) / (tokens - 1)
    return result


def speculation(metrics: Sequence[RequestMetrics], style: AnswerFormat) -> JsonDict:
    """Speculation of one request, in the fields of vLLM's `metrics.speculative_decoding`. Needs a depth above 0."""
    num_spec_tokens = style.num_spec_tokens
    steps = [
        step
        for times in metrics
        for step in zip(times.drafted_per_step, times.accepted_per_step, strict=True)
        if step[0] > 0
    ]
    drafted, accepted = sum(step[0] for step in steps), sum(step[1] for step in steps)
    histogram = [0] * (num_spec_tokens + 1)
    for _, count in steps:
        histogram[count] += 1
    result: JsonDict = {
        "num_spec_steps": len(steps),
        "num_draft_tokens": drafted,
        "num_accepted_draft_tokens": accepted,
        "num_spec_tokens": num_spec_tokens,
        "acceptance_histogram": histogram,
        "per_step_drafted": [step[0] for step in steps],
        "per_step_accepted": [step[1] for step in steps],
    }
    if steps:
        result |= {"mean_acceptance_length": 1 + accepted / len(steps), "draft_acceptance_rate": accepted / drafted}
    if style.synthetic is not None:
        result["synthetic_acceptance"] = style.synthetic
    return result


def _plain(origin: Origin, output: RequestOutput, style: AnswerFormat) -> JsonDict:
    outputs = []
    for completion in output.outputs:
        item: JsonDict = {
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        if completion.stop_reason is not None:
            item["stop_reason"] = completion.stop_reason
        if completion.logprobs is not None:
            item["cumulative_logprob"] = completion.cumulative_logprob
            item["logprobs"] = [_position(position) for position in completion.logprobs]
        outputs.append(item)
    result = _identity(origin, output.request_id) | {"outputs": outputs}
    if output.prompt_logprobs is not None:
        result["prompt_logprobs"] = [
            None if position is None else _position(position) for position in output.prompt_logprobs
        ]
    metrics = request_metrics(output)
    if style.num_spec_tokens:
        metrics["speculative_decoding"] = speculation(output.metrics, style)
    return result | {"metrics": metrics}


def _position(position: Mapping[int, Logprob]) -> JsonDict:
    """Log-probabilities at one position, token id to record, as vLLM's offline outputs have them."""
    return {str(token_id): dataclasses.asdict(item) for token_id, item in position.items()}


def _completion(origin: Origin, output: RequestOutput) -> JsonDict:
    choices = []
    for completion in output.outputs:
        choices.append(_choice(completion, {"text": completion.text}, _completion_logprobs(completion)))
        if output.prompt_logprobs is not None:
            choices[-1]["prompt_logprobs"] = [
                None if position is None else _position(position) for position in output.prompt_logprobs
            ]
    return {"id": f"cmpl-{origin.line_number}", "object": "text_completion", "choices": choices}


def _chat(origin: Origin, output: RequestOutput) -> JsonDict:
    choices = [
        _choice(completion, {"message": {"role": "assistant", "content": completion.text}}, _chat_logprobs(completion))
        for completion in output.outputs
    ]
    return {"id": f"chatcmpl-{origin.line_number}", "object": "chat.completion", "choices": choices}


def _choice(completion: CompletionOutput, content: JsonDict, logprobs: JsonDict | None) -> JsonDict:
    return {
        "index": completion.index,
        **content,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _completion_logprobs(completion: CompletionOutput) -> JsonDict | None:
    """Log-probabilities as /v1/completions gives them. Offsets count characters of the single tokens' texts."""
    if completion.logprobs is None:
        return None
    tokens, offsets, offset = [], [], 0
    for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True):
        tokens.append(_name(token_id, position[token_id]))
        offsets.append(offset)
        offset += len(tokens[-1])
    return {
        "tokens": tokens,
        "token_logprobs": [
            position[token_id].logprob
            for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True)
        ],
        "top_logprobs": [
            {_name(token_id, item): item.logprob for token_id, item in position.items()}
            for position in completion.logprobs
        ],
        "text_offset": offsets,
    }


def _chat_logprobs(completion: CompletionOutput) -> JsonDict | None:
    """Log-probabilities as /v1/chat/completions gives them."""
    if completion.logprobs is None:
        return None
    content = []
    for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True):
        listed = [_chat_token(other, item) for other, item in position.items()]
        content.append(_chat_token(token_id, position[token_id]) | {"top_logprobs": listed})
    return {"content": content}


def _chat_token(token_id: int, item: Logprob) -> JsonDict:
    name = _name(token_id, item)
    return {"token": name, "logprob": item.logprob, "bytes": list(name.encode("utf-8"))}


def _name(token_id: int, item: Logprob) -> str:
    return f"token_id:{token_id}" if item.decoded_token is None else item.decoded_token


def _usage(output: RequestOutput) -> JsonDict:
    prompt, completion = len(output.prompt_token_ids), sum(len(item.token_ids) for item in output.outputs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _error(origin: Origin, code: str, message: str) -> JsonDict:
    if origin.kind not in BATCH_KINDS:
        identity = _identity(origin, f"line-{origin.line_number}")
        return identity | {"outputs": [], "error": {"line": origin.line_number, "message": message}}
    error = {"code": code, "message": message}
    if code == FAILED:
        return _batch(origin, None, error)
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return _batch(origin, {"status_code": 400, "request_id": f"req_{origin.line_number}", "body": body}, error)


def _batch(origin: Origin, response: JsonDict | None, error: JsonDict | None) -> JsonDict:
    return {
        "id": f"batch_req_{origin.line_number}",
        "custom_id": origin.id,
        "response": response,
        "error": error,
    }


def _identity(origin: Origin, made_up: str) -> JsonDict:
    """The id of a line, and the category of a question, whose number alone may occur in several benchmarks."""
    identity: JsonDict = {"id": made_up if origin.id is None else origin.id}
    return identity if origin.kind is not LineKind.QUESTION else identity | {"category": origin.category}
