"""Speculation through the Python door: policies, drafters and rules on engines over random pairs of several shapes."""

import json
import types

import numpy as np
import pytest

from streamserve import LLM, Config, Prompt, SamplingParams, SpeculationConfig, parts
from streamserve.audit import audit
from streamserve.config import ModelArgs, PipeServeConfig, SchedulerConfig
from streamserve.specustream import decision_log
from tests import doubles, fakes, tiny_models

PROMPTS = [[1, 2, 3], [5, 6] * 9, [7, 11, 13, 17, 19, 23, 29, 31, 37], [96], [2, 3, 4, 2, 3, 4, 2, 3]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=40)


def restless(tiers, slots):
    """The policy of the laws, as a user would name it."""
    return doubles.restless(types.SimpleNamespace(tiers=tiers, slots=slots))


def _engine(folder, *, decisions=None, cache=None, **speculation) -> LLM:
    speculation = {"tiers": (0, 3), "num_speculative_tokens": 3, **speculation}
    if speculation.get("method", "draft_model") in ("draft_model", "synthetic"):
        speculation |= {"method": speculation.get("method", "draft_model"), "model": str(folder / "draft")}
    config = Config(
        model=ModelArgs(model=str(folder / "target"), skip_tokenizer_init=True, max_model_len=100),
        pipeserve=PipeServeConfig(max_num_seqs=3, prefill_buckets=(32,), max_logprobs=2, transfer_buckets=()),
        speculation=SpeculationConfig(**speculation),
        scheduler=SchedulerConfig(forbid_compilation=True),
        compilation_cache_dir=cache,
    )
    return LLM.from_config(config, decisions=decisions)


def _save(folder, family: str):
    tiny_models.save_tiny(folder / "target", family)
    tiny_models.save_tiny(folder / "draft", family, seed=1, num_hidden_layers=1)
    return folder


def _tokens(outputs):
    assert not any(output.error for output in outputs)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    ("family", "method", "verifier"),
    [("qwen3", "draft_model", "block"), ("mistral", "suffix", "coupled"), ("llama3", "ngram", "rejection")],
)
def test_no_policy_changes_a_greedy_token_and_none_compiles_anything(family, method, verifier, tmp_path):
    llm = _engine(_save(tmp_path, family), method=method, verifier=verifier)
    llm.use_policy("fixed:0")
    plain = _tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    for name in [*sorted(set(parts.POLICIES) - {"oracle"}), "fixed:3", "tests.test_adaptive_llm:restless"]:
        llm.use_policy(name)
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert _tokens(outputs) == plain, name
        if name in ("fixed:3", "confidence_stop"):
            assert sum(sum(metric.drafted_per_step) for output in outputs for metric in output.metrics), name
    assert llm.stats().compilations_after_warmup == 0
    if verifier == "coupled":
        sampled = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=30, seed=3)
        runs = []
        for name in ("fixed:0", "fixed:3", "tests.test_adaptive_llm:restless"):
            llm.use_policy(name)
            runs.append(_tokens(llm.generate(PROMPTS, sampled, use_tqdm=False)))
        assert runs[0] == runs[1] == runs[2]


def test_decisions_are_logged_and_replay_and_costs_are_kept_for_the_next_start(tmp_path):
    folder, path, cache = _save(tmp_path, "llama"), tmp_path / "decisions.jsonl", tmp_path / "cache"
    llm = _engine(folder, policy="specustream", decisions=path, cache=str(cache), audit=True)
    prompts = [Prompt(request_id=str(i), params=GREEDY, token_ids=tuple(p)) for i, p in enumerate(PROMPTS)]
    answered = [(prompts[int(output.request_id)], output) for output in llm.stream(prompts)]
    with pytest.raises(ValueError, match="the log of decisions is about one policy"):
        llm.use_policy("goodput")
    llm.close()
    header, logged = decision_log.read_log(path)
    assert (header["policy"], header["tiers"], header["synthetic"]) == ("specustream", [0, 3], False)
    assert sum(one.outcome is not None for one in logged) > 10
    policy = parts.make_policy(llm.config.speculation, 3)
    assert decision_log.replay(policy, logged, num_arms=2, seed=0) == []

    report = audit(llm, answered, depth=3)
    assert (report.completions, report.identical, report.wide_identical) == (5, 5, 5)
    assert report.divergences == ()
    assert 0 <= report.largest_logprob_difference < 1e-4
    assert llm.stats().compilations_after_warmup == 0

    (table,) = cache.glob("costs-*.json")
    before = table.read_text()
    table.write_text(before.replace('"draft"', '"droft"'))
    _engine(folder, policy="specustream", cache=str(cache), audit=True)
    assert "droft" not in table.read_text(), "what cannot be read is measured again"
    after = table.read_text()
    _engine(folder, policy="specustream", cache=str(cache), audit=True)
    assert table.read_text() == after, "what was measured is kept"


def test_synthetic_acceptance_is_what_was_asked_for(tmp_path):
    llm = _engine(_save(tmp_path, "llama"), method="synthetic", acceptance="positions:0.9,0.5,0.2", policy="oracle")
    llm.pin_depth(3)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    outputs = llm.generate(PROMPTS * 10, params, use_tqdm=False)
    accepted = np.concatenate([metric.accepted_per_step[:-1] for output in outputs for metric in output.metrics])
    for position, rate in enumerate((0.9, 0.45, 0.09)):
        assert np.mean(accepted > position) == pytest.approx(rate, abs=4 * (0.25 / len(accepted)) ** 0.5)


def test_a_draft_with_another_tokenizer_drafts_what_both_know(tmp_path):
    for name in ("target", "draft"):  # equal weights: what differs is what the ids mean
        tiny_models.save_tiny(tmp_path / name, "llama", vocab_size=330)
        fakes.save_tokenizer(tmp_path / name)
    path = tmp_path / "draft" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(tokenizer))
    config = Config(
        model=ModelArgs(model=str(tmp_path / "target"), max_model_len=100),
        pipeserve=PipeServeConfig(max_num_seqs=3, prefill_buckets=(32,), max_logprobs=2, transfer_buckets=()),
        speculation=SpeculationConfig(
            method="draft_model", model=str(tmp_path / "draft"), tiers=(0, 3), policy="goodput"
        ),
        scheduler=SchedulerConfig(forbid_compilation=True),
    )
    llm = LLM.from_config(config)
    runs = {}
    for name in ("fixed:0", "fixed:3"):
        llm.use_policy(name)
        runs[name] = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert _tokens(runs["fixed:0"]) == _tokens(runs["fixed:3"])
    accepted = [count for output in runs["fixed:3"] for metric in output.metrics for count in metric.accepted_per_step]
    # The same model: only what stands for "a" or "b", or comes out of them, is drafted otherwise.
    assert np.mean(accepted) > 1
