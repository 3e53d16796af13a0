"""What else computes attention, where it is installed: JAX's own paged kernel, cuDNN through JAX, and torch.

Each gets the cache in the layout that it likes best, laid out once and not timed: the deprecated kernel has heads
before pages, cuDNN and torch a piece a row.
"""

import functools
import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_kernels import backend
from pallas_kernels.arg_specs import Spec
from pallas_kernels.attention import attention


class Contender(NamedTuple):
    """An implementation under JAX.

    Attributes:
      prepare: `(pages of keys, of values, table) -> cache`, in its own layout.
      call: `(queries, cache, table, starts) -> output`.
    """

    prepare: Callable[..., Any]
    call: Callable[..., jax.Array]


def able(spec: Spec) -> Mapping[str, Contender]:
    """List the peers under JAX that take this shape on this machine."""
    if backend.gpu() is None:
        return {}
    peers: dict[str, Contender] = {}
    if spec.tokens == 1 and importlib.util.find_spec("jax.experimental.pallas.ops.gpu.paged_attention"):
        peers["jax_paged"] = Contender(_heads_first, functools.partial(_jax_paged, spec=spec))
    if is_plain(spec) and spec.dtype in ("bfloat16", "float16"):
        peers["cudnn"] = Contender(functools.partial(contiguous, spec=spec), functools.partial(_cudnn, spec=spec))
    return peers


def is_plain(spec: Spec) -> bool:
    """Whether all rows are as long, and queries are a single one or all of the row: no offset of the causal mask."""
    return len(set(spec.starts)) == 1 and (spec.tokens == 1 or spec.starts[0] == 0)


def contiguous(keys: jax.Array, values: jax.Array, table: jax.Array, *, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """Lay pages out as rows [B, C, G, D]."""
    length = spec.starts[0] + spec.tokens

    def rows(pool: jax.Array) -> jax.Array:
        cut = pool[table].swapaxes(2, 3)
        return cut.reshape(spec.batch, -1, *cut.shape[-2:])[:, :length]

    return rows(keys), rows(values)


def _heads_first(keys: jax.Array, values: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
    del table
    return keys.swapaxes(0, 1), values.swapaxes(0, 1)


def _jax_paged(q: Any, cache: Any, table: Any, start: Any, *, spec: Spec) -> jax.Array:
    """JAX's deprecated kernel: no scale, and splits that divide the pages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import paged_attention  # noqa: PLC0415  # importing it warns

    splits = next(count for count in (16, 8, 4, 2, 1) if spec.columns % count == 0)
    scaled = (q[:, 0] * spec.head_dim**-0.5).astype(q.dtype)
    out = paged_attention.paged_attention(scaled, *cache, table, start + 1, k_splits=splits, pages_per_compute_block=1)
    return out[:, None]


def _cudnn(q: Any, cache: Any, table: Any, start: Any, *, spec: Spec) -> jax.Array:
    del table, start
    options = {"scale": spec.head_dim**-0.5, "is_causal": spec.tokens > 1, "implementation": "cudnn"}
    return jax.nn.dot_product_attention(q, *cache, **options)


def torch_sdpa(spec: Spec, arrays: Any, *, repeats: int, calls: int) -> tuple[list[float], np.ndarray] | None:
    """Time torch's scaled_dot_product_attention on contiguous rows; gives seconds a call and the output, or None.

    Args:
      spec: the shape.
      arrays: its arguments.
      repeats: measurements.
      calls: in one measurement.
    """
    if not importlib.util.find_spec("torch") or not is_plain(spec):
        return None
    torch = importlib.import_module("torch")  # a peer, where it is installed; nothing of ours needs it

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (device == "cuda") != (backend.gpu() is not None):
        return None
    queries, keys, values, table, _ = arrays
    kind = getattr(torch, spec.dtype)
    as_torch = lambda x: torch.tensor(np.asarray(x, np.float32)).to(device, kind).transpose(1, 2).contiguous()  # noqa: E731
    q, k, v = map(as_torch, (queries, *contiguous(keys, values, table, spec=spec)))
    options = {"scale": spec.head_dim**-0.5, "is_causal": spec.tokens > 1, "enable_gqa": True}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def once() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    seconds = []
    with torch.inference_mode():
        out = once().transpose(1, 2).float().cpu().numpy()
        for _ in range(repeats):
            wait()
            begun = time.perf_counter()
            for _ in range(calls):
                once()
            wait()
            seconds.append((time.perf_counter() - begun) / calls)
    return seconds, out


def ours(spec: Spec, implementation: str) -> Contender:
    """One of our implementations, over pages as they are."""

    def call(q: Any, cache: Any, table: Any, start: Any) -> jax.Array:
        keys, values = cache
        return attention(q, keys, values, table, start, scale=spec.head_dim**-0.5, implementation=implementation)

    return Contender(lambda keys, values, table: (keys, values), call)
