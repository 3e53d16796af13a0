"""The one file of the kernels that names Triton, Mosaic or a device: what differs between JAX's versions and chips.

Kernels are written in the style that Pallas lowers through Triton. That way is deprecated since JAX 0.11 and alive in
0.12; the default of `pl.pallas_call` has changed between versions, so its compiler parameters are always given here. A
kernel that is rewritten for Mosaic GPU replaces the call in its own file; nothing else names a compiler.

A Pallas block must have powers of two as sizes, and a matrix product at least `MIN_DOT` in each. What a kernel reads by
index arrays is masked: where a mask is false nothing is read, and nothing written.
"""

import functools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # said above
    from jax.experimental.pallas import triton as pltriton

LOG2E = math.log2(math.e)
MIN_DOT = 16
CUSTOM_CALL = "__gpu$xla.gpu.triton"  # what a kernel is in the lowered program
INTERPRETED_CORES = 4  # of the GPU that an interpreted kernel pretends to run on: few, so that small cases are split
_DEFAULT_CORES = 108  # where a device does not say: an A100
_CAPABILITIES = {"NVIDIA H200": 9.0, "NVIDIA H100 80GB HBM3": 9.0, "NVIDIA A100-SXM4-40GB": 8.0}  # of abstract devices
FLOAT8_CAPABILITY = 8.9  # from here on


class Gpu(NamedTuple):
    """What the kernels must know of a GPU.

    Attributes:
      kind: as JAX names it; "" where it is described by its numbers alone.
      num_cores: streaming multiprocessors.
      capability: compute capability, 9.0 for Hopper; None where nobody says.
    """

    kind: str
    num_cores: int
    capability: float | None = None


def platform() -> str:
    """Say where a program that is traced now will run: "gpu" or "cpu".

    That of the mesh it is traced for, if one is set, else JAX's default: who places a computation on another device
    than the default one sets its mesh, or names an implementation.
    """
    device = _abstract_device()
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("gpu", "cuda") else name


def gpu() -> Gpu | None:
    """Describe the GPU that a program which is traced now will run on; None where it is none."""
    if platform() != "gpu":
        return None
    device = _abstract_device()
    if device is not None:
        kind = device.device_kind
        return Gpu(kind, device.num_cores or _DEFAULT_CORES, _CAPABILITIES.get(kind))
    here: Any = jax.devices()[0]
    return Gpu(here.device_kind, getattr(here, "core_count", _DEFAULT_CORES), float(here.compute_capability))


def _abstract_device() -> Any:
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def file_name(kind: str) -> str:
    """Turn a device's kind into the name of its tuned table."""
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_") + ".json"


def call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: Sequence[int],
    inputs: int,
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    aliases: dict[int, int] | None = None,
    interpret: bool | None = None,
) -> Callable[..., Any]:
    """Make a kernel callable: all of its arguments and results stay where they are, and it indexes them itself.

    Args:
      kernel: takes a ref for each argument and each result, whole arrays in the device's memory.
      name: in profiles and compiled text.
      grid: programs.
      inputs: how many arguments it has.
      out_shape: shapes of the results.
      num_warps: of a program.
      num_stages: iterations of its loops that overlap.
      aliases: argument to result, for those that are changed in place.
      interpret: run it in plain JAX; None does so where there is no GPU.
    """
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid=tuple(grid),
        in_specs=[whole] * inputs,
        out_specs=jax.tree.map(lambda _: whole, out_shape),
        out_shape=out_shape,
        input_output_aliases=aliases or {},
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=platform() != "gpu" if interpret is None else interpret,
        name=name,
    )


def load(ref: Any, index: tuple[Any, ...], mask: jax.Array | None = None, other: float = 0) -> jax.Array:
    """Read at index arrays that broadcast together; `other` where the mask is false."""
    index = tuple(jnp.asarray(part, jnp.int32) for part in index)
    shape = jnp.broadcast_shapes(*(part.shape for part in index))
    if mask is None or not shape:
        return pltriton.load(ref.at[index])
    return pltriton.load(ref.at[index], mask=jnp.broadcast_to(mask, shape), other=jnp.asarray(other, ref.dtype))


def store(ref: Any, index: tuple[Any, ...], value: jax.Array, mask: jax.Array) -> None:
    """Write at index arrays that broadcast together, where the mask is true."""
    value, index = value.astype(ref.dtype), tuple(jnp.asarray(part, jnp.int32) for part in index)
    pltriton.store(ref.at[index], value, mask=jnp.broadcast_to(mask, value.shape))


def dot(left_XD: jax.Array, right_YD: jax.Array, *, transposed: bool) -> jax.Array:
    """Multiply matrices, summed in float32; float32 factors are multiplied as such, not in tensor-float-32.

    Args:
      left_XD: the left factor.
      right_YD: the right one: [Y, D] where `transposed`, else [D, Y].
      transposed: multiply by the transpose.
    """
    exact = left_XD.dtype == jnp.float32
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if exact else None
    return jax.lax.dot_general(left_XD, right_YD, contract, precision, preferred_element_type=jnp.float32)


@functools.cache
def power_of_two(number: int) -> int:
    """Round up to a power of two."""
    return 1 << max(0, number - 1).bit_length()
