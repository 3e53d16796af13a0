"""How many host devices a topology takes on CPU."""

from absl.testing import parameterized

from streamserve import mesh
from streamserve.config import TopologyConfig


class HostDevicesTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"num_pairs": 1}, 2),
        ({"num_pairs": 1, "topology": "colocated"}, 2),  # so that a pair of two meshes can follow
        ({"num_pairs": 2}, 4),
        ({"num_pairs": 3, "topology": "colocated"}, 3),
    )
    def test_every_mesh_has_its_devices_and_control_has_none(self, fields, count):
        self.assertEqual(mesh.num_host_devices(TopologyConfig(**fields)), count)
