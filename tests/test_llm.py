"""The Python door, against transformers: every family, through prefill, hand-off, slots and speculation together."""

import json

import pytest
import torch

from streamserve import LLM, Config, Prompt, SamplingParams, SpeculationConfig, TopologyConfig
from streamserve.config import ModelArgs, PipeServeConfig
from streamserve.lane_counters import LaneCounters
from streamserve.pipeserve import StreamPair
from tests import tiny_models

PROMPTS = [[1, 2, 3], [5] * 9, [7, 11, 13, 17, 19, 23, 29, 31, 37], [96]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


def _folders(tmp_path_factory, family: str):
    """A target and a draft of one family: the draft has one layer and other weights."""
    base = tmp_path_factory.mktemp(family)
    model = tiny_models.save_tiny(base / "target", family)
    tiny_models.save_tiny(base / "draft", family, seed=1, num_hidden_layers=1)
    return base / "target", base / "draft", model


def _engine(target, draft=None, depth=3, **topology) -> LLM:
    config = Config(
        model=ModelArgs(model=str(target), skip_tokenizer_init=True, max_model_len=100),
        topology=TopologyConfig(**topology),
        pipeserve=PipeServeConfig(max_num_seqs=3, prefill_buckets=(16,), max_logprobs=3),
        speculation=SpeculationConfig(
            method="none" if draft is None else "draft_model",
            model=None if draft is None else str(draft),
            num_speculative_tokens=depth,
        ),
    )
    return LLM.from_config(config)


def _transformers_greedy(model, prompt: list[int], count: int) -> list[int]:
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, attention_mask=torch.ones(1, len(prompt))
        )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """An engine with speculation over two stream pairs, and the model it serves."""
    target, draft, model = _folders(tmp_path_factory, "llama")
    return _engine(target, draft, num_pairs=2), model, (target, draft)


@pytest.mark.parametrize("family", [name for name in tiny_models.FAMILIES if name != "llama"])
def test_greedy_tokens_equal_transformers_under_speculation(family, tmp_path_factory):
    target, draft, model = _folders(tmp_path_factory, family)
    llm = _engine(target, draft)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == _transformers_greedy(model, prompt, 64), prompt
    metrics = [metric for output in outputs for metric in output.metrics]
    assert sum(sum(metric.drafted_per_step) for metric in metrics) > 0
    assert all(metric.transfer_bytes > 0 for metric in metrics)


def test_two_lanes_equal_transformers_and_use_both(llama):
    llm, model, _ = llama
    outputs = llm.generate(PROMPTS * 2, GREEDY, use_tqdm=False)
    for prompt, output in zip(PROMPTS * 2, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == _transformers_greedy(model, prompt, 64), prompt
    assert {metric.lane for output in outputs for metric in output.metrics} == {0, 1}
    assert llm.stats().compilations_after_warmup == 0


def test_tensor_parallel_meshes_give_the_same_tokens(llama):
    _, model, (target, draft) = llama
    llm = _engine(target, draft, prefill_devices=2, decode_devices=2)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == _transformers_greedy(model, prompt, 64), prompt


def test_prompt_logprobs_and_logprobs_equal_transformers(llama):
    llm, model, _ = llama
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=2, prompt_logprobs=3)
    (output,) = llm.generate([PROMPTS[2]], params, use_tqdm=False)
    tokens = [*PROMPTS[2], *output.outputs[0].token_ids]
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1)
    assert output.prompt_logprobs[0] is None
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    for position, entry in enumerate(entries):
        token = tokens[position + 1]
        assert entry[token].logprob == pytest.approx(float(scores[position, token]), abs=1e-4)
        assert entry[token].rank == 1 + int((scores[position] > scores[position, token]).sum())
        top = set(torch.topk(scores[position], 3 if position < len(PROMPTS[2]) - 1 else 2).indices.tolist())
        assert set(entry) == top | {token}
    total = sum(scores[len(PROMPTS[2]) - 1 + i, token].item() for i, token in enumerate(output.outputs[0].token_ids))
    assert output.outputs[0].cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_n_completions_come_in_one_output_and_differ(llama):
    llm, _, _ = llama
    params = SamplingParams(n=3, temperature=2.0, max_tokens=12, seed=5)
    (first,), (again,) = (llm.generate([PROMPTS[0]], params, use_tqdm=False) for _ in range(2))
    assert [completion.index for completion in first.outputs] == [0, 1, 2]
    assert len({completion.token_ids for completion in first.outputs}) == 3
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in again.outputs]


def test_outputs_end_by_length_by_stop_id_and_at_the_models_end(llama):
    llm, model, _ = llama
    whole = _transformers_greedy(model, PROMPTS[1], 91)
    stop = whole[7]
    results = llm.generate(
        [PROMPTS[1]] * 3,
        [
            SamplingParams(temperature=0.0, max_tokens=500),
            SamplingParams(temperature=0.0, max_tokens=50, stop_token_ids=(stop,)),
            SamplingParams(temperature=0.0, max_tokens=1),
        ],
        use_tqdm=False,
    )
    ends = [(len(r.outputs[0].token_ids), r.outputs[0].finish_reason, r.outputs[0].stop_reason) for r in results]
    assert ends == [(91, "length", None), (whole.index(stop) + 1, "stop", stop), (1, "length", None)]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 100, {}, "the prompt has 100 tokens; .* at most 99"),
        ([97], {}, "prompt token 97 is outside the vocabulary of 97"),
        ([1], {"stop_token_ids": (1000,)}, "stop_token_ids 1000 is outside the vocabulary"),
        ([1], {"logit_bias": {400: 1.0}}, "logit_bias 400 is outside the vocabulary"),
        ([1], {"logprobs": 4}, "logprobs=4 exceeds the engine's max_logprobs=3"),
        ([1], {"stop": "x"}, "stop strings need a tokenizer"),
        ("text", {}, "the engine has no tokenizer"),
        ({"promt": "x"}, {}, "a prompt mapping holds 'prompt' or 'prompt_token_ids'"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_with_the_reason(llama, prompt, params, message):
    llm, _, _ = llama
    prompts, good, bad = [[1, 2], prompt], SamplingParams(max_tokens=2), SamplingParams(max_tokens=2, **params)
    with pytest.raises(ValueError, match=f"prompt 1: {message}"):
        llm.generate(prompts, [good, bad], use_tqdm=False)


def test_a_stream_answers_the_good_and_refuses_the_bad(llama):
    llm, _, _ = llama
    params = SamplingParams(max_tokens=3)
    prompts = (Prompt(request_id=str(i), params=params, token_ids=(1,) * (200 if i == 2 else 4)) for i in range(5))
    outputs = {output.request_id: output for output in llm.stream(prompts)}
    assert set(outputs) == set("01234")
    assert outputs["2"].outputs == ()
    assert "the prompt has 200 tokens" in outputs["2"].error
    assert all(outputs[name].error is None for name in "0134")


def test_a_request_of_a_running_stream_is_cancelled(llama):
    llm = llama[0]
    lengths = {"short": 2, "long": 90, "other": 20}
    prompts = [
        Prompt(
            request_id=name, params=SamplingParams(max_tokens=count, temperature=0, ignore_eos=True), token_ids=(3, 5)
        )
        for name, count in lengths.items()
    ]
    outputs = {}
    for output in llm.stream(prompts):
        outputs[output.request_id] = output
        if output.request_id == "short":
            assert llm.cancel("long")
            assert not llm.cancel("short")
            assert not llm.cancel("nobody")
    assert outputs["long"].error == "cancelled"
    assert len(outputs["other"].outputs[0].token_ids) == 20
    assert llm.stats().cancelled == 1


def test_a_run_whose_pages_did_not_move_is_an_error(llama, monkeypatch):
    llm, hand_off = llama[0], StreamPair.hand_off
    for lane in llm._scheduler.lanes:
        monkeypatch.setattr(lane, "counters", LaneCounters())
    assert len(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)) == 1
    for lane in llm._scheduler.lanes:
        monkeypatch.setattr(lane, "counters", LaneCounters())
    still = lambda pair, task: hand_off(pair, task)._replace(transfer_pages=0)  # noqa: E731
    monkeypatch.setattr(StreamPair, "hand_off", still)
    with pytest.raises(RuntimeError, match="1 requests went from prefill to decode meshes, but no page"):
        llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)


def test_seeds_make_runs_repeat_and_prompts_differ(llama):
    _, _, (target, _) = llama
    params = SamplingParams(temperature=1.5, max_tokens=10)
    runs = [[o.outputs[0].token_ids for o in _engine(target).generate([[3]] * 2, params, use_tqdm=False)] for _ in "ab"]
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        LLM(str(tmp_path / "no-such-folder"), skip_tokenizer_init=True)


def test_a_draft_with_another_vocabulary_is_refused(llama, tmp_path):
    _, _, (target, _) = llama
    tiny_models.save_tiny(tmp_path / "draft", "llama", vocab_size=90)
    with pytest.raises(ValueError, match="the draft's vocabulary has 90 tokens and the target's 97"):
        _engine(target, tmp_path / "draft")


def test_a_length_beyond_the_model_is_refused(llama):
    _, _, (target, _) = llama
    with pytest.raises(ValueError, match="max_model_len=1000 exceeds the 128 positions"):
        LLM(str(target), skip_tokenizer_init=True, max_model_len=1000)


def test_too_few_devices_are_counted_and_the_way_out_is_named(llama):
    _, _, (target, _) = llama
    with pytest.raises(ValueError, match=r"need 8 devices, but there are 5 .* share_devices"):
        _engine(target, num_pairs=4)


def test_the_bundled_pair_speaks_and_speculates():
    llm = LLM(
        speculative_config={"model": "bundled:draft", "num_speculative_tokens": 3}, max_model_len=256, use_tqdm=False
    )
    params = SamplingParams(temperature=0.0, max_tokens=24)
    texts = ["Tom has 3 apples and buys 4 more. How many apples does he have?", "Summarize: Reads a file. It is long."]
    outputs = llm.generate(texts, params, use_tqdm=False)
    plain = LLM(max_model_len=256, use_tqdm=False).generate(texts, params, use_tqdm=False)
    for output, expected in zip(outputs, plain, strict=True):
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)
        assert output.prompt in texts
    drafted = sum(sum(metric.drafted_per_step) for output in outputs for metric in output.metrics)
    accepted = sum(sum(metric.accepted_per_step) for output in outputs for metric in output.metrics)
    assert accepted > 0.2 * drafted

    stopped = llm.generate(texts[:1], SamplingParams(temperature=0.0, max_tokens=24, stop=" "), use_tqdm=False)[0]
    text = outputs[0].outputs[0].text
    assert stopped.outputs[0].text == text[: text.index(" ")]
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].stop_reason == " "
    (chat,) = llm.chat([{"role": "user", "content": "Hello"}], params, use_tqdm=False)
    assert chat.outputs[0].token_ids
    assert json.dumps(chat.outputs[0].text)
