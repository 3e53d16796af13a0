"""The hand-off: a prefix leaves the prefill mesh and arrives on the decode mesh, without anybody waiting for it."""

from typing import Any

import jax
from jax.sharding import Mesh

from streamserve.kv.cache import num_bytes
from streamserve.mesh import kv_sharding, replicated
from streamserve.types import KVCache, Prefix


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Where each leaf of a record lies on a mesh: caches divided by heads, everything else whole on each device.

    Args:
      tree: arrays or their shapes.
      mesh: of prefill or decode.
    """
    is_cache = lambda node: isinstance(node, KVCache)  # noqa: E731

    def place(node: Any) -> Any:
        where = kv_sharding(mesh) if is_cache(node) else replicated(mesh)
        return jax.tree.map(lambda _: where, node)

    return jax.tree.map(place, tree, is_leaf=is_cache)


def transfer(prefix: Prefix, mesh: Mesh) -> tuple[Prefix, int]:
    """Start the copy of a prefix to the decode mesh; return at once.

    Returns:
      The prefix on the decode mesh, and the bytes that change devices: 0 where both meshes are the same devices.
    """
    length = prefix.length
    moved = jax.device_put(prefix, shardings(prefix, mesh))
    stays = length.sharding.device_set == moved.length.sharding.device_set
    return moved, 0 if stays else num_bytes(prefix)
