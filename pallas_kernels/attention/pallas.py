"""Attention by the Pallas kernels: which of them takes a case, and with which block sizes."""

from jaxtyping import Array, Float, Int

from pallas_kernels import backend
from pallas_kernels.attention import decode, prefill
from pallas_kernels.attention.config import BlockConfig, Case, choose
from pallas_kernels.attention.reference import KVScales
from pallas_kernels.attention.tile import Inputs, Rule


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
    if k_NGPD.dtype.itemsize == 1 and k_NGPD.size >= 2**31:
        raise NotImplementedError(f"{k_NGPD.size} numbers of a byte each: offsets have 31 bits up to 4 GiB")
    _, tokens, heads, head_dim = q_BTHD.shape
    case, gpu = Case(tokens, heads, k_NGPD.shape[1], head_dim, str(k_NGPD.dtype)), backend.gpu()
    config = choose(case, config, gpu)
    inputs, rule = Inputs(q_BTHD, k_NGPD, v_NGPD, table_BM, start_B, scales), Rule(scale, window, soft_cap)
    if not case.decodes:
        return prefill.attention(inputs, rule=rule, config=config, interpret=interpret)
    num_cores = backend.INTERPRETED_CORES if gpu is None else gpu.num_cores
    return decode.attention(inputs, rule=rule, config=config, num_cores=num_cores, interpret=interpret)
