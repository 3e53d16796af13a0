"""Records of many small arrays as two: what moves between host and meshes costs by the array, not by the byte."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Packed(NamedTuple):
    """Leaves of a record side by side, in the order of its tree; arrays of numpy or of JAX."""

    words: Any  # [B, W] int32, the bits of all leaves of 32 bits
    flags: Any  # [B, F] bool


def pack(tree: Any) -> Packed:
    """Lay out a record, on the host or inside a program.

    Args:
      tree: leaves [B, ...] of 32 bits or bool, all of numpy or all of JAX.
    """
    leaves = jax.tree.leaves(tree)
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    assert on_host or not any(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves), "numpy and JAX are mixed"
    xp: Any = np if on_host else jnp
    flat = [leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:])) for leaf in leaves]
    batch = leaves[0].shape[0]
    words = [_bits(leaf) for leaf in flat if leaf.dtype != bool]
    flags = [leaf for leaf in flat if leaf.dtype == bool]
    return Packed(
        words=xp.concatenate([xp.zeros((batch, 0), np.int32), *words], axis=1),
        flags=xp.concatenate([xp.zeros((batch, 0), bool), *flags], axis=1),
    )


def unpack(packed: Packed, shapes: Any) -> Any:
    """Undo `pack`, on the host or inside a program.

    Args:
      packed: of a batch of any size.
      shapes: leaves with the `shape` and `dtype` of those that were packed.
    """
    leaves, words, flags = [], 0, 0
    for shape in jax.tree.leaves(shapes):
        width = math.prod(shape.shape[1:])
        if shape.dtype == bool:
            part = packed.flags[:, flags : flags + width]
            flags += width
        else:
            part = _from_bits(packed.words[:, words : words + width], shape.dtype)
            words += width
        leaves.append(part.reshape(part.shape[0], *shape.shape[1:]))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _bits(leaf: Any) -> Any:
    assert leaf.dtype.itemsize == 4, f"{leaf.dtype} is not of 32 bits"
    if isinstance(leaf, np.ndarray):
        return np.ascontiguousarray(leaf).view(np.int32)
    return jax.lax.bitcast_convert_type(leaf, jnp.int32)


def _from_bits(words: Any, dtype: Any) -> Any:
    if isinstance(words, np.ndarray):
        return np.ascontiguousarray(words).view(dtype)
    return jax.lax.bitcast_convert_type(words, dtype)
