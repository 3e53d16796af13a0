"""From disk onto meshes and back: every layout and dtype of a checkpoint, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from streamserve.models import export_hf, hf_files, load_model, place, resolve_path
from tests import tiny_models

TOKENS = np.random.default_rng(1).integers(0, tiny_models.VOCAB, (2, 12))


def _load(folder, mesh, dtype=jnp.float32, load_format="auto", **options):
    return load_model(str(folder), mesh, dtype=dtype, load_format=load_format, **options)


def _assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def _hf_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def _edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A llama checkpoint that the test may spoil."""
    return shutil.copytree(checkpoint("llama")[0], tmp_path / "copy")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_on_disk_is_read_exactly_into_any_dtype(stored, make_mesh, tmp_path):
    hf_model = tiny_models.make_tiny("qwen2").to(stored)
    hf_model.save_pretrained(tmp_path)
    exact = _load(tmp_path, make_mesh(1))
    want = hf_model.state_dict()["model.embed_tokens.weight"].float().numpy()
    np.testing.assert_array_equal(exact.params["embedding"], want)
    kept = _load(tmp_path, make_mesh(1), jnp.bfloat16)
    _assert_same(kept.params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exact.params))


def test_several_files_with_an_index_give_the_same_as_one(checkpoint, make_mesh, tmp_path):
    folder, hf_model = checkpoint("llama3")
    hf_model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    _assert_same(_load(tmp_path, make_mesh(1)).params, _load(folder, make_mesh(1)).params)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_each_device_reads_only_what_it_holds(family, checkpoint, make_mesh, monkeypatch):
    folder, hf_model = checkpoint(family)
    read, total = hf_files.TensorFiles.read, {}

    def spy(self, name, slices):
        block = read(self, name, slices)
        total[name] = total.get(name, 0) + block.size
        return block

    monkeypatch.setattr(hf_files.TensorFiles, "read", spy)
    two = _load(folder, make_mesh(2))
    divided = {name: size for name, size in total.items() if "_proj.weight" in name}
    sizes = {name: value.numel() for name, value in hf_model.state_dict().items()}
    assert len(divided) == 7 * two.config.num_layers
    assert divided == {name: sizes[name] for name in divided}
    _assert_same(jax.device_get(two.params), jax.device_get(_load(folder, make_mesh(1)).params))


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, "float32") for family in tiny_models.FAMILIES), ("llama3", "bfloat16")]
)
def test_export_is_the_inverse_of_loading_and_transformers_reads_it(family, dtype, checkpoint, make_mesh, tmp_path):
    folder, hf_model = checkpoint(family)
    model = _load(folder, make_mesh(2))
    hf_config = json.loads((folder / "config.json").read_text())
    export_hf(model.params, model.config, tmp_path, hf_config, dtype=jnp.dtype(dtype))
    written = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    original = safetensors.numpy.load_file(folder / "model.safetensors")
    assert set(written) == set(original)
    for name, value in original.items():
        np.testing.assert_array_equal(written[name], value.astype(jnp.dtype(dtype)), err_msg=name)
    _assert_same(
        _load(tmp_path, make_mesh(1)).params,
        jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), _load(folder, make_mesh(1)).params),
    )
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == getattr(torch, dtype)
    if dtype == "float32":
        np.testing.assert_array_equal(_hf_logits(loaded), _hf_logits(hf_model))


def test_export_refuses_a_config_of_another_model(checkpoint, make_mesh, tmp_path):
    folder, _ = checkpoint("llama")
    model = _load(folder, make_mesh(1))
    hf_config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="hf_config describes"):
        export_hf(model.params, model.config, tmp_path, {**hf_config, "rms_norm_eps": 0.1})
    with pytest.raises(ValueError, match="float16"):
        export_hf(model.params, model.config, tmp_path, hf_config, dtype=jnp.float16)


def test_dummy_weights_need_a_config_alone_and_do_not_depend_on_the_mesh(checkpoint, make_mesh, tmp_path):
    shutil.copy(checkpoint("qwen3")[0] / "config.json", tmp_path)
    one = _load(tmp_path, make_mesh(1), load_format="dummy", seed=3)
    two = _load(tmp_path, make_mesh(2), load_format="dummy", seed=3)
    _assert_same(jax.device_get(one.params), jax.device_get(two.params))
    kernel = two.params["layers"][1]["mlp"]["down_kernel"]
    assert kernel.addressable_shards[0].data.size * 2 == kernel.size
    other = _load(tmp_path, make_mesh(1), load_format="dummy", seed=4)
    assert not np.array_equal(one.params["embedding"], other.params["embedding"])
    assert not np.array_equal(kernel, two.params["layers"][0]["mlp"]["down_kernel"])


def test_place_copies_to_another_mesh_and_leaves_the_first(checkpoint, make_mesh):
    first = _load(checkpoint("llama")[0], make_mesh(1))
    second = place(first, make_mesh(2, first=2))
    _assert_same(jax.device_get(first.params), jax.device_get(second.params))
    for leaf in jax.tree.leaves(second.params):
        assert leaf.sharding.device_set == set(jax.devices()[2:4])


def test_harmless_extras_are_passed_over(copied, checkpoint, make_mesh):
    def edit(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    _edit_tensors(copied, edit)
    _assert_same(_load(copied, make_mesh(1)).params, _load(checkpoint("llama")[0], make_mesh(1)).params)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing tensors: model.norm.weight"),
        (lambda t: t.update(visual=np.ones(2, np.float32)), "extra tensors: visual"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(3, np.float32)}),
            r"misshapen tensors: model.norm.weight is \(3,\) instead of \(32,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}),
            r"tensors must be stored as .*'model.norm.weight': 'I8'",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(copied, make_mesh, edit, message):
    _edit_tensors(copied, edit)
    with pytest.raises(ValueError, match=message):
        _load(copied, make_mesh(1))


def test_an_untied_head_must_be_there(checkpoint, make_mesh, tmp_path):
    folder = shutil.copytree(checkpoint("llama3")[0], tmp_path / "copy")
    _edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing tensors: lm_head\.weight"):
        _load(folder, make_mesh(1))


def test_a_long_list_of_faults_is_cut(copied, make_mesh):
    _edit_tensors(copied, lambda tensors: tensors.clear() or tensors.update(x=np.ones(1, np.float32)))
    with pytest.raises(ValueError, match=r"missing tensors: .* and \d+ more; extra tensors: x$"):
        _load(copied, make_mesh(1))


def test_broken_folders_are_refused(copied, make_mesh):
    with pytest.raises(FileNotFoundError, match="is not a folder; give a Hugging Face folder"):
        resolve_path(str(copied / "nowhere"))
    with pytest.raises(ValueError, match="load_format must be 'auto' or 'dummy', got 'bin'"):
        _load(copied, make_mesh(1), load_format="bin")
    index = copied / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "absent.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"lacks absent\.safetensors"):
        _load(copied, make_mesh(1))
    index.write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))
    with pytest.raises(ValueError, match=r"lists tensors that model\.safetensors lacks: x"):
        _load(copied, make_mesh(1))
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        _load(copied, make_mesh(1))
    index.unlink()
    (copied / "model.safetensors").write_bytes(b"0123456789")
    with pytest.raises(ValueError, match="is not a valid safetensors file"):
        _load(copied, make_mesh(1))
    (copied / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor"):
        _load(copied, make_mesh(1))
    (copied / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        _load(copied, make_mesh(1))
    (copied / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, not list"):
        _load(copied, make_mesh(1))
    (copied / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        _load(copied, make_mesh(1))


def test_a_mesh_that_does_not_divide_the_model_is_refused(checkpoint, make_mesh, tmp_path):
    with pytest.raises(ValueError, match="a mesh of 3 devices does not divide the model's 2 key/value heads"):
        _load(checkpoint("llama")[0], make_mesh(3))
    tiny_models.save_tiny(tmp_path, "llama", intermediate_size=49)
    with pytest.raises(ValueError, match="a mesh of 2 devices does not divide the model's 49 units of intermediate"):
        _load(tmp_path, make_mesh(2))
