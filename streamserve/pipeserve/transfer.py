"""The hand-off: pages leave the prefill mesh and arrive on the decode mesh, without anybody waiting for them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from streamserve.kv.cache import num_bytes
from streamserve.mesh import kv_sharding, replicated, travel_sharding
from streamserve.types import KVPages, KVPool, Pools

_HEADS = 2  # dimension of `KVPages` that is divided


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Where each leaf of a record lies on a mesh: pages divided by heads, everything else whole on each device.

    Args:
      tree: arrays or their shapes.
      mesh: of prefill or decode.
    """
    divided = {KVPool: kv_sharding, KVPages: travel_sharding}

    def place(node: Any) -> Any:
        where = divided.get(type(node), replicated)(mesh)
        return jax.tree.map(lambda _: where, node)

    return jax.tree.map(place, tree, is_leaf=lambda node: type(node) in divided)


class PageParts(NamedTuple):
    """Pages as a mesh of another size wants them: one tree a device of it, each whole on every device of this mesh."""

    parts: tuple[Pools, ...]


def split_pages(pages: Pools, num_parts: int) -> PageParts:
    """Divide pages by heads for `num_parts` devices; to be jitted on the mesh that has them."""
    cut = lambda part: jax.tree.map(lambda leaf: jnp.split(leaf, num_parts, axis=_HEADS)[part], pages)  # noqa: E731
    return PageParts(tuple(cut(part) for part in range(num_parts)))


def transfer(tree: Any, mesh: Mesh) -> tuple[Any, int]:
    """Start the copy of pages or records to a mesh of whatever size; return at once.

    JAX reshards between meshes of different size by programs compiled on the spot, or through the host. So pages come
    divided for the devices that they go to (`PageParts`), and records, which are whole on every device, are copied to
    each from one.

    Args:
      tree: on a mesh of the same size, or `PageParts`, or whole on every device, or numpy arrays.
      mesh: where to.

    Returns:
      The tree on that mesh, and the bytes that change devices: 0 where they are there already.
    """
    if isinstance(tree, PageParts):
        moved = jax.tree.map(lambda *parts: _assemble(parts, travel_sharding(mesh), mesh), *tree.parts)
        return moved, num_bytes(tree)
    where = shardings(tree, mesh)
    first = next(iter(jax.tree.leaves(tree)))
    here = first.sharding.device_set if isinstance(first, jax.Array) else set()
    if here and len(here) != mesh.size:
        moved = jax.tree.map(lambda leaf, sharding: _assemble([leaf] * mesh.size, sharding, mesh), tree, where)
    else:
        moved = jax.device_put(tree, where)
    return moved, 0 if here == set(mesh.devices.flat) else num_bytes(tree)


def _assemble(parts: Sequence[jax.Array], sharding: NamedSharding, mesh: Mesh) -> jax.Array:
    """Copy the i-th part to the i-th device, and see them as one array: pages divided by heads, or whole on each."""
    placed = zip(parts, mesh.devices.flat, strict=True)
    shards = [jax.device_put(part.addressable_shards[0].data, device) for part, device in placed]
    shape = list(shards[0].shape)
    if not sharding.is_fully_replicated:
        shape[_HEADS] *= len(shards)
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, shards)
