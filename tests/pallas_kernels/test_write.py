"""Rotary embedding and the write into pages: the plain version, and the kernel, interpreted, against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import append, rotate, rotate_and_write


def _inputs(*, batch=3, tokens=5, kv_heads=2, group=3, head_dim=16, page_size=4, columns=4, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    num_pages = batch * columns + 1
    qkv = jax.random.normal(keys[0], (batch, tokens, kv_heads, group + 2, head_dim), dtype)
    angle = jax.random.uniform(keys[1], (batch, tokens, head_dim // 2), maxval=100.0)
    pages = jax.random.normal(keys[2], (2, num_pages, kv_heads, page_size, head_dim), dtype)
    table = 1 + jnp.asarray(np.random.default_rng(0).permutation(num_pages - 1).reshape(batch, columns), jnp.int32)
    return qkv, jnp.cos(angle), jnp.sin(angle), pages[0], pages[1], table, jnp.asarray([0, 6, 14], jnp.int32)[:batch]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"dtype": "bfloat16"},
        {"tokens": 1, "group": 1},
        {"kv_heads": 1, "group": 4, "head_dim": 64, "page_size": 16},
    ],
)
def test_the_kernel_writes_what_the_plain_version_writes_and_nothing_else(shape):
    arguments = _inputs(**shape)
    got = rotate_and_write(*arguments, implementation="pallas", interpret=True)
    want = rotate_and_write(*arguments, implementation="xla")
    tolerance = 1e-6 if arguments[0].dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(*(np.asarray(q, np.float32) for q in (got[0], want[0])), atol=tolerance)
    for pages, plain, before in zip(got[1:], want[1:], arguments[3:5], strict=True):
        new, expected, old = (np.asarray(one, np.float32)[1:] for one in (pages, plain, before))
        np.testing.assert_allclose(new, expected, atol=tolerance)
        np.testing.assert_array_equal(new == old, expected == old)


def test_keys_and_values_lie_where_the_table_says():
    qkv, cos, sin, k, v, table, start = _inputs()
    _, k_after, v_after = rotate_and_write(qkv, cos, sin, k, v, table, start, implementation="xla")
    turned = rotate(qkv[..., -2, :], cos, sin)
    for row in range(3):
        for token in range(5):
            column, slot = divmod(int(start[row]) + token, 4)
            if column < 4:
                page = int(table[row, column])
                np.testing.assert_array_equal(k_after[page, :, slot], turned[row, token])
                np.testing.assert_array_equal(v_after[page, :, slot], qkv[row, token, :, -1])


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_what_has_no_page_goes_to_the_scratch_page(implementation):
    qkv, cos, sin, k, v, table, start = _inputs()
    table = table.at[1].set(0)  # a row that is not active; row 2 writes beyond its table
    _, k_after, _ = rotate_and_write(qkv, cos, sin, k, v, table, start, implementation=implementation)
    changed = np.flatnonzero((np.asarray(k_after) != np.asarray(k)).any(axis=(1, 2, 3)))
    owned = {int(table[0, column]) for column in (0, 1)} | {int(table[2, 3])}
    assert set(changed.tolist()) == owned | {0}


def test_a_rotation_keeps_lengths_and_turns_by_the_difference_of_positions():
    x = jax.random.normal(jax.random.key(1), (2, 1, 1, 8))
    frequency = jnp.asarray([1.0, 0.5, 0.1, 0.01])

    def product(first, second):
        angles = [jnp.full((1, 1, 4), float(position)) * frequency[None, None] for position in (first, second)]
        q, k = (rotate(x[i : i + 1], jnp.cos(angle), jnp.sin(angle)) for i, angle in enumerate(angles))
        return float((q * k).sum()), float(jnp.linalg.norm(q))

    np.testing.assert_allclose(product(7, 3)[0], product(104, 100)[0], rtol=1e-5)
    np.testing.assert_allclose(product(7, 3)[1], float(jnp.linalg.norm(x[0])), rtol=1e-6)


def test_a_kernel_that_cannot_write_says_so_and_the_best_takes_another():
    pages = jnp.zeros((2, 1, 4, 24))
    arguments = (jnp.ones((1, 1, 1, 3, 24)), *jnp.ones((2, 1, 1, 12)), pages, pages, jnp.ones((1, 1), jnp.int32))
    start = jnp.zeros((1,), jnp.int32)
    with pytest.raises(NotImplementedError, match="head size 24"):
        rotate_and_write(*arguments, start, implementation="pallas")
    assert rotate_and_write(*arguments, start)[0].shape == (1, 1, 1, 24)


def test_a_single_write_and_many_agree():
    _, _, _, k, v, table, start = _inputs(tokens=2)
    new = jax.random.normal(jax.random.key(2), (1, 2, 2, 16))
    both = append(k, v, new, new, table[:1], start[:1])
    one = append(k, v, new[:, :1], new[:, :1], table[:1], start[:1])
    two = append(*one, new[:, 1:], new[:, 1:], table[:1], start[:1] + 1)
    np.testing.assert_array_equal(np.asarray(both[0])[1:], np.asarray(two[0])[1:])
