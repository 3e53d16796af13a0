"""Training state on disk: round trips onto a mesh, and going on after a kill."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from streamserve.models import Checkpoints, abstract_params, from_hf, param_shardings

CONFIG = from_hf(
    {
        "model_type": "llama",
        "vocab_size": 13,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
)
ROOT = pathlib.Path(__file__).parents[2]


OPTIMIZER = optax.sgd(1e-2, momentum=0.9)


def _tree(seed: int = 0):
    params = {"layers": {0: {"w": jnp.full((3,), 0.5 + seed)}, 1: {"w": jnp.ones((2, 2))}}}
    return {"params": params, "opt": OPTIMIZER.init(params), "step": jnp.asarray(0, jnp.int32)}


@jax.jit
def _step(tree):
    grads = jax.tree.map(lambda leaf: jnp.sin(leaf + 1), tree["params"])
    updates, opt = OPTIMIZER.update(grads, tree["opt"], tree["params"])
    return {"params": optax.apply_updates(tree["params"], updates), "opt": opt, "step": tree["step"] + 1}


def _assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def train_and_die(folder: str) -> None:
    """Save three steps and end without closing, as a killed process does."""
    tree, run = _tree(), Checkpoints(pathlib.Path(folder), max_to_keep=2)
    for step in range(1, 4):
        tree = _step(tree)
        run.save(step, tree)
    os._exit(9)


def test_parameters_come_back_on_the_shards_of_a_mesh(make_mesh, tmp_path):
    shapes = abstract_params(CONFIG, jnp.float32)
    params = jax.tree.map(lambda leaf: np.random.default_rng(leaf.size).random(leaf.shape, np.float32), shapes)
    params = jax.device_put(params)
    with Checkpoints(tmp_path, max_to_keep=1) as run:
        run.save(5, params)
        back = run.restore(shapes, shardings=param_shardings(shapes, make_mesh(2)))
    _assert_same(back, params)
    kernel = back["layers"][1]["attention"]["qkv_kernel"]
    assert kernel.addressable_shards[0].data.size * 2 == kernel.size


def test_a_killed_run_goes_on_to_the_same_end(tmp_path):
    code = f"from tests.models import test_checkpoint as t; t.train_and_die({str(tmp_path)!r})"
    died = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert died.returncode == 9
    with Checkpoints(tmp_path, max_to_keep=2) as run:
        assert run.latest_step() in (2, 3)  # the third may have been cut short, and then it does not show
        tree = run.restore(_tree(seed=1))
        assert int(tree["step"]) == run.latest_step()
    want = _tree()
    for _ in range(5):
        want = _step(want)
    while int(tree["step"]) < 5:
        tree = _step(tree)
    _assert_same(tree, want)


def test_old_checkpoints_are_deleted_and_steps_ascend(tmp_path):
    tree = {"x": jnp.arange(3)}
    with Checkpoints(tmp_path, max_to_keep=2) as run:
        assert run.latest_step() is None
        with pytest.raises(FileNotFoundError, match="has no checkpoint at all"):
            run.restore(tree)
        for step in (1, 4, 6):
            run.save(step, {"x": jnp.arange(3) * step})
        with pytest.raises(ValueError, match="step 6 is not after the latest checkpoint's, 6"):
            run.save(6, tree)
    with Checkpoints(tmp_path, max_to_keep=2) as run:
        np.testing.assert_array_equal(run.restore(tree)["x"], [0, 6, 12])
        np.testing.assert_array_equal(run.restore(tree, step=4)["x"], [0, 4, 8])
        with pytest.raises(FileNotFoundError, match="has no checkpoint 1"):
            run.restore(tree, step=1)


def test_another_structure_or_shape_is_refused(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=1) as run:
        run.save(1, {"x": jnp.arange(3)})
        for wrong in ({"y": jnp.arange(3)}, {"x": jnp.arange(4)}, {"x": jnp.arange(3), "y": jnp.arange(3)}):
            with pytest.raises(ValueError, match=r"do not match|not compatible"):
                run.restore(wrong)
