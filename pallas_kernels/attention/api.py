"""The doors: attention, and the write before it. Each picks an implementation and checks what comes in.

An implementation that is not asked for by name is tried in the order of its platform; one that raises
`NotImplementedError` leaves the case to the next.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import backend
from pallas_kernels.attention import pallas, reference, write, xla
from pallas_kernels.attention.config import BlockConfig
from pallas_kernels.attention.reference import KVScales

IMPLEMENTATIONS = {"xla": xla.attention, "pallas": pallas.attention, "reference": reference.attention}
WRITERS = {"xla": xla.rotate_and_write, "pallas": write.rotate_and_write}
_KERNELS = ("pallas",)  # they take block sizes, can be interpreted, and must be told how heads are divided
_BEST = {"gpu": ("pallas", "xla")}  # by platform, the first that can; elsewhere "xla"


def attention(
    q_BTHD: Float[Array, "B T H D"],
    k_NGPD: Float[Array, "N G P D"] | Int[Array, "N G P D"],
    v_NGPD: Float[Array, "N G P D"] | Int[Array, "N G P D"],
    table_BM: Int[Array, "B M"],
    start_B: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    scales: KVScales | None = None,
    heads_axis: str | None = None,
    implementation: str | None = None,
    config: BlockConfig | None = None,
    interpret: bool | None = None,
) -> Float[Array, "B T H D"]:
    """Grouped-query causal attention of new tokens over a paged cache that already holds them.

    Args:
      q_BTHD: queries; token t of row b sits at position `start_B[b] + t`.
      k_NGPD: pages of keys, P positions each; int8 and float8 need `scales`.
      v_NGPD: pages of values.
      table_BM: int32, page of each row's m-th stretch of P positions; page 0 stands for none. Entries beyond a row's
        last query count for nothing, but must name a page.
      start_B: int32, position of each row's first query.
      scale: factor on the scores.
      window: sliding window in tokens, the query's own position included; None for full causal attention.
      soft_cap: scores are bounded to `soft_cap tanh(score / soft_cap)`; None for no bound.
      scales: what the pages' numbers are multiplied by.
      heads_axis: axis of the current mesh by which heads may be divided.
      implementation: "xla", "pallas" or "reference"; None takes the best that can.
      config: block sizes of a kernel; None for those measured on this device, else those of a rule.
      interpret: run a kernel in plain JAX, which tests its numbers; None does so where there is no GPU.

    Returns:
      Attention output in the queries' dtype; sums are in float32.

    Raises:
      ValueError: shapes do not fit together, or the implementation is unknown.
      NotImplementedError: the named implementation does not do this.
    """
    _check_shapes(q_BTHD, k_NGPD, v_NGPD, table_BM, start_B)
    if window is not None and window < 1:
        raise ValueError(f"{window=} must be at least 1")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"{soft_cap=} must be positive")
    if (k_NGPD.dtype.itemsize == 1) != (scales is not None):
        raise ValueError(f"pages of {k_NGPD.dtype} {'need' if scales is None else 'take no'} scales")
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    heads, pages = PartitionSpec(None, None, heads_axis), PartitionSpec(None, heads_axis)
    of_scales: Any = None if scales is None else jax.tree.map(lambda _: pages, scales)
    specs = (heads, pages, pages, PartitionSpec(), PartitionSpec(), of_scales)

    def run(name: str) -> jax.Array:
        kernel = name in _KERNELS
        own = {"config": config, "interpret": interpret} if kernel else {}

        def call(*arrays: Any) -> jax.Array:
            return IMPLEMENTATIONS[name](*arrays[:5], scales=arrays[5], **options, **own)

        placed = _divided(call, specs, heads, heads_axis) if kernel else call
        with jax.named_scope(f"attention_{name}"):
            return placed(q_BTHD, k_NGPD, v_NGPD, table_BM, start_B, scales)

    return _first_able(implementation, IMPLEMENTATIONS, run)


def rotate_and_write(
    qkv_BTGXD: Float[Array, "B T G X D"],
    cos_BTd: Float[Array, "B T half"],
    sin_BTd: Float[Array, "B T half"],
    k_NGPD: Float[Array, "N G P D"],
    v_NGPD: Float[Array, "N G P D"],
    table_BM: Int[Array, "B M"],
    start_B: Int[Array, "B"],
    *,
    heads_axis: str | None = None,
    implementation: str | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "N G P D"], Float[Array, "N G P D"]]:
    """Turn queries and keys by their positions and write keys and values into pages; see `xla.rotate_and_write`.

    Args:
      qkv_BTGXD: of each group its query heads, its key and its value.
      cos_BTd: cosines of the angles, float32.
      sin_BTd: sines of them, float32.
      k_NGPD: pages of keys; changed in place where the caller gives them away.
      v_NGPD: pages of values, likewise.
      table_BM: int32, the rows' pages.
      start_B: int32, position of each row's first token.
      heads_axis: axis of the current mesh by which heads may be divided.
      implementation: as in `attention`; "reference" writes as "xla" does.
      interpret: run a kernel in plain JAX; None does so where there is no GPU.

    Returns:
      The queries, and the pages with `T` more tokens a row.
    """
    groups, pages = PartitionSpec(None, None, heads_axis), PartitionSpec(None, heads_axis)
    specs = (groups, PartitionSpec(), PartitionSpec(), pages, pages, PartitionSpec(), PartitionSpec())

    def run(name: str) -> Any:
        call: Callable[..., Any] = WRITERS[name]
        if name in _KERNELS:
            call = _divided(functools.partial(call, interpret=interpret), specs, (groups, pages, pages), heads_axis)
        return call(qkv_BTGXD, cos_BTd, sin_BTd, k_NGPD, v_NGPD, table_BM, start_B)

    return _first_able("xla" if implementation == "reference" else implementation, WRITERS, run)


def _first_able(named: str | None, known: Mapping[str, Any], run: Callable[[str], Any]) -> Any:
    """Run the named implementation, or the first of the platform's that does not refuse."""
    if named is not None:
        if named not in known:
            raise ValueError(f"implementation={named!r} is unknown; known: {', '.join(known)}")
        return run(named)
    *others, last = _best()
    for name in others:
        try:
            return run(name)
        except NotImplementedError:
            continue
    return run(last)


def _best() -> Sequence[str]:
    return _BEST.get(backend.platform(), ("xla",))


def _divided(call: Callable[..., Any], in_specs: Any, out_specs: Any, axis: str | None) -> Callable[..., Any]:
    """Let each device of the current mesh run a kernel over its own heads: the compiler cannot divide a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if axis is None or mesh.empty or mesh.size == 1 or axis not in mesh.axis_names:
        return call
    return jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, start: jax.Array) -> None:
    if q.ndim != 4 or k.ndim != 4 or table.ndim != 2:
        raise ValueError(f"q and k need four dimensions and the table two, got {q.shape=} {k.shape=} {table.shape=}")
    if k.shape != v.shape:
        raise ValueError(f"{k.shape=} differs from {v.shape=}")
    if q.shape[0] != table.shape[0] or q.shape[3] != k.shape[3] or start.shape != q.shape[:1]:
        raise ValueError(f"batch or head size differ: {q.shape=} {k.shape=} {table.shape=} {start.shape=}")
    if q.shape[2] % k.shape[1]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[1]} key/value heads")
