"""Block sizes: who decides, what is refused, and the files of what was measured."""

import json

import pytest

from pallas_kernels import arg_specs, backend, tune
from pallas_kernels.attention import BlockConfig, config
from pallas_kernels.attention.config import Case

CASE = Case(8, 1, 32, 8, 128, 4096, "bfloat16")
GPU = backend.Gpu(kind="NVIDIA Test 1", num_cores=10)
OWN = BlockConfig(block_rows=32, block_keys=32, num_warps=2, num_stages=1)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A table for the test's GPU, with entries for two batches."""
    monkeypatch.setattr(config, "TUNED", tmp_path)
    config._tuned.cache_clear()
    configs = {batch: BlockConfig(block_rows=16, block_keys=64, num_warps=4, num_stages=batch) for batch in (1, 8)}
    rows = [tune.entry(CASE._replace(batch=batch), one, {"chosen": 1.0}) for batch, one in configs.items()]
    (tmp_path / "nvidia_test_1.json").write_text(json.dumps({"entries": rows}))
    yield configs
    config._tuned.cache_clear()


def test_an_explicit_choice_comes_before_a_measured_one_and_that_before_the_rule(tuned):
    assert config.choose(CASE, OWN, GPU) is OWN
    assert config.choose(CASE, None, GPU) == tuned[8]
    assert config.choose(CASE, None, GPU._replace(kind="another")) == config.heuristic(CASE)
    assert config.choose(CASE, None, None) == config.heuristic(CASE)


def test_what_was_measured_serves_the_nearest_batch_and_no_other_heads(tuned):
    assert config.choose(CASE._replace(batch=2), None, GPU) == tuned[1]
    assert config.choose(CASE._replace(batch=64), None, GPU) == tuned[8]
    for other in (CASE._replace(kv_heads=4), CASE._replace(dtype="int8"), CASE._replace(tokens=4)):
        assert config.choose(other, None, GPU) == config.heuristic(other)


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
    [(CASE._replace(head_dim=96), "head size 96"), (CASE._replace(dtype="int4"), "pages of int4")],
)
def test_what_no_kernel_does_is_left_to_others(case, message):
    with pytest.raises(NotImplementedError, match=message):
        config.choose(case, OWN, None)


def test_few_tokens_are_decoded_and_many_prefilled():
    tokens = {1: "decode", 5: "decode", 16: "decode", 17: "prefill", 64: "prefill"}
    assert {one: CASE._replace(tokens=one).kernel for one in tokens} == tokens
    assert CASE._replace(tokens=16, kv_heads=2).kernel == "prefill", "sixteen heads a group times sixteen tokens"


def test_the_rule_holds_a_rows_queries_in_a_tile_of_the_decode_kernel():
    for spec in arg_specs.SPECS.values():
        if spec.case.decodes:
            assert config.heuristic(spec.case).block_rows >= spec.case.rows, spec.name


def test_tables_that_are_committed_can_be_read_and_name_their_times():
    for path in config.TUNED.glob("*.json"):
        table = json.loads(path.read_text())
        assert table["device"]["num_cores"] > 0
        for row in table["entries"]:
            assert config.choose(Case(**row["case"]), BlockConfig(**row["config"]), None)
            assert min(row["microseconds"].values()) > 0


def test_a_file_name_is_made_of_a_devices_kind():
    assert backend.file_name("NVIDIA H200") == "nvidia_h200.json"
    assert backend.file_name("NVIDIA A100-SXM4-40GB") == "nvidia_a100_sxm4_40gb.json"
