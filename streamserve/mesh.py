"""Device meshes of stream pairs. The one place that divides devices; knows nothing of models or requests."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from streamserve.config import TopologyConfig
from streamserve.types import Device

TENSOR_AXIS = "tensor"  # the one axis of every mesh: tensor parallelism


class PairMeshes(NamedTuple):
    """Meshes of one stream pair.

    Attributes:
      prefill: computes prompts.
      decode: computes outputs; the same mesh where the pair is colocated.
      colocated: both work on one mesh and one pool of pages.
    """

    prefill: Mesh
    decode: Mesh
    colocated: bool


def request_cpu_devices(topology: TopologyConfig) -> None:
    """Ask JAX for enough host devices, in case the platform is the CPU.

    It only works before JAX has touched a device. Afterwards this does nothing, and `make_pairs` says what is missing.
    """
    wanted = num_host_devices(topology)
    asked = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    if asked >= wanted:
        return
    try:
        jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:  # backends are up already: what they offer is checked by make_pairs
        return


def num_host_devices(topology: TopologyConfig) -> int:
    """Host devices that a topology takes on CPU: those of its meshes, and no more.

    More would cost: XLA starts a thread for every device, even where cores are fewer, and a step of eight rows on two
    cores takes 1.35 times as long with three devices as with two. Two in any case, so that a colocated pair does not
    keep one of two meshes from being built later.
    """
    return max(2, num_devices(topology))


def num_devices(topology: TopologyConfig) -> int:
    """Devices that a topology takes when none is shared."""
    return topology.num_pairs * sum(_mesh_sizes(topology))


def make_pairs(topology: TopologyConfig, devices: Sequence[Device]) -> tuple[PairMeshes, ...]:
    """Divide devices among stream pairs, prefill before decode, pair after pair.

    Args:
      topology: how many pairs, and devices per mesh.
      devices: as `jax.devices()` lists them.

    Returns:
      The meshes of each pair.

    Raises:
      ValueError: there are too few devices and `topology.share_devices` is off, or a mesh alone needs more than exist.
    """
    sizes = _mesh_sizes(topology)
    wanted, widest = num_devices(topology), max(sizes)
    if len(devices) < wanted and not topology.share_devices:
        raise ValueError(
            f"{topology.num_pairs} {topology.topology} stream pair(s) with meshes of {' and '.join(map(str, sizes))} "
            f"device(s) need {wanted} devices, but there are {len(devices)} ({devices[0].platform}). Use fewer pairs, "
            "or share_devices=True to let meshes share devices (the hand-off is then a copy within a device). On CPU, "
            "host devices are asked for when the process builds its first engine: build the largest first, and before "
            "any other JAX computation"
        )
    if widest > len(devices):
        raise ValueError(f"a mesh of {widest} devices does not fit on {len(devices)}")
    pairs, cursor = [], 0
    for _ in range(topology.num_pairs):
        meshes = []
        for size in sizes:
            if cursor + size > len(devices):  # only with share_devices: start over
                cursor = 0
            meshes.append(_mesh(devices[cursor : cursor + size]))
            cursor += size
        pairs.append(PairMeshes(prefill=meshes[0], decode=meshes[-1], colocated=len(meshes) == 1))
    return tuple(pairs)


def _mesh_sizes(topology: TopologyConfig) -> tuple[int, ...]:
    """Devices of each mesh of a pair."""
    if topology.topology == "colocated":
        return (topology.decode_devices,)
    return topology.prefill_devices, topology.decode_devices


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def kv_sharding(mesh: Mesh) -> NamedSharding:
    """Divide pages [N, G, P, D] by key/value heads."""
    return NamedSharding(mesh, PartitionSpec(None, TENSOR_AXIS))


def travel_sharding(mesh: Mesh) -> NamedSharding:
    """Divide travelling pages [2L, n, G, P, D] by key/value heads."""
    return NamedSharding(mesh, PartitionSpec(None, None, TENSOR_AXIS))


def _mesh(devices: Sequence[Device]) -> Mesh:
    return Mesh(np.array(devices), (TENSOR_AXIS,), axis_types=(AxisType.Auto,))
