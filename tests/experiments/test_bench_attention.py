"""The benchmarks of attention and of decoding, and the shapes they share: that they measure and that they check."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_attention, bench_attention_peers, bench_bare, bench_decode, common, model_shapes
from experiments.bench_attention_peers import Contender
from experiments.bench_common import Yardstick, measure_yardstick
from pallas_kernels import arg_specs, tune
from streamserve.models import abstract_params, from_hf, init_params
from streamserve.types import LayerKV

YARDSTICK = Yardstick(bytes_per_s=1e10, flops_per_s=1e11)


def test_a_row_has_times_shares_and_errors_of_everybody_who_could(monkeypatch):
    wrong = Contender(lambda k, v, table: (k, v), lambda q, cache, table, start: q * 2)

    def refuses(q, cache, table, start):
        raise NotImplementedError("not for me")

    able = {"wrong": wrong, "refuses": Contender(wrong.prepare, refuses)}
    monkeypatch.setattr(bench_attention_peers, "able", lambda spec: able)
    row = bench_attention.compare(bench_attention.TINY, YARDSTICK, repeats=1, seed=0)
    assert set(row["microseconds"]) == {"pallas", "xla", "wrong", "torch_sdpa"}
    assert row["wrong"] == ["wrong"]
    assert row["refused"] == {"refuses": "not for me"}
    seconds = row["microseconds"]["xla"]["median"] / 1e6
    np.testing.assert_allclose(row["of_copy_bandwidth"]["xla"], row["kv_bytes"] / seconds / 1e10)
    np.testing.assert_allclose(row["tflop_per_s"]["xla"], row["flops"] / seconds / 1e12)
    assert row["pallas_over"]["pallas"] == 1.0
    assert "xla" in bench_attention.summary(row)


def test_bytes_and_operations_of_a_shape_count_what_must_be_done():
    spec = arg_specs.Spec("two", batch=2, tokens=3, context=0, heads=4, kv_heads=2, head_dim=16, lengths=(5, 0))
    assert spec.kv_bytes == 2 * (8 + 3) * 2 * 16 * 2  # keys and values of 8 and 3 positions, two bytes each
    assert spec.flops == 4 * ((6 + 7 + 8) + (1 + 2 + 3)) * 4 * 16
    q, k, _, table, start = spec.arrays(0)
    assert (q.shape, k.shape, start.tolist()) == ((2, 3, 4, 16), (3, 2, 64, 16), [5, 0])
    assert sorted(np.asarray(table).ravel().tolist()) == [1, 2]


def test_peers_get_rows_in_one_piece_where_rows_are_plain():
    spec = bench_attention.TINY
    _, keys, values, table, _ = spec.arrays(0)
    rows, _ = bench_attention_peers.contiguous(keys, values, table, spec=spec)
    assert rows.shape == (2, 128, 2, 64)
    np.testing.assert_array_equal(rows[1, 70], keys[int(table[1, 1]), :, 6])
    assert not bench_attention_peers.is_plain(bench_attention.TINY_VERIFY)
    assert bench_attention_peers.torch_sdpa(bench_attention.TINY_VERIFY, (), repeats=1, calls=1) is None


def test_tuning_keeps_the_fastest_over_shapes_that_share_block_sizes_and_refuses_what_is_wrong(monkeypatch, tmp_path):
    specs = [bench_attention.TINY, bench_attention.TINY._replace(name="tiny_b1", batch=1)]
    for spec in specs:
        monkeypatch.setitem(arg_specs.SPECS, spec.name, spec)
    assert tune.main([f"--output={tmp_path}", "--quick", "--specs", *(spec.name for spec in specs)]) == 0
    table = json.loads((tmp_path / "cpu.json").read_text())
    (row,) = table["entries"]
    assert table["interpreted"]
    assert row["case"] == specs[0].case.shared._asdict()
    times = [np.prod(list(by_spec.values())) for by_spec in row["microseconds"].values()]
    assert len(times) == 2
    assert times == sorted(times)
    assert {tuple(by_spec) for by_spec in row["microseconds"].values()} == {("tiny_b2_128", "tiny_b1")}
    monkeypatch.setattr(tune, "specification", lambda spec, arrays: arrays[0] * 0)
    with pytest.raises(ValueError, match="is wrong by"):
        tune.tune(specs[:1], repeats=1, limit=1, seed=0)


def test_yardsticks_are_positive_rates():
    found = measure_yardstick(2, tiny=True)
    assert found.bytes_per_s > 1e6
    assert found.flops_per_s > 1e6


def test_shapes_are_models_with_the_parameters_that_their_names_say(tmp_path):
    sizes = {}
    for name in model_shapes.SHAPES:
        shapes = abstract_params(from_hf(model_shapes.SHAPES[name]), "bfloat16")
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9
    assert 8.0 < sizes["llama3_8b"] < 8.1
    assert 1.2 < sizes["llama3_1b"] < 1.3
    assert 8.1 < sizes["qwen3_8b"] < 8.3
    path = model_shapes.write(tmp_path, "llama3_8b", layers=2)
    assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 2
    with pytest.raises(common.RunError, match="unknown shape 'gpt'; known: llama3_8b"):
        model_shapes.write(tmp_path, "gpt")


def test_a_step_reads_all_weights_but_an_embedding_that_is_no_head():
    params = {"embedding": jax.ShapeDtypeStruct((10, 4), "float32"), "layers": jax.ShapeDtypeStruct((3,), "float32")}
    assert bench_decode.weight_bytes(params) == 172
    assert bench_decode.weight_bytes(params | {"head": jax.ShapeDtypeStruct((10, 4), "float32")}) == 172


def test_a_bare_step_over_pages_equals_one_over_caches_of_one_piece():
    config = from_hf({**model_shapes.SHAPES["tiny"], "tie_word_embeddings": True})
    params = init_params(config, jax.random.key(0), dtype="float32", std=0.05)
    table, start = jnp.asarray([[2, 1], [4, 3]], jnp.int32), jnp.asarray([0, 0], jnp.int32)
    scale = config.head_dim**-0.5
    logits = []
    for ops, dims in (
        (bench_bare.paged_cache(scale, table), (5, config.num_kv_heads, 64, config.head_dim)),
        (bench_bare.contiguous_cache(scale, bounded=True), (2, config.num_kv_heads, 128, config.head_dim)),
    ):
        layers = tuple(LayerKV(k=jnp.zeros(dims), v=jnp.zeros(dims)) for _ in range(config.num_layers))
        tokens = jnp.asarray([[1, 2, 3], [4, 5, 6]], jnp.int32)
        _, layers = bench_bare.forward(config, params, tokens, layers, start, ops)
        logits.append(bench_bare.forward(config, params, tokens[:, :1], layers, start + 3, ops)[0])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
    assert np.abs(logits[0]).max() > 1e-3
