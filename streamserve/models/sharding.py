"""How a model lies on a mesh: tensor parallelism over key/value heads and the gated layer's width.

Owns which dimension of which parameter is divided. Embedding, head and norms are whole on every device: a vocabulary
need not divide by the degree, and sampling wants whole logits.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from streamserve import mesh as meshes
from streamserve.types import Params

# Parameter name to the dimension that the tensor axis divides, and what that dimension is.
DIVIDED_DIMENSION: Mapping[str, tuple[int, str]] = {
    "qkv_kernel": (1, "key/value heads"),  # [E, G, M + 2, D]
    "qkv_bias": (0, "key/value heads"),  # [G, M + 2, D]
    "out_kernel": (0, "key/value heads"),  # [G, M, D, E]
    "gate_up_kernel": (2, "units of intermediate size"),  # [E, 2, F]
    "down_kernel": (0, "units of intermediate size"),  # [F, E]
}


def param_shardings(abstract_params: Params, mesh: Mesh) -> Any:
    """Place each parameter.

    Args:
      abstract_params: the tree of parameters or their shapes.
      mesh: with the tensor axis.

    Returns:
      A tree of `NamedSharding`; replicated when the mesh has one device.

    Raises:
      ValueError: the number of devices does not divide the key/value heads or the intermediate size.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = path[-1].key
        if mesh.size == 1 or name not in DIVIDED_DIMENSION:
            return meshes.replicated(mesh)
        dimension, meaning = DIVIDED_DIMENSION[name]
        if leaf.shape[dimension] % mesh.size:
            raise ValueError(
                f"a mesh of {mesh.size} devices does not divide the model's {leaf.shape[dimension]} {meaning}"
            )
        return NamedSharding(mesh, PartitionSpec(*[None] * dimension, meshes.TENSOR_AXIS))

    return jax.tree_util.tree_map_with_path(place, abstract_params)
