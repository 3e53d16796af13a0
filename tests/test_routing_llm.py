"""Routing through the Python door, on two stream pairs that differ: the tokens are always the same."""

import pytest

from streamserve import LLM, Config, Prompt, SamplingParams, SpeculationConfig, TopologyConfig, parts
from streamserve.config import LanesConfig, ModelArgs, PipeServeConfig, RoutingConfig, SchedulerConfig
from streamserve.flowguard import Route, read_routes, replay_routes
from streamserve.flowguard.routers.picking import stateless
from tests import tiny_models

PROMPTS = [[1, 2, 3], [5, 6] * 9, [7, 11, 13, 17, 19, 23, 29, 31, 37], [96], [2, 3, 4] * 13]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def locally(num_lanes):
    """Go where there is room, and prefill where it decodes if the prompt is short enough."""
    del num_lanes

    def choose(context, noise_A2):
        arm = int(context.eligible_A.argmax()) if noise_A2[0, 0] < 0.5 else int(len(context.eligible_A) - 1)
        arm = arm if context.eligible_A[arm] else int(context.eligible_A.argmax())
        return Route(arm, 0.5, bool(context.local_A[arm]))

    return stateless(choose)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("pair")
    tiny_models.save_tiny(base / "target", "llama")
    tiny_models.save_tiny(base / "draft", "llama", seed=1, num_hidden_layers=1)
    return base


@pytest.fixture(scope="module")
def engine(folder, tmp_path_factory):
    """Two pairs: the second has fewer slots and pages, is slow, held up, and dies once."""
    config = Config(
        model=ModelArgs(model=str(folder / "target"), skip_tokenizer_init=True, max_model_len=100),
        topology=TopologyConfig(num_pairs=2),
        pipeserve=PipeServeConfig(
            max_num_seqs=3, prefill_buckets=(32,), max_logprobs=2, transfer_buckets=(), page_size=16
        ),
        speculation=SpeculationConfig(
            method="draft_model", model=str(folder / "draft"), tiers=(0, 3), num_speculative_tokens=3
        ),
        routing=RoutingConfig(policy="tests.test_routing_llm:locally", local_prefill_tokens=16),
        lanes=LanesConfig(
            slots=(3, 2),
            decode_pool_tokens=(400, 144),
            slowdown=(1.0, 2.0),
            transfer_delay_s=(0.0, 0.02),
            down_from_s=(-1.0, 0.3),
            down_until_s=(-1.0, 0.6),
        ),
        scheduler=SchedulerConfig(forbid_compilation=True, max_waiting=64),
    )
    routes = tmp_path_factory.mktemp("log") / "routes.jsonl"
    return LLM.from_config(config, routes=routes), routes


def _prompts(times: int):
    several = PROMPTS * times
    return [Prompt(request_id=str(i), params=GREEDY, token_ids=tuple(ids)) for i, ids in enumerate(several)]


@pytest.fixture(scope="module")
def plain(folder):
    config = Config(
        model=ModelArgs(model=str(folder / "target"), skip_tokenizer_init=True, max_model_len=100),
        pipeserve=PipeServeConfig(max_num_seqs=3, prefill_buckets=(32,), page_size=16),
    )
    llm = LLM.from_config(config)
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def _check(outputs, plain, times: int):
    got = {int(output.request_id): output for output in outputs}
    assert sorted(got) == list(range(len(PROMPTS) * times))
    for index, output in got.items():
        assert output.error is None, output.error
        assert output.outputs[0].token_ids == plain[index % len(PROMPTS)], index
    return [output.metrics[0] for output in got.values()]


def test_wherever_a_request_goes_its_tokens_are_the_same(engine, plain):
    llm, path = engine
    arrivals = [(0.03 * index, prompt) for index, prompt in enumerate(_prompts(6))]
    metrics = _check(llm.serve(arrivals), plain, 6)
    assert {one.lane for one in metrics} == {0, 1}
    stats = llm.stats()
    assert stats.compilations_after_warmup == 0
    assert stats.local_prefills > 0
    assert stats.kv_transfers > 0
    assert any(not one.transfer_pages for one in metrics)
    llm.close()
    header, logged = read_routes(path)
    assert header["num_lanes"] == 2
    answered = [one for one in logged if one.outcome is not None and one.outcome.answered]
    assert sorted(one.request_id for one in answered) == sorted(f"{index}.0" for index in range(len(metrics)))
    lost = [one for one in logged if one.outcome is not None and not one.outcome.answered]
    assert {one.route.arm for one in lost} <= {1}, "only the pair that died loses requests"
    last = {one.request_id: one.step for one in answered}
    assert all(one.step < last[one.request_id] for one in lost), "each was decided again, and answered then"
    assert any(one.route.local for one in logged)
    assert replay_routes(locally(2), logged, num_lanes=2, seed=llm.config.seed) == []


def test_every_router_serves_the_same_tokens_on_one_engine(engine, plain):
    llm, _ = engine
    llm.close()
    for name in parts.ROUTERS:
        llm.use_router(name)
        _check(llm.stream(_prompts(2)), plain, 2)
    assert llm.stats().compilations_after_warmup == 0
    assert all(pair.prefill_store.tree.num_pages for pair in llm.pairs[:1])
    llm.use_router("round_robin")
    assert not any(pair.prefill_store.tree.num_pages for pair in llm.pairs)


def test_the_router_is_not_changed_while_requests_run_or_routes_are_logged(engine, folder):
    llm, _ = engine
    llm.close()
    run = llm.serve([(0.0, prompt) for prompt in _prompts(2)])
    next(run)
    with pytest.raises(RuntimeError, match="between two runs"):
        llm.use_router("random")
    run.close()
    with pytest.raises(ValueError, match=r"unknown routing.policy 'best'"):
        llm.use_router("best")
    with pytest.raises(ValueError, match="made a str, not a Policy"):
        llm.use_router("builtins:str")


def test_lanes_must_fit_the_topology():
    with pytest.raises(ValueError, match=r"lanes.slowdown has 1 entries for 2 pairs"):
        Config(topology=TopologyConfig(num_pairs=2), lanes=LanesConfig(slowdown=(2.0,)))
    with pytest.raises(ValueError, match="must be at least 1"):
        LanesConfig(slowdown=(0.5,))
    with pytest.raises(ValueError, match="must come back later"):
        LanesConfig(down_from_s=(2.0,), down_until_s=(1.0,))
    with pytest.raises(ValueError, match="go together"):
        LanesConfig(down_from_s=(2.0,))
    with pytest.raises(ValueError, match="go together"):
        Config(lanes=LanesConfig(acceptance=("iid:0.5",)))
