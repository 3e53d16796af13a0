"""The decoder against transformers, layer by layer, and against itself: stepped, chunked, on two devices."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from streamserve.kv import cache
from streamserve.models import abstract_params, hidden_states, load_model
from tests import tiny_models

FAMILIES = tuple(tiny_models.FAMILIES)
LENGTH = 20  # beyond every window, so that one which is ignored or off by one shows
TOKENS = np.random.default_rng(0).integers(0, tiny_models.VOCAB, (2, LENGTH)).astype(np.int32)
TOLERANCE = 1e-4  # of float32 numbers of size 1 to 10, summed in another order


def _load(folder, mesh, dtype=jnp.float32, **options):
    return load_model(str(folder), mesh, dtype=dtype, load_format="auto", **options)


@functools.cache
def _jitted(forward):
    return jax.jit(forward)


_states = jax.jit(hidden_states, static_argnums=0)


def _prefill(model, tokens=TOKENS, capacity=LENGTH):
    empty = cache.rows(model.kv_shape, len(tokens), capacity, page_size=8)
    start_B = jnp.zeros((len(tokens),), jnp.int32)
    return _jitted(model.fns.forward)(model.params, jnp.asarray(tokens), empty, start_B)


def _transformers_states(hf_model):
    """Output of the embedding, of each layer and of the final norm, and the logits."""
    states = []
    keep = lambda module, inputs, output: states.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    modules = [hf_model.model.embed_tokens, *hf_model.model.layers, hf_model.model.norm]
    hooks = [module.register_forward_hook(keep) for module in modules]
    with torch.no_grad():
        logits = hf_model(torch.tensor(TOKENS, dtype=torch.int64)).logits
    for hook in hooks:
        hook.remove()
    return [state.numpy() for state in states], logits.numpy()


@pytest.mark.parametrize("form", ["newer", "older"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_equals_transformers(family, form, checkpoint, make_mesh, tmp_path):
    folder, hf_model = checkpoint(family)
    if form == "older":
        folder = shutil.copytree(folder, tmp_path / "older")
        tiny_models.rewrite_in_older_form(folder)
    model = _load(folder, make_mesh(1))
    wanted, wanted_logits = _transformers_states(hf_model)
    empty = cache.rows(model.kv_shape, 2, LENGTH, page_size=8)
    states = _states(model.config, model.params, jnp.asarray(TOKENS), empty, jnp.zeros((2,), jnp.int32))
    assert len(states) == len(wanted) == model.config.num_layers + 2
    for index, (state, want) in enumerate(zip(states, wanted, strict=True)):
        np.testing.assert_allclose(state, want, atol=TOLERANCE, err_msg=f"state {index}")
    logits = model.fns.logits(model.params, states[-1])
    np.testing.assert_allclose(logits, wanted_logits, atol=TOLERANCE)
    assert len(np.unique(np.argmax(logits, axis=-1))) > 5  # or the model says nothing about its input


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_stepping_and_chunks_equal_one_prefill(family, checkpoint, make_mesh):
    model = _load(checkpoint(family)[0], make_mesh(1))
    whole, _ = _prefill(model)
    for chunks in ([1] * LENGTH, [8, 1, 1, 1, 1, 8]):
        kv, parts, start = cache.rows(model.kv_shape, 2, LENGTH + 9, page_size=8), [], 0
        for size in chunks:
            tokens = jnp.asarray(TOKENS[:, start : start + size])
            hidden, kv = _jitted(model.fns.forward)(model.params, tokens, kv, jnp.full((2,), start, jnp.int32))
            parts.append(hidden)
            start += size
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_rows_at_different_positions_go_on_from_their_own(family, checkpoint, make_mesh):
    model = _load(checkpoint(family)[0], make_mesh(1))
    whole, kv = _prefill(model)
    starts = [13, 4]  # row 1 is taken back further: what lies beyond its length must not matter
    tokens = jnp.asarray(np.stack([TOKENS[row, start : start + 3] for row, start in enumerate(starts)]))
    hidden, _ = _jitted(model.fns.forward)(model.params, tokens, kv, jnp.asarray(starts, jnp.int32))
    for row, start in enumerate(starts):
        np.testing.assert_allclose(hidden[row], whole[row, start : start + 3], atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_two_devices_equal_one(family, checkpoint, make_mesh):
    folder, _ = checkpoint(family)
    one, two = (_load(folder, make_mesh(size)) for size in (1, 2))
    (want, want_kv), (hidden, kv) = _prefill(one), _prefill(two)
    np.testing.assert_allclose(hidden, want, atol=TOLERANCE)
    np.testing.assert_allclose(kv.pool.layers[-1].v, want_kv.pool.layers[-1].v, atol=TOLERANCE)
    attention, mlp = (two.params["layers"][0][name] for name in ("attention", "mlp"))
    for kernel in (attention["qkv_kernel"], attention["out_kernel"], mlp["gate_up_kernel"], mlp["down_kernel"]):
        assert kernel.addressable_shards[0].data.size * 2 == kernel.size


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gradients_reach_every_parameter(family, checkpoint, make_mesh):
    model = _load(checkpoint(family)[0], make_mesh(1), attention_implementation="reference")

    def loss(params):
        hidden, _ = model.fns.forward(
            params, jnp.asarray(TOKENS), cache.rows(model.kv_shape, 2, LENGTH, page_size=8), jnp.zeros((2,), jnp.int32)
        )
        logp = jax.nn.log_softmax(model.fns.logits(params, hidden[:, :-1]))
        return -jnp.take_along_axis(logp, jnp.asarray(TOKENS)[:, 1:, None], axis=-1).mean()

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(model.params)):
        assert np.all(np.isfinite(grad)), path
        assert np.any(np.asarray(grad) != 0), path


def test_bfloat16_in_memory_stays_near_float32_and_gives_float32_logits(checkpoint, make_mesh):
    folder, _ = checkpoint("qwen3")
    exact, rough = (_load(folder, make_mesh(1), dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert rough.kv_shape.dtype == jnp.bfloat16
    (want, _), (hidden, kv) = _prefill(exact), _prefill(rough)
    assert hidden.dtype == kv.pool.layers[0].k.dtype == jnp.bfloat16
    logits = rough.fns.logits(rough.params, hidden)
    assert logits.dtype == jnp.float32
    error = np.abs(logits - exact.fns.logits(exact.params, want)).mean()
    assert error < 0.1  # 8 bits of mantissa through two layers, of logits whose spread is 1.2


def test_logits_take_any_leading_dimensions(checkpoint, make_mesh):
    model = _load(checkpoint("llama3")[0], make_mesh(1))
    hidden, _ = _prefill(model)
    whole = model.fns.logits(model.params, hidden)
    np.testing.assert_allclose(model.fns.logits(model.params, hidden[1, 3]), whole[1, 3], atol=TOLERANCE)


def test_parameters_are_one_subtree_a_layer(checkpoint, make_mesh):
    config = _load(checkpoint("qwen2")[0], make_mesh(1)).config
    params = abstract_params(config, jnp.bfloat16)
    assert set(params["layers"]) == set(range(config.num_layers))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_the_attention_implementation_reaches_the_door(checkpoint, make_mesh):
    model = _load(checkpoint("llama")[0], make_mesh(1), attention_implementation="nope")
    with pytest.raises(ValueError, match="implementation='nope' is unknown"):
        _prefill(model)
