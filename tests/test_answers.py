"""Output lines in the form that the input line asked for."""

import json

import pytest

from streamserve.answers import AnswerFormat, answer, refusal, request_metrics, speculation
from streamserve.types import Logprob
from streamserve.workload import BadLine, LineKind, Origin
from tests import fakes

STYLE = AnswerFormat(model_name="bundled:target", num_spec_tokens=3, created_s=1_700_000_000)
LOGPROBS = tuple({token: Logprob(logprob=-0.5, rank=1, decoded_token=f"t{token}")} for token in (5, 6, 7))


def origin(kind, **fields):
    return Origin(**{"index": 0, "line_number": 4, "kind": kind, "id": "a", **fields})


def test_a_plain_line_gets_text_tokens_and_metrics():
    output = fakes.make_output(text="fine", drafted=(3, 0, 2), accepted=(3, 0, 1))
    line = answer(origin(LineKind.PROMPT), output, STYLE)
    assert line["id"] == "a"
    assert line["outputs"] == [{"text": "fine", "token_ids": [5, 6, 7], "finish_reason": "stop"}]
    assert line["metrics"]["ttft_ms"] == pytest.approx(100)
    assert line["metrics"]["tpot_ms"] == pytest.approx(100)
    assert line["metrics"]["speculative_decoding"]["num_spec_steps"] == 2
    assert json.loads(json.dumps(line)) == line


def test_a_question_keeps_number_and_category():
    line = answer(origin(LineKind.QUESTION, id=0, category="math"), fakes.make_output(), STYLE)
    assert (line["id"], line["category"]) == (0, "math")


def test_a_plain_line_without_an_id_is_named_by_its_number():
    assert answer(origin(LineKind.PROMPT, id=None), fakes.make_output("line-4"), STYLE)["id"] == "line-4"


def test_log_probabilities_appear_when_asked_for():
    line = answer(
        origin(LineKind.PROMPT), fakes.make_output(logprobs=LOGPROBS, cumulative_logprob=-1.5, stop_reason=7), STYLE
    )
    assert line["outputs"][0]["logprobs"][0] == {"5": {"logprob": -0.5, "rank": 1, "decoded_token": "t5"}}
    assert (line["outputs"][0]["cumulative_logprob"], line["outputs"][0]["stop_reason"]) == (-1.5, 7)


def test_a_completion_line_is_answered_as_openai_does():
    output = fakes.make_output(text="fine", drafted=(3,), accepted=(1,), logprobs=LOGPROBS)
    line = answer(origin(LineKind.COMPLETION), output, STYLE)
    assert (line["custom_id"], line["error"]) == ("a", None)
    assert line["response"]["status_code"] == 200
    body = line["response"]["body"]
    assert (body["object"], body["model"], body["created"]) == ("text_completion", "bundled:target", 1_700_000_000)
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert body["metrics"]["speculative_decoding"]["acceptance_histogram"] == [0, 1, 0, 0]
    (choice,) = body["choices"]
    assert (choice["index"], choice["text"], choice["finish_reason"]) == (0, "fine", "stop")
    assert choice["logprobs"]["tokens"] == ["t5", "t6", "t7"]
    assert choice["logprobs"]["token_logprobs"] == [-0.5] * 3
    assert choice["logprobs"]["text_offset"] == [0, 2, 4]


def test_a_chat_line_is_answered_as_openai_does():
    line = answer(origin(LineKind.CHAT, model="mine"), fakes.make_output(text="fine", logprobs=LOGPROBS), STYLE)
    body = line["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "mine")
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "fine"}
    assert body["choices"][0]["logprobs"]["content"][1]["token"] == "t6"
    assert body["choices"][0]["logprobs"]["content"][1]["bytes"] == [116, 54]


def test_errors_take_the_form_of_their_line():
    bad = BadLine(origin=origin(LineKind.PROMPT, id=None), message="not valid JSON")
    assert refusal(bad) == {"id": "line-4", "outputs": [], "error": {"line": 4, "message": "not valid JSON"}}
    line = refusal(BadLine(origin=origin(LineKind.CHAT), message="empty"))
    assert (line["custom_id"], line["error"]) == ("a", {"code": "invalid_request", "message": "empty"})
    assert line["response"]["status_code"] == 400
    assert line["response"]["body"]["error"]["message"] == "empty"
    line = answer(origin(LineKind.CHAT), fakes.make_output(error="too long"), STYLE)
    assert (line["response"], line["error"]) == (None, {"code": "request_failed", "message": "too long"})
    line = answer(origin(LineKind.PROMPT), fakes.make_output(error="too long"), STYLE)
    assert line["error"]["message"] == "too long"


def test_speculation_leaves_out_steps_without_a_draft():
    output = fakes.make_output(drafted=(3, 0, 2), accepted=(3, 0, 1))
    assert speculation(output.metrics, 3) == {
        "num_spec_steps": 2,
        "num_draft_tokens": 5,
        "num_accepted_draft_tokens": 4,
        "num_spec_tokens": 3,
        "acceptance_histogram": [0, 1, 0, 1],
        "per_step_drafted": [3, 2],
        "per_step_accepted": [3, 1],
        "mean_acceptance_length": 3.0,
        "draft_acceptance_rate": 0.8,
    }
    assert "draft_acceptance_rate" not in speculation((), 3)


def test_what_a_request_does_not_have_is_left_out():
    assert request_metrics(fakes.make_output(error="no")) == {}
    assert "tpot_ms" not in request_metrics(fakes.make_output(tokens=(5,)))
