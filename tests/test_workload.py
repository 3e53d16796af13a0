"""Input lines of four kinds, and what a wrong one is told."""

import json
import pathlib

import pytest

import streamserve
from streamserve.workload import BadLine, LineKind, LineReader, WorkItem

ASSETS = pathlib.Path(streamserve.__file__).parent / "assets"


def chat_line(custom_id="c", **body):
    body = {"messages": [{"role": "user", "content": "hi"}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion_line(custom_id="c", **body):
    body = {"prompt": "hi", **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def render_chat(messages):
    return tuple(range(1, len(messages) + 2))


def read(*lines, defaults=None, chat=render_chat):
    """Parse lines, given as JSON values or raw bytes."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    return list(LineReader(defaults=defaults, render_chat=chat).read(raw))


def read_one(line, **options):
    (item,) = read(line, **options)
    return item


def message_of(line, **options):
    item = read_one(line, **options)
    assert isinstance(item, BadLine), item
    return item.message


def test_the_four_kinds_can_be_mixed():
    items = read(
        {"id": "a", "prompt": "one", "max_tokens": 7},
        {"prompt_token_ids": [1, 2]},
        {"question_id": 81, "category": "math", "turns": ["three"], "reference": ["3"]},
        completion_line("b", prompt="four", top_k=5, model="m"),
        completion_line("c", prompt=[4, 5]),
        chat_line("d", max_completion_tokens=9),
    )
    assert all(isinstance(item, WorkItem) for item in items)
    prompts, origins = [item.prompt for item in items], [item.origin for item in items]
    assert [prompt.text for prompt in prompts] == ["one", None, "three", "four", None, None]
    assert [prompt.token_ids for prompt in prompts] == [None, (1, 2), None, None, (4, 5), (1, 2)]
    assert [prompt.request_id for prompt in prompts] == ["a", "line-2", "math/81", "b", "c", "d"]
    assert [origin.id for origin in origins] == ["a", None, 81, "b", "c", "d"]
    assert [origin.kind for origin in origins] == [
        LineKind.PROMPT,
        LineKind.PROMPT,
        LineKind.QUESTION,
        LineKind.COMPLETION,
        LineKind.COMPLETION,
        LineKind.CHAT,
    ]
    assert (prompts[0].params.max_tokens, prompts[3].params.top_k, prompts[5].params.max_tokens) == (7, 5, 9)
    assert (origins[2].category, origins[3].model) == ("math", "m")


def test_lines_are_pulled_one_by_one():
    pulled = []

    def lines():
        for number in range(1000):
            pulled.append(number)
            yield json.dumps({"prompt": f"p{number}"}).encode()

    items = LineReader().read(lines())
    for count in range(1, 6):
        next(items)
        assert len(pulled) == count


def test_blank_lines_are_skipped_but_counted():
    first, second = read(b"\n", {"prompt": "a"}, b"  \r\n", {"prompt": "b"})
    assert [(item.origin.line_number, item.origin.index) for item in (first, second)] == [(2, 0), (4, 1)]


def test_a_byte_order_mark_is_no_part_of_the_first_line():
    assert read_one(b'\xef\xbb\xbf{"prompt": "a"}\n').prompt.text == "a"


def test_defaults_apply_where_a_line_says_nothing_or_null():
    defaults = {"max_tokens": 64, "temperature": 0, "max_new_tokens": 64}
    first, second = read({"prompt": "a", "temperature": None}, {"prompt": "b", "max_new_tokens": 3}, defaults=defaults)
    assert (first.prompt.params.max_tokens, first.prompt.params.temperature) == (64, 0)
    assert second.prompt.params.max_tokens == 3


def test_aliases_of_other_engines_are_known():
    params = read_one({"prompt": "a", "max_new_tokens": 5, "sampling_seed": 3}).prompt.params
    assert (params.max_tokens, params.seed) == (5, 3)
    assert "max_tokens is given twice" in message_of({"prompt": "a", "max_new_tokens": 5, "max_tokens": 6})


def test_wrong_defaults_are_refused_at_once():
    with pytest.raises(ValueError, match=r"unknown field 'temprature'; did you mean temperature\?"):
        LineReader(defaults={"temprature": 0})
    with pytest.raises(ValueError, match=r"top_p must be in \(0.0, 1.0\], got 2"):
        LineReader(defaults={"top_p": 2})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json}\n", "not valid JSON: Expecting property name"),
        (b'{"prompt": "a"\n', "not valid JSON"),
        (b'{"prompt": "\xff"}\n', "not valid JSON: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no JSON number"),
        ([1, 2], "a line must be a JSON object, got list"),
        ({}, "either prompt or prompt_token_ids"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "either prompt or prompt_token_ids"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"prompt": 5}, "prompt must be a string, got 5"),
        ({"prompt": "\ud800"}, "half a surrogate pair"),
        ({"prompt_token_ids": [1, -1]}, "must hold token ids, got -1"),
        ({"prompt_token_ids": [1, True]}, "must hold token ids, got True"),
        ({"prompt": "a", "max_tokes": 3}, "unknown field 'max_tokes'; did you mean max_tokens"),
        ({"prompt": "a", "zzzz": 3}, "unknown field 'zzzz'; known: frequency_penalty"),
        ({"prompt": "a", "temperature": -1}, "temperature must be in [0.0, inf], got -1"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"prompt": "a", "stop": [""]}, "stop must not hold an empty string"),
        ({"prompt": "a", "id": [1]}, "id must be a string or an integer, got [1]"),
        ({"question_id": 1, "turns": ["a", "b"]}, "turns holds 2 turns"),
        ({"question_id": 1, "turns": []}, "turns must be a list of one string"),
        ({"question_id": 1, "turns": [""]}, "turns[0] is empty"),
        ({"turns": ["a"]}, "question_id is missing"),
        ({"question_id": 1, "turns": ["a"], "refrence": []}, "unknown field 'refrence'; did you mean reference"),
        ({**completion_line(), "url": "/v1/embeddings"}, "url must be /v1/completions or /v1/chat/completions"),
        ({**completion_line(), "method": "GET"}, "method must be POST, got 'GET'"),
        ({**completion_line(), "body": "x"}, "body must be an object, got 'x'"),
        ({**completion_line(), "extra": 1}, "unknown field 'extra'"),
        ({**completion_line(), "custom_id": None}, "custom_id is missing"),
        (completion_line(prompt=["a", "b"]), "body.prompt holds 2 prompts"),
        (completion_line(prompt=None), "body.prompt must be a string, got None"),
        (completion_line(prompt=[]), "the prompt is empty"),
        (completion_line(stream=True), "stream is not supported, got True"),
        (completion_line(echo=True), "echo is not supported"),
        (completion_line(suffix="x"), "suffix is not supported"),
        (completion_line(best_of=3), "best_of is not supported, got 3"),
        (completion_line(messages=[]), "unknown field 'messages'"),
        (chat_line(tools=[{"type": "function"}]), "tools is not supported"),
        (chat_line(response_format={"type": "json_object"}), "response_format is not supported"),
        (chat_line(messages=[]), "at least one message"),
        (chat_line(messages=[{"content": "a"}]), "a message needs a role"),
        (chat_line(logprobs=3), "logprobs must be true or false in a chat body, got 3"),
        (chat_line(top_logprobs=3), "top_logprobs needs logprobs"),
        (chat_line(max_completion_tokns=3), "did you mean max_completion_tokens"),
    ],
)
def test_a_wrong_line_is_told_what_is_wrong(line, message):
    assert message in message_of(line)


def test_a_message_does_not_repeat_a_whole_prompt():
    assert len(message_of({"prompt": ["x" * 10_000]})) < 200


def test_neutral_openai_fields_pass():
    neutral = {"stream": False, "n": 2, "best_of": 2, "user": "me", "echo": False, "suffix": None, "logprobs": 3}
    params = read_one(completion_line(**neutral)).prompt.params
    assert (params.n, params.logprobs) == (2, 3)
    params = read_one(
        chat_line(tools=[], tool_choice="none", response_format={"type": "text"}, logprobs=True, top_logprobs=2)
    ).prompt.params
    assert params.logprobs == 2
    assert read_one(chat_line(logprobs=False)).prompt.params.logprobs is None
    assert read_one(chat_line(logprobs=True)).prompt.params.logprobs == 0


def test_a_list_of_one_prompt_is_that_prompt():
    assert read_one(completion_line(prompt=["a"])).prompt.text == "a"
    assert read_one(completion_line(prompt=[[1, 2]])).prompt.token_ids == (1, 2)


def test_a_duplicate_id_is_refused_across_kinds_and_names_the_first_line():
    items = read({"id": "x", "prompt": "a"}, completion_line("x"), {"id": 5, "prompt": "b"}, {"id": "5", "prompt": "c"})
    assert [isinstance(item, BadLine) for item in items] == [False, True, False, True]
    assert items[1].message == "duplicate id 'x': line 1 has it already"
    assert items[3].message == "duplicate id '5': line 3 has it already"
    assert items[1].origin.id == "x"


def test_questions_of_several_benchmarks_can_be_joined():
    lines = [{"question_id": 0, "category": category, "turns": ["a"]} for category in ("", "math", "code", "math")]
    assert [isinstance(item, BadLine) for item in read(*lines)] == [False, False, False, True]


def test_a_bad_line_keeps_its_id_and_kind():
    bad = read_one({"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": 3}})
    assert (bad.origin.id, bad.origin.kind) == ("c", LineKind.CHAT)


def test_chat_without_a_tokenizer_or_with_a_refusing_template_is_a_bad_line():
    def refuse(messages):
        raise ValueError("the chat template refuses the messages: no system role")

    assert "need a tokenizer" in message_of(chat_line(), chat=None)
    assert "no system role" in message_of(chat_line(), chat=refuse)


def test_the_bundled_prompts_are_eight_or_more_of_each_of_four_kinds():
    with (ASSETS / "prompts.jsonl").open("rb") as file:
        items = list(LineReader().read(file))
    assert all(isinstance(item, WorkItem) for item in items), [item for item in items if isinstance(item, BadLine)]
    categories = [item.origin.category for item in items]
    assert set(categories) == {"instructions", "math", "code", "summarization"}
    assert all(categories.count(category) >= 8 for category in set(categories))
    assert len({item.prompt.text for item in items}) == len(items)
