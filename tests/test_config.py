"""Configuration and sampling parameters: names, types and ranges are checked, messages name the field."""

import dataclasses
import math

import pytest
from ml_collections import ConfigDict

from configs import adaptive_cpu, plain_cpu, serve_trace, tiny_cpu
from experiments import common
from streamserve.config import Config, ModelArgs, PipeServeConfig, SchedulerConfig, TopologyConfig, from_mapping
from streamserve.sampling_params import MAX_SEED, SamplingParams


def field_names(config):
    """Names of all fields, sections and their parts."""
    names = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            names |= {f"{field.name}.{name}" for name in field_names(value)}
        else:
            names.add(field.name)
    return names


def _leaves(values: dict, path: str = ""):
    for name, value in values.items():
        if isinstance(value, dict) and f"{path}{name}" != "sampling":
            yield from _leaves(value, f"{path}{name}.")
        elif isinstance(value, dict):
            yield from (f"sampling.{field}" for field in value)
        else:
            yield f"{path}{name}"


@pytest.mark.parametrize("module", [tiny_cpu, plain_cpu, adaptive_cpu, serve_trace], ids=lambda module: module.__name__)
def test_a_config_file_names_every_field_so_that_each_can_be_overridden(module):
    values = module.get_config()
    assert isinstance(values, ConfigDict)
    config, sampling = common.split_config(values.to_dict())
    named = set(_leaves(values.to_dict()))
    assert {name for name in named if not name.startswith("sampling.")} == field_names(config)
    assert sampling == {"max_tokens": 64, "temperature": 0.0}


def test_the_two_configs_differ_in_speculation_only():
    tiny, plain = (common.split_config(module.get_config().to_dict())[0] for module in (tiny_cpu, plain_cpu))
    assert (tiny.topology.num_pairs, tiny.pipeserve.max_num_seqs, tiny.speculation.depths) == (2, 8, (3,))
    assert plain.speculation.depths == (0,)
    assert dataclasses.replace(plain, speculation=tiny.speculation) == tiny


def test_nothing_given_means_defaults():
    assert from_mapping(Config, {}) == Config()


def test_lists_become_tuples_and_integers_floats():
    assert from_mapping(PipeServeConfig, {"prefill_buckets": [8, 16]}).prefill_buckets == (8, 16)
    assert isinstance(hash(from_mapping(Config, {"pipeserve": {"prefill_buckets": [8]}})), int)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, r"no field 'modle'; did you mean model\?"),
        ({"model": {"dtyp": "x"}}, r"no field 'model.dtyp'; did you mean dtype\?"),
        ({"zzz": 1}, "no field 'zzz'; known: model, topology"),
        ({"model": 3}, "'model' must be a mapping, got 3"),
        ({"seed": "1"}, "'seed' must be .*int.*, got '1'"),
        ({"seed": True}, "'seed' must be .*int.*, got True"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"model": {"dtype": "float8"}}, "model.dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ({"model": {"load_format": "x"}}, "model.load_format must be one of"),
        ({"model": {"max_model_len": 1}}, "model.max_model_len must be at least 2, got 1"),
        ({"model": {"max_model_len": 5.5}}, "'model.max_model_len' must be"),
        ({"topology": {"num_pairs": 0}}, "topology.num_pairs must be at least 1, got 0"),
        ({"topology": {"share_devices": 1}}, "'topology.share_devices' must be"),
        ({"pipeserve": {"prefill_buckets": ()}}, "prefill_buckets must name at least one size"),
        ({"pipeserve": {"transfer_buckets": (4, 2)}}, "transfer_buckets must ascend"),
        ({"pipeserve": {"decode_batches": (0,)}}, "decode_batches must ascend from at least 1"),
        ({"pipeserve": {"draft_kv": "forget"}}, "draft_kv must be one of transfer, recompute, got 'forget'"),
        ({"pipeserve": {"preemption": "swap"}}, "preemption must be one of recompute, keep, got 'swap'"),
        ({"pipeserve": {"page_size": 0}}, "page_size must be at least 1"),
        ({"topology": {"topology": "mixed"}}, "topology must be one of disaggregated, colocated, got 'mixed'"),
        ({"scheduler": {"transfer_timeout_s": 0}}, "transfer_timeout_s must be positive"),
        ({"pipeserve": {"prefill_buckets": (8, 8)}}, "prefill_buckets must ascend"),
        ({"pipeserve": {"prefill_buckets": (8, "x")}}, "'pipeserve.prefill_buckets' must be"),
        ({"pipeserve": {"max_num_seqs": 0}}, "pipeserve.max_num_seqs must be at least 1"),
        ({"pipeserve": {"max_logprobs": -1}}, "pipeserve.max_logprobs must be at least 0"),
        ({"speculation": {"num_speculative_tokens": 9}}, r"num_speculative_tokens must be in \[0, 8\], got 9"),
        ({"speculation": {"method": "draft_model"}}, "needs speculation.model"),
        ({"speculation": {"specustream": {"explore": 1.5}}}, r"specustream.explore must be in \[0, 1\], got 1.5"),
        ({"speculation": {"specustream": {"horizons": (9, 4)}}}, "specustream.horizons must ascend"),
        ({"speculation": {"specustream": {"amortise": 0}}}, "specustream.amortise must be positive"),
        ({"speculation": {"specustream": {"min_dwell": -1}}}, "specustream.min_dwell must not be negative"),
        ({"speculation": {"specustream": {"explor": 0.1}}}, "did you mean explore"),
        ({"scheduler": {"max_transfers": 0}}, "scheduler.max_transfers must be at least 1"),
        ({"scheduler": {"max_waiting": 0}}, "scheduler.max_waiting must be at least 1"),
    ],
)
def test_a_wrong_config_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(Config, values)


def test_configs_cannot_be_changed_and_can_be_compared():
    for config in (Config(), ModelArgs(), TopologyConfig(), SchedulerConfig(), SamplingParams()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(config)[0].name, None)


def test_depth_is_zero_without_a_drafter():
    plain = from_mapping(Config, {"speculation": {"num_speculative_tokens": 5}}).speculation
    assert (plain.depths, plain.fixed_depth) == ((0,), 0)
    speculation = {"method": "draft_model", "model": "x", "num_speculative_tokens": 5}
    assert from_mapping(Config, {"speculation": speculation}).speculation.fixed_depth == 5


def test_sampling_defaults_are_those_that_vllm_users_know():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.ignore_eos, params.skip_special_tokens, params.include_stop_str_in_output) == (False, True, False)


def test_sampling_fields_are_brought_to_one_form():
    params = SamplingParams(stop="x", stop_token_ids=[3, 4], top_k=-1, logit_bias={"7": 1})
    assert (params.stop, params.stop_token_ids, params.top_k, params.logit_bias) == (("x",), (3, 4), 0, {7: 1.0})
    assert SamplingParams(stop=None).stop == ()
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=0.1).greedy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", True),
        ("n", 1.0),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("max_tokens", 0),
        ("max_tokens", None),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("logprobs", -1),
        ("logprobs", True),
        ("prompt_logprobs", -1),
        ("stop", [""]),
        ("stop", [3]),
        ("stop", 3),
        ("stop_token_ids", ["x"]),
        ("stop_token_ids", [-1]),
        ("ignore_eos", 1),
        ("skip_special_tokens", None),
        ("logit_bias", [1]),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {-1: 1}),
    ],
)
def test_sampling_fields_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}"):
        SamplingParams(**{field: value})
