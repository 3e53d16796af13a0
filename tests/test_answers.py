"""Output lines in the form that the input line asked for."""

import dataclasses
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
    assert speculation(output.metrics, STYLE) == {
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
    assert "draft_acceptance_rate" not in speculation((), STYLE)


def test_what_is_synthetic_says_so():
    style = dataclasses.replace(STYLE, synthetic="iid:0.5")
    assert speculation((), style)["synthetic_acceptance"] == "iid:0.5"
    line = answer(origin(LineKind.PROMPT), fakes.make_output(drafted=(3,), accepted=(1,)), style)
    assert line["metrics"]["speculative_decoding"]["synthetic_acceptance"] == "iid:0.5"


def test_a_request_tells_its_stages_gaps_and_cost():
    measured = {
        "scheduled_s": 1.01, "prefilled_s": 1.03, "handed_off_s": 1.04, "transferred_s": 1.07,
        "itls_s": (0.05, 0.1500004),
        "cached_tokens": 2, "num_preemptions": 1, "transfer_pages": 4, "transfer_bytes": 40,
    }  # fmt: skip
    numbers = request_metrics(fakes.make_output(times=(1.0, 1.1, 1.3), measured=measured))
    assert numbers.pop("itls_ms") == [50.0, 150.0], "rounded to a microsecond"
    assert numbers.pop("lanes") == [0]
    assert numbers == pytest.approx(
        {
            "num_prompt_tokens": 3, "num_output_tokens": 3, "cached_tokens": 2,
            "queue_ms": 10, "prefill_ms": 20, "page_wait_ms": 10, "transfer_ms": 30, "decode_ms": 230,
            "ttft_ms": 100, "tpot_ms": 100, "e2el_ms": 300,
            "num_preemptions": 1, "kv_transfer_pages": 4, "kv_transfer_bytes": 40,
        }
    )  # fmt: skip


def test_stages_of_several_completions_add_up():
    first = fakes.make_output(times=(1.0, 1.4, 1.6), measured={"cached_tokens": 2, "num_preemptions": 1})
    second = fakes.make_output(times=(1.0, 1.2, 2.0), measured={"lane": 1, "cached_tokens": 1})
    both = dataclasses.replace(first, outputs=first.outputs + second.outputs, metrics=first.metrics + second.metrics)
    numbers = request_metrics(both)
    assert [numbers[f"{stage}_ms"] for stage in ("queue", "prefill", "transfer", "decode")] == pytest.approx(
        [50, 50, 50, 850]
    )
    assert (numbers["ttft_ms"], numbers["e2el_ms"]) == pytest.approx((200, 1000))
    assert numbers["itls_ms"] == [100.0, 100.0, 400.0, 400.0]
    assert (numbers["cached_tokens"], numbers["num_preemptions"], numbers["kv_transfer_pages"]) == (3, 1, 2)
    assert numbers["lanes"] == [0, 1]
    assert "tpot_ms" not in numbers


def test_what_a_request_does_not_have_is_left_out():
    assert request_metrics(fakes.make_output(error="no")) == {}
    numbers = request_metrics(fakes.make_output(tokens=(5,)))
    assert "tpot_ms" not in numbers
    assert "itls_ms" not in numbers
