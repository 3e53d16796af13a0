"""The one door to attention: picks an implementation, checks what comes in."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import reference, xla

# In the order of preference when none is named.
IMPLEMENTATIONS = {"xla": xla.attention, "reference": reference.attention}


def attention(
    q_BTHD: Float[Array, "B T H D"],
    k_NGPD: Float[Array, "N G P D"],
    v_NGPD: Float[Array, "N G P D"],
    table_BM: Int[Array, "B M"],
    start_B: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """Grouped-query causal attention of new tokens over a paged cache that already holds them.

    Args:
      q_BTHD: queries; token t of row b sits at position `start_B[b] + t`.
      k_NGPD: pages of keys, P positions each.
      v_NGPD: pages of values.
      table_BM: int32, page of each row's m-th stretch of P positions; page 0 stands for none. Entries beyond a row's
        last query count for nothing, but must name a page.
      start_B: int32, position of each row's first query.
      scale: factor on the scores.
      window: sliding window in tokens, the query's own position included; None for full causal attention.
      implementation: "xla" or "reference"; None takes the best.

    Returns:
      Attention output in the queries' dtype; sums are in float32.

    Raises:
      ValueError: shapes do not fit together, or the implementation is unknown.
    """
    _check_shapes(q_BTHD, k_NGPD, v_NGPD, table_BM, start_B)
    if window is not None and window < 1:
        raise ValueError(f"{window=} must be at least 1")
    name = implementation if implementation is not None else next(iter(IMPLEMENTATIONS))
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} is unknown; known: {', '.join(IMPLEMENTATIONS)}")
    with jax.named_scope(f"attention_{name}"):
        return IMPLEMENTATIONS[name](q_BTHD, k_NGPD, v_NGPD, table_BM, start_B, scale=scale, window=window)


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, start: jax.Array) -> None:
    if q.ndim != 4 or k.ndim != 4 or table.ndim != 2:
        raise ValueError(f"q and k need four dimensions and the table two, got {q.shape=} {k.shape=} {table.shape=}")
    if k.shape != v.shape:
        raise ValueError(f"{k.shape=} differs from {v.shape=}")
    if q.shape[0] != table.shape[0] or q.shape[3] != k.shape[3] or start.shape != q.shape[:1]:
        raise ValueError(f"batch or head size differ: {q.shape=} {k.shape=} {table.shape=} {start.shape=}")
    if q.shape[2] % k.shape[1]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[1]} key/value heads")
