"""Attention by the Pallas kernels: which of them takes a case, and with which block sizes."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import backend
from pallas_kernels.attention import decode, prefill
from pallas_kernels.attention.config import BlockConfig, Case, choose
from pallas_kernels.attention.reference import KVScales
from pallas_kernels.attention.tile import Rule


def case_of(q_BTHD: jax.Array, k_NGPD: jax.Array, table_BM: jax.Array) -> Case:
    """Describe a call by its shapes."""
    batch, tokens, heads, head_dim = q_BTHD.shape
    _, kv_heads, page_size, _ = k_NGPD.shape
    return Case(batch, tokens, heads, kv_heads, head_dim, table_BM.shape[1] * page_size, str(k_NGPD.dtype))


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
    config: BlockConfig | None = None,
    interpret: bool | None = None,
) -> Float[Array, "B T H D"]:
    """Same as `reference.attention`, with block sizes.

    Raises:
      NotImplementedError: no kernel does this; the message says why.
    """
    case, gpu = case_of(q_BTHD, k_NGPD, table_BM), backend.gpu()
    if k_NGPD.dtype.itemsize == 1 and k_NGPD.size >= 2**31:
        raise NotImplementedError(f"{k_NGPD.size} numbers of a byte each: offsets have 31 bits up to 4 GiB")
    config = choose(case, config, gpu)
    arguments = (q_BTHD, k_NGPD, v_NGPD, table_BM, start_B)
    options = {"rule": Rule(scale, window, soft_cap), "scales": scales, "config": config, "interpret": interpret}
    if not case.decodes:
        return prefill.attention(*arguments, **options)
    num_cores = backend.INTERPRETED_CORES if gpu is None else gpu.num_cores
    return decode.attention(*arguments, num_cores=num_cores, **options)
