"""Every implementation of attention against the specification, and the specification against its own meaning."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from pallas_kernels.attention import api, attention

FAST = ("xla",)  # the kernels, interpreted, take seconds a shape: test_kernels.py has them


def _inputs(batch, length, heads, kv_heads, head_dim, capacity, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (batch, length, heads, head_dim), dtype)
    k = jax.random.normal(keys[1], (batch, kv_heads, capacity, head_dim), dtype)
    return q, k, jax.random.normal(keys[2], k.shape, dtype)


def _paged(q, k_BGCD, v_BGCD, start_B, *, page_size=64, seed=0, **options):
    """Cut a contiguous cache into pages, shuffle them among pages full of NaN, and attend over them."""
    batch, kv_heads, capacity, head_dim = k_BGCD.shape
    columns = -(-capacity // page_size)
    num_pages = 2 * batch * columns + 1
    table = 1 + np.random.default_rng(seed).permutation(num_pages - 1)[: batch * columns].reshape(batch, columns)

    def pages(cache):
        padded = jnp.pad(cache, ((0, 0), (0, 0), (0, columns * page_size - capacity), (0, 0)), constant_values=jnp.nan)
        cut = padded.reshape(batch, kv_heads, columns, page_size, head_dim).swapaxes(1, 2)
        return jnp.full((num_pages, *cut.shape[2:]), jnp.nan, cache.dtype).at[table].set(cut)

    return attention(q, pages(k_BGCD), pages(v_BGCD), jnp.asarray(table, jnp.int32), start_B, **options)


class AttentionTest(parameterized.TestCase):
    @parameterized.product(
        implementation=FAST,
        shape=((1, 1, 4, 2, 64), (1, 3, 4, 2, 1400), (3, 5, 6, 2, 700), (2, 300, 2, 1, 300), (2, 4, 4, 4, 256)),
        window=(None, 1, 7, 290),
        page_size=(16, 64),
    )
    def test_agrees_with_the_reference(self, implementation, shape, window, page_size):
        batch, length, heads, kv_heads, capacity = shape
        q, k, v = _inputs(batch, length, heads, kv_heads, 16, capacity)
        start = jnp.asarray(np.linspace(capacity - length, 0, batch).astype(np.int32))
        got = _paged(q, k, v, start, scale=0.25, window=window, page_size=page_size, implementation=implementation)
        want = _paged(q, k, v, start, scale=0.25, window=window, seed=1, implementation="reference")
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=3e-6)

    @parameterized.product(implementation=FAST, dtype=("bfloat16", "float16"))
    def test_half_precision_stays_near_the_reference(self, implementation, dtype):
        q, k, v = _inputs(2, 3, 4, 2, 32, 400, jnp.dtype(dtype))
        start = jnp.asarray([5, 390], jnp.int32)
        got = _paged(q, k, v, start, scale=0.2, implementation=implementation)
        want = _paged(q, k, v, start, scale=0.2, implementation="reference")
        self.assertEqual(got.dtype, q.dtype)
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=0.03)

    @parameterized.product(implementation=tuple(api.IMPLEMENTATIONS))
    def test_a_single_visible_key_returns_its_value(self, implementation):
        q, k, v = _inputs(2, 1, 4, 2, 16, 300)
        out = _paged(q, k, v, jnp.zeros((2,), jnp.int32), scale=1.0, implementation=implementation)
        np.testing.assert_allclose(np.asarray(out)[:, 0], np.repeat(np.asarray(v)[:, :, 0], 2, axis=1), rtol=1e-6)

    @parameterized.product(implementation=("xla", "pallas"))
    def test_a_row_does_not_see_its_neighbours_length(self, implementation):
        # The batch stays as large: a matrix product of another shape may round differently.
        q, k, v = _inputs(2, 2, 4, 2, 16, 900)
        alone = _paged(q, k, v, jnp.array([40, 0]), scale=0.3, implementation=implementation)
        beside = _paged(q, k, v, jnp.array([40, 890]), scale=0.3, implementation=implementation)
        np.testing.assert_array_equal(np.asarray(alone)[0], np.asarray(beside)[0])

    @parameterized.product(implementation=tuple(api.IMPLEMENTATIONS), bad=(1e9, float("nan"), float("inf")))
    def test_what_lies_beyond_the_queries_is_never_read(self, implementation, bad):
        q, k, v = _inputs(1, 2, 2, 1, 16, 300)
        start = jnp.array([100])
        clean = _paged(q, k, v, start, scale=0.3, implementation=implementation)
        dirty = _paged(
            q, k.at[:, :, 102:].set(bad), v.at[:, :, 102:].set(bad), start, scale=0.3, implementation=implementation
        )
        np.testing.assert_array_equal(np.asarray(clean), np.asarray(dirty))

    @parameterized.parameters(
        ({"window": 0}, "window=0"),
        ({"implementation": "triton"}, "unknown; known: xla, pallas, reference"),
    )
    def test_bad_arguments_are_named(self, arguments, message):
        q, k, v = _inputs(1, 1, 2, 1, 8, 16)
        table = jnp.zeros((1, 1), jnp.int32)
        with self.assertRaisesRegex(ValueError, message):
            attention(q, k, v, table, jnp.zeros((1,), jnp.int32), scale=1.0, **arguments)

    def test_shapes_that_do_not_fit_are_named(self):
        q, k, v = _inputs(1, 1, 3, 2, 8, 16)
        table = jnp.zeros((1, 1), jnp.int32)
        with self.assertRaisesRegex(ValueError, "3 query heads are not a multiple of 2"):
            attention(q, k, v, table, jnp.zeros((1,), jnp.int32), scale=1.0)
        with self.assertRaisesRegex(ValueError, "differs from"):
            attention(q[:, :, :2], k, v[:, :, :8], table, jnp.zeros((1,), jnp.int32), scale=1.0)
