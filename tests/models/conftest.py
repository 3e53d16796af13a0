"""Checkpoints that several tests share: written once a session."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from streamserve.mesh import TENSOR_AXIS
from tests import tiny_models


@pytest.fixture(scope="session")
def make_mesh():
    def make(size: int, first: int = 0) -> Mesh:
        devices = np.array(jax.devices()[first : first + size])
        return Mesh(devices, (TENSOR_AXIS,), axis_types=(AxisType.Auto,))

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Give `(folder, transformers model)` of a family; tests must not change the folder."""
    made = {}

    def get(family: str):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, tiny_models.save_tiny(folder, family)
        return made[family]

    return get
