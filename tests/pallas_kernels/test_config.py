"""Block sizes: who decides, what is refused, and the files of what was measured."""

import json

import jax
import numpy as np
import pytest

from pallas_kernels import arg_specs, backend, tune
from pallas_kernels.attention import BlockConfig, config
from pallas_kernels.attention.config import Case

CASE = Case(1, 32, 8, 128, "bfloat16")
GPU = backend.Gpu(kind="NVIDIA Test 1", num_cores=10)
OWN = BlockConfig(block_rows=32, block_keys=32, num_warps=2, num_stages=1)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A table for the test's GPU, with an entry for one and one for five query tokens."""
    monkeypatch.setattr(config, "TUNED", tmp_path)
    config._tuned.cache_clear()
    found = {tokens: BlockConfig(block_rows=32, block_keys=64, num_warps=4, num_stages=1 + tokens) for tokens in (1, 5)}
    times = {"chosen": {"shape": 1.0}}
    rows = [tune.entry(CASE._replace(tokens=tokens), one, times) for tokens, one in found.items()]
    (tmp_path / "nvidia_test_1.json").write_text(json.dumps({"entries": rows}))
    yield found
    config._tuned.cache_clear()


def test_an_explicit_choice_comes_before_a_measured_one_and_that_before_the_rule(tuned):
    assert config.choose(CASE, OWN, GPU) is OWN
    assert config.choose(CASE, None, GPU) == tuned[1]
    assert config.choose(CASE, None, GPU._replace(kind="another")) == config.heuristic(CASE)
    assert config.choose(CASE, None, None) == config.heuristic(CASE)


def test_what_was_measured_serves_as_many_tokens_up_to_a_power_of_two_and_no_other_heads(tuned):
    assert config.choose(CASE._replace(tokens=7), None, GPU) == tuned[5]
    for other in (CASE._replace(kv_heads=4), CASE._replace(dtype="int8"), CASE._replace(tokens=2)):
        assert config.choose(other, None, GPU) == config.heuristic(other)


def test_prompts_of_any_length_share_their_block_sizes():
    assert CASE._replace(tokens=64).shared == CASE._replace(tokens=5000).shared
    assert not CASE._replace(tokens=64).shared.decodes
    assert CASE._replace(tokens=5).shared.decodes


def test_keys_are_summed_in_the_same_steps_for_any_number_of_query_tokens():
    for spec in arg_specs.SPECS.values():
        if spec.case.decodes:
            several = {config.heuristic(spec.case._replace(tokens=tokens)).block_keys for tokens in (1, 2, 5)}
            assert len(several) == 1, spec.name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_rows": 8}, "block_rows=8 must be a power of two and at least 16"),
        ({"block_keys": 48}, "block_keys=48"),
        ({"num_warps": 3}, "num_warps=3"),
        ({"num_stages": 0}, "num_stages=0"),
        ({"programs_per_core": 0}, "programs_per_core=0"),
    ],
)
def test_block_sizes_that_no_kernel_can_run_are_named(fields, message):
    good = {"block_rows": 16, "block_keys": 16, "num_warps": 4, "num_stages": 2}
    with pytest.raises(ValueError, match=message):
        BlockConfig(**good | fields)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (CASE._replace(head_dim=96), "head size 96"),
        (CASE._replace(dtype="int4"), "pages of int4"),
        (CASE._replace(dtype="float8_e4m3fn"), "float8_e4m3fn on a GPU of compute capability 8.0"),
    ],
)
def test_what_no_kernel_does_is_left_to_others(case, message):
    with pytest.raises(NotImplementedError, match=message):
        config.choose(case, OWN, GPU._replace(capability=8.0))


def test_float8_is_for_chips_that_have_it():
    case = CASE._replace(dtype="float8_e4m3fn")
    assert config.choose(case, None, GPU._replace(capability=9.0)) == config.heuristic(case)


def test_a_cpu_is_no_gpu_even_where_a_mesh_is_set():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert backend.platform() == "cpu"
        assert backend.gpu() is None


def test_few_tokens_are_decoded_and_many_prefilled():
    assert [one for one in (1, 5, 16, 17, 64) if CASE._replace(tokens=one).decodes] == [1, 5, 16]
    assert not CASE._replace(tokens=16, kv_heads=2).decodes, "sixteen heads a group times sixteen tokens"


def test_the_rule_holds_a_rows_queries_in_a_tile_of_the_decode_kernel():
    for spec in arg_specs.SPECS.values():
        if spec.case.decodes:
            assert config.heuristic(spec.case).block_rows >= spec.case.rows, spec.name


def test_a_file_name_is_made_of_a_devices_kind():
    assert backend.file_name("NVIDIA H200") == "nvidia_h200.json"
    assert backend.file_name("NVIDIA A100-SXM4-40GB") == "nvidia_a100_sxm4_40gb.json"
