"""How many host devices a topology takes on CPU."""

from absl.testing import parameterized

from streamserve import mesh
from streamserve.config import TopologyConfig


class HostDevicesTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"num_pairs": 1}, 2),  # and none for control
        ({"num_pairs": 1, "topology": "colocated"}, 2),  # so that a pair of two meshes can follow
        ({"num_pairs": 2}, 5),
        ({"num_pairs": 3, "topology": "colocated"}, 4),
    )
    def test_only_several_pairs_have_a_device_for_control(self, fields, count):
        self.assertEqual(mesh.num_host_devices(TopologyConfig(**fields)), count)
