"""What the config says of stream pairs and of what decides over them reaches its place."""

from unittest import mock

import numpy as np
from absl.testing import parameterized

from streamserve import assembly, parts
from streamserve.config import (
    Config,
    FlowGuardConfig,
    LanesConfig,
    RoutingConfig,
    SpeculationConfig,
    TopologyConfig,
)
from streamserve.flowguard import Objective
from streamserve.pipeserve import Handicap
from streamserve.specustream import nominal
from tests.fake_programs import FakePrograms
from tests.faults import FaultyPair


class LanesTest(parameterized.TestCase):
    """What the config says of stream pairs that differ."""

    def _config(self, **lanes) -> Config:
        topology = TopologyConfig(num_pairs=2)
        routing = RoutingConfig(ttft_s=3.0, tpot_s=0.5, flowguard=FlowGuardConfig(ttft=0.9))
        return Config(topology=topology, routing=routing, lanes=LanesConfig(**lanes), seed=7)

    def test_each_pair_gets_the_handicap_of_its_place(self):
        pairs = [mock.MagicMock(index=index) for index in range(2)]
        self.assertEqual(assembly.handicapped(self._config(slots=(1, 2)), pairs), pairs)
        down = {"down_from_s": (-1.0, 3.0), "down_until_s": (-1.0, 4.0)}
        config = self._config(slowdown=(1.0, 2.0), transfer_delay_s=(0.0, 0.25), **down)
        told = [pair._handicap for pair in assembly.handicapped(config, pairs)]
        self.assertEqual(told, [Handicap(), Handicap(2.0, 0.25, 3.0, 4.0)])

    def test_each_pair_gets_the_sizes_of_its_place(self):
        config = self._config(slots=(3, 5), decode_pool_tokens=(400, 144))
        sizes = [assembly._lane_config(config, index) for index in range(2)]
        self.assertEqual([(one.max_num_seqs, one.decode_pool_tokens) for one in sizes], [(3, 400), (5, 144)])
        usual = assembly._lane_config(self._config(), 1)
        self.assertEqual(usual, self._config().pipeserve)

    def test_each_pair_draws_the_acceptance_of_its_place(self):
        speculation = SpeculationConfig(
            method="synthetic", model="bundled:draft", acceptance="iid:0.5", num_speculative_tokens=2
        )
        pairs = [FaultyPair(index, FakePrograms()) for index in range(2)]
        costs = nominal((2,), (4,))

        def drawn(*acceptance: str) -> list[float]:
            lanes = LanesConfig(acceptance=acceptance)
            config = Config(topology=TopologyConfig(num_pairs=2), speculation=speculation, lanes=lanes)
            made = assembly.make_specustreams(config, pairs, costs, None)
            processes = [one._way.process for one in made]
            return [float(process.step(process.init(), 4, np.zeros(2))[0][0]) for process in processes]

        self.assertEqual(drawn(), [0.5, 0.5])
        self.assertEqual(drawn("iid:0.25", "iid:0.75"), [0.25, 0.75])
        wrong = Config(
            topology=TopologyConfig(num_pairs=2),
            speculation=speculation,
            lanes=LanesConfig(acceptance=("iid:0.5", "often")),
        )
        with self.assertRaisesRegex(ValueError, "often"):
            parts.check_names(wrong)

    def test_the_router_gets_objective_seed_and_coefficients(self):
        config = self._config()
        flowguard = assembly.make_flowguard(config, None)
        self.assertEqual(flowguard._objective, Objective(ttft_s=3.0, tpot_s=0.5))
        self.assertEqual(flowguard._seed, 7)
        self.assertEqual(parts.make_router(config, name="flowguard")(2).init().weight_F[0], 0.9)

    def test_a_router_has_the_name_of_its_factory(self):
        names = {name: factory.__name__ for name, factory in parts.ROUTERS.items()}
        self.assertEqual(names, {name: name for name in names} | {"random": "uniform"})
