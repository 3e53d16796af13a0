"""Shapes of real work, named once: tests, tuning and benchmarks share them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.config import Case

PAGE_SIZE = 64


class Spec(NamedTuple):
    """One call of attention.

    Attributes:
      name: for tables.
      batch: rows.
      tokens: query tokens a row.
      context: keys of a row before its queries; `lengths` overrides it.
      heads: query heads.
      kv_heads: key/value heads.
      head_dim: size of a head.
      dtype: of queries and pages.
      page_size: positions of a page.
      lengths: keys of each row before its queries, where rows differ.
    """

    name: str
    batch: int
    tokens: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    page_size: int = PAGE_SIZE
    lengths: tuple[int, ...] = ()

    @property
    def starts(self) -> tuple[int, ...]:
        """Position of each row's first query."""
        return self.lengths or (self.context,) * self.batch

    @property
    def columns(self) -> int:
        """Pages of the longest row."""
        return -(-(max(self.starts) + self.tokens) // self.page_size)

    @property
    def case(self) -> Case:
        """What block sizes depend on."""
        return Case(self.tokens, self.heads, self.kv_heads, self.head_dim, self.dtype)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that must be read: each once, whole sequences."""
        tokens = sum(start + self.tokens for start in self.starts)
        return 2 * tokens * self.kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products, of the keys that are seen alone."""
        seen = sum(self.tokens * start + self.tokens * (self.tokens + 1) // 2 for start in self.starts)
        return 4 * seen * self.heads * self.head_dim

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of queries, pages of keys and values, table and starts."""
        shape = jax.ShapeDtypeStruct
        pages = shape((1 + self.num_pages, self.kv_heads, self.page_size, self.head_dim), jnp.dtype(self.dtype))
        queries = shape((self.batch, self.tokens, self.heads, self.head_dim), jnp.dtype(self.dtype))
        table = shape((self.batch, self.columns), jnp.int32)
        return queries, pages, pages, table, shape((self.batch,), jnp.int32)

    @property
    def num_pages(self) -> int:
        """Pages that rows own, the scratch page not among them."""
        return sum(-(-(start + self.tokens) // self.page_size) for start in self.starts)

    def arrays(self, seed: int) -> tuple[jax.Array, ...]:
        """Make random arguments; pages are shuffled, so that neighbours in a row are none in memory."""
        rng, keys = np.random.default_rng(seed), jax.random.split(jax.random.key(seed), 3)
        order, table = 1 + rng.permutation(self.num_pages), np.zeros((self.batch, self.columns), np.int32)
        for row, start in enumerate(self.starts):
            count = -(-(start + self.tokens) // self.page_size)
            table[row, :count], order = order[:count], order[count:]
        values = [
            jax.random.normal(key, shape.shape, shape.dtype) for key, shape in zip(keys, self.shapes()[:3], strict=True)
        ]
        return *values, jnp.asarray(table), jnp.asarray(self.starts, jnp.int32)


# Llama-3-8B and Qwen3-8B have the same heads; Llama-2-7B has no groups; the bundled pair has 4 over 2 heads of 64.
DECODE = (
    Spec("llama3_8b_b1_1k", batch=1, tokens=1, context=1023),
    Spec("llama3_8b_b1_4k", batch=1, tokens=1, context=4095),
    Spec("llama3_8b_b1_32k", batch=1, tokens=1, context=32767),
    Spec("llama3_8b_b8_4k", batch=8, tokens=1, context=4095),
    Spec("llama3_8b_b8_16k", batch=8, tokens=1, context=16383),
    Spec("llama3_8b_b32_4k", batch=32, tokens=1, context=4095),
    Spec("llama3_8b_b64_2k", batch=64, tokens=1, context=2047),
    Spec("llama3_8b_ragged", batch=4, tokens=4, context=0, lengths=(4637, 45114, 1726, 1692)),
    Spec("llama2_7b_b8_2k", batch=8, tokens=1, context=2047, kv_heads=32),
)
VERIFY = (
    Spec("llama3_8b_b8_4k_t5", batch=8, tokens=5, context=4091),
    Spec("llama3_8b_b8_16k_t8", batch=8, tokens=8, context=16376),
    Spec("llama3_8b_b1_4k_t16", batch=1, tokens=16, context=4080),
    Spec("llama2_7b_b8_2k_t5", batch=8, tokens=5, context=2043, kv_heads=32),
)
PREFILL = (
    Spec("llama3_8b_prefill_4k", batch=4, tokens=4096, context=0),
    Spec("llama3_8b_prefill_16k", batch=1, tokens=16384, context=0),
    Spec("llama3_8b_tiles_b8", batch=8, tokens=64, context=4096),
    Spec("llama2_7b_prefill_4k", batch=1, tokens=4096, context=0, kv_heads=32),
)
BUNDLED = (
    Spec("bundled_b8_512", batch=8, tokens=1, context=511, heads=4, kv_heads=2, head_dim=64, dtype="float32"),
    Spec("bundled_b8_512_t5", batch=8, tokens=5, context=507, heads=4, kv_heads=2, head_dim=64, dtype="float32"),
    Spec("bundled_tiles_b8", batch=8, tokens=64, context=448, heads=4, kv_heads=2, head_dim=64, dtype="float32"),
)
SPECS = {spec.name: spec for spec in (*DECODE, *VERIFY, *PREFILL, *BUNDLED)}
