"""The kernels, interpreted on the CPU, against the specification: any lengths and pages, NaN where nobody looks.

Shapes are few, since each is compiled; what lies in them is drawn anew.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from pallas_kernels.attention import BlockConfig, KVScales, attention, decode, reference, rotate_and_write, tile

SMALL = BlockConfig(block_rows=64, block_keys=16, num_warps=4, num_stages=2)
MANY = dataclasses.replace(SMALL, programs_per_core=8)
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 2e-3}


class Shape(NamedTuple):
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    columns: int
    dtype: str = "float32"
    pages: str = ""  # their dtype, where it is another
    window: int | None = None
    soft_cap: float | None = None
    config: BlockConfig | None = SMALL


SHAPES = {
    "one token, a page smaller than a step": Shape(3, 1, 4, 2, 16, 8, 20),
    "one token, steps smaller than a page, by the rule": Shape(3, 1, 8, 2, 64, 64, 5, config=None),
    "five tokens of three heads a group": Shape(2, 5, 6, 2, 32, 16, 9),
    "sixteen tokens, no groups": Shape(2, 16, 2, 2, 16, 16, 8),
    "a window": Shape(3, 3, 4, 2, 16, 8, 24, window=37),
    "a window of one": Shape(2, 1, 2, 1, 16, 8, 12, window=1),
    "capped scores": Shape(2, 2, 4, 1, 16, 16, 8, soft_cap=2.0),
    "bfloat16": Shape(2, 2, 4, 2, 128, 16, 8, dtype="bfloat16"),
    "float16": Shape(2, 2, 4, 2, 64, 16, 8, dtype="float16"),
    "bytes": Shape(2, 3, 4, 2, 32, 16, 8, pages="int8"),
    "float8": Shape(2, 3, 4, 2, 32, 16, 8, pages="float8_e4m3fn"),
    "more parts than are merged at once": Shape(2, 2, 2, 1, 256, 16, 128, config=MANY),
    "a prompt": Shape(
        2, 40, 4, 2, 16, 16, 8, config=BlockConfig(block_rows=32, block_keys=16, num_warps=4, num_stages=2)
    ),
    "a prompt with a window": Shape(2, 33, 2, 2, 16, 16, 8, window=21, config=SMALL),
    "a prompt in bytes": Shape(2, 24, 4, 4, 16, 8, 12, pages="int8"),
    "a prompt, by the rule": Shape(1, 64, 4, 2, 64, 64, 3, config=None),
}


@functools.cache
def _functions(shape: Shape):
    options = {"scale": shape.head_dim**-0.5, "window": shape.window, "soft_cap": shape.soft_cap}

    def kernel(*arrays, scales=None):
        return attention(
            *arrays, scales=scales, implementation="pallas", config=shape.config, interpret=True, **options
        )

    return jax.jit(kernel), jax.jit(functools.partial(reference.attention, **options))


def _case(shape: Shape, seed: int, starts: list[int], holes: list[bool]):
    """Make arguments: pages in any order, NaN in every place that nobody may read, rows of no pages at all."""
    rng = np.random.default_rng(seed)
    batch, capacity = shape.batch, shape.columns * shape.page_size
    num_pages = batch * shape.columns + 2
    table = 1 + rng.permutation(num_pages - 1)[: batch * shape.columns].reshape(batch, shape.columns)
    table[np.asarray(holes)] = 0
    if seed % 2:  # pages that are not there in the middle of rows
        table[rng.random(table.shape) < 0.2] = 0
    q = rng.standard_normal((batch, shape.tokens, shape.heads, shape.head_dim))
    kind = shape.pages or shape.dtype
    dims = (num_pages, shape.kv_heads, shape.page_size, shape.head_dim)
    k, v = rng.standard_normal(dims), rng.standard_normal(dims)
    scales = None
    if shape.pages:
        factors = [jnp.asarray(rng.uniform(0.01, 0.03, dims[:3]), jnp.float32) for _ in range(2)]
        k, v = (np.clip(np.round(one * 40), -127, 127) for one in (k, v))
        scales = KVScales(*factors)
    unread = np.ones(dims[:3], bool)
    for row in range(batch):
        for position in range(min(starts[row] + shape.tokens, capacity)):
            unread[table[row, position // shape.page_size], :, position % shape.page_size] = False
    unread[0] = True
    poison = 127 if kind == "int8" else np.nan
    k[unread], v[unread] = poison, poison
    if scales is not None:
        scales = KVScales(*(jnp.where(unread, jnp.nan, one) for one in scales))
    pages = [jnp.asarray(one, jnp.float32).astype(kind) for one in (k, v)]
    queries = jnp.asarray(q, jnp.float32).astype(shape.dtype)
    return (queries, *pages, jnp.asarray(table, jnp.int32), jnp.asarray(starts, jnp.int32)), scales


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_kernel_computes_what_the_specification_says(name, data):
    shape = SHAPES[name]
    longest = shape.columns * shape.page_size - shape.tokens
    # A row at the end of its table drafts beyond it: those tokens have no page.
    length = st.one_of(st.sampled_from([0, longest, longest + shape.tokens - 1]), st.integers(0, longest))
    starts = data.draw(st.lists(length, min_size=shape.batch, max_size=shape.batch))
    holes = data.draw(st.lists(st.booleans(), min_size=shape.batch, max_size=shape.batch))
    arrays, scales = _case(shape, data.draw(st.integers(0, 1000)), starts, holes)
    kernel, specification = _functions(shape)
    got, want = kernel(*arrays, scales=scales), specification(*arrays, scales=scales)
    assert got.dtype == arrays[0].dtype
    assert np.isfinite(np.asarray(got, np.float32)).all(), "what nobody may read was read"
    np.testing.assert_array_equal(np.asarray(got, np.float32)[np.asarray(holes)], 0.0)
    error = np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32)).max()
    assert error <= TOLERANCE[shape.dtype], error


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_a_row_gets_does_not_depend_on_the_batch_to_the_last_bit(tokens):
    shape = Shape(8, tokens, 2, 1, 64, 16, 40)
    (q, k, v, table, _), _ = _case(shape, 0, [620 - tokens] * 8, [False] * 8)
    starts = jnp.asarray([531, 3, 600, 0, 64, 17, 255, 300], jnp.int32)
    alone = None
    for batch in (1, 2, 3, 8):
        kernel, _ = _functions(shape._replace(batch=batch))
        for others in (starts, starts.at[1:].set(7)):
            got = np.asarray(kernel(q[:batch], k, v, table[:batch], others[:batch]))[0]
            alone = got if alone is None else alone
            np.testing.assert_array_equal(got, alone)


@settings(max_examples=60, deadline=None)
@given(
    starts=st.lists(st.integers(0, 2050), min_size=6, max_size=6),
    most=st.integers(1, 40),
    window=st.one_of(st.none(), st.integers(1, 900)),
    length=st.integers(1, 5),
)
def test_parts_hold_every_key_of_every_row_once_and_fit_the_room(starts, most, window, length):
    page_size, block, columns = 16, 16, 128
    capacity = page_size * columns
    table = np.zeros((len(starts), columns), np.int32)
    for row, start in enumerate(starts):
        table[row, : -(-(start + length) // page_size)] = 1
    start_B = jnp.asarray(starts, jnp.int32)
    parts = decode.divide_keys(
        jnp.asarray(table), start_B, length=length, page_size=page_size, window=window, block=block, most=most
    )
    through, first, end = np.asarray(parts.plan)
    assert through[-1] <= parts.room
    assert parts.size % block == 0
    assert -(-capacity // parts.size) <= most or parts.size == decode.MIN_PART_BLOCKS * block
    assert parts.size <= max(decode.MIN_PART_BLOCKS * block, -(-capacity // most) + block - 1), "no larger than need be"
    before = 0
    for row, start in enumerate(starts):
        count, before = through[row] - before, through[row]
        keys = range(max(0, start - window + 1) if window else 0, min(start + length, capacity))
        if not len(keys):
            assert count == 0
            continue
        assert 0 <= keys[0] - first[row] < block
        assert first[row] % block == 0
        assert end[row] == keys[-1] + 1
        assert first[row] + (count - 1) * parts.size < end[row] <= first[row] + count * parts.size


@pytest.mark.parametrize(
    ("group", "length", "block_rows"), [(4, 1, 16), (3, 5, 64), (1, 64, 32), (8, 40, 128), (5, 3, 16)]
)
def test_tiles_hold_every_query_once(group, length, block_rows):
    cut = tile.cut(group, length, block_rows)
    assert cut.heads * cut.tokens <= max(block_rows, 1)
    seen = {
        (head_tile * cut.heads + x // cut.tokens, token_tile * cut.tokens + x % cut.tokens)
        for head_tile in range(cut.head_tiles)
        for token_tile in range(cut.token_tiles)
        for x in range(cut.heads * cut.tokens)
    }
    assert {(head, token) for head in range(group) for token in range(length)} <= seen
    assert len(seen) == cut.head_tiles * cut.token_tiles * cut.heads * cut.tokens


def test_the_decode_kernel_refuses_tiles_that_do_not_hold_a_rows_tokens():
    arrays, _ = _case(Shape(1, 16, 1, 1, 16, 16, 4), 0, [3], [False])
    rule = tile.Rule(1.0, None, None)
    small = BlockConfig(block_rows=16, block_keys=16, num_warps=4, num_stages=2)
    options = {"rule": rule, "config": small, "num_cores": 4, "interpret": True}
    decode.attention(tile.Inputs(*arrays, None), **options)
    queries = jnp.pad(arrays[0], ((0, 0), (0, 1), (0, 0), (0, 0)))
    with pytest.raises(ValueError, match="must hold 1 heads of 17 tokens"):
        decode.attention(tile.Inputs(queries, *arrays[1:], None), **options)


def test_devices_divide_heads_among_themselves():
    shape = Shape(2, 2, 8, 4, 16, 16, 4)
    arrays, _ = _case(shape, 0, [20, 3], [False, False])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, pages = PartitionSpec(None, None, "tensor"), PartitionSpec(None, "tensor")
    specs = (heads, pages, pages, PartitionSpec(), PartitionSpec())
    placed = [jax.device_put(a, jax.sharding.NamedSharding(mesh, b)) for a, b in zip(arrays, specs, strict=True)]
    options = {"scale": 0.25, "implementation": "pallas", "config": SMALL, "heads_axis": "tensor"}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(functools.partial(attention, **options)).trace(*placed)
    assert "shard_map" in str(traced.jaxpr), "a compiler divides what is interpreted, but not a kernel"
    compiled = traced.lower().compile()
    got, want = compiled(*placed), reference.attention(*arrays, scale=0.25)
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=2e-6)
    assert "all-gather" not in compiled.as_text(), "a device works on heads that are another's"


def test_devices_write_the_heads_that_are_theirs():
    keys = jax.random.split(jax.random.key(0), 2)
    qkv, pages = jax.random.normal(keys[0], (2, 3, 4, 4, 16)), jax.random.normal(keys[1], (5, 4, 8, 16))
    angle = jnp.ones((2, 3, 8))
    table, start = jnp.asarray([[1, 2], [3, 4]], jnp.int32), jnp.asarray([6, 0], jnp.int32)
    arguments = (qkv, jnp.cos(angle), jnp.sin(angle), pages, pages, table, start)
    want = rotate_and_write(*arguments, implementation="xla")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, kept = PartitionSpec(None, None, "tensor"), PartitionSpec()
    specs = (heads, kept, kept, PartitionSpec(None, "tensor"), PartitionSpec(None, "tensor"), kept, kept)
    placed = [jax.device_put(a, jax.sharding.NamedSharding(mesh, b)) for a, b in zip(arguments, specs, strict=True)]
    call = functools.partial(rotate_and_write, implementation="pallas", heads_axis="tensor")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(call).trace(*placed)
    assert "shard_map" in str(traced.jaxpr)
    compiled = traced.lower().compile()
    for one, plain in zip(compiled(*placed), want, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(plain), atol=1e-6)
    assert "all-gather" not in compiled.as_text()
