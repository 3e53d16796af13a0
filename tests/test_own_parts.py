"""Parts of a user's own that are wrong: found before anything costly begins, or stopped at once."""

import numpy as np
from absl.testing import parameterized

from streamserve import parts
from streamserve.bandits import Policy
from streamserve.config import Config, RoutingConfig, SpeculationConfig
from streamserve.flowguard.signals import RouteContext
from streamserve.specustream import LaneLoad, SpecuStream, nominal, whole
from tests.flowguard.lane_states import lane, seen

NAME = "tests.test_own_parts"
TIERS = (0, 2)


def takes_one(tiers):
    del tiers


def makes_a_number(tiers, slots):
    return len(tiers) + slots


def routes_with_two(num_lanes, weights):
    del num_lanes, weights


def _speculation(policy: str) -> SpeculationConfig:
    return SpeculationConfig(method="draft_model", model="bundled:draft", policy=policy, tiers=TIERS, max_depth=2)


class EarlyTest(parameterized.TestCase):
    @parameterized.parameters(
        ("takes_one", r"cannot be called with 2 argument\(s\)"),
        ("makes_a_number", "made a int, not a Policy"),
        ("absent", "cannot be imported"),
    )
    def test_a_depth_policy_that_cannot_be_made_is_named_before_the_model_is_loaded(self, factory, message):
        with self.assertRaisesRegex(ValueError, rf"speculation.policy '{NAME}:{factory}' .*{message}"):
            parts.check_names(Config(speculation=_speculation(f"{NAME}:{factory}")))

    def test_so_is_a_router(self):
        with self.assertRaisesRegex(ValueError, r"routing.policy .* cannot be called with 1 argument"):
            parts.check_names(Config(routing=RoutingConfig(policy=f"{NAME}:routes_with_two")))


class WhatIsSeenTest(parameterized.TestCase):
    def _plan(self, choose):
        policy = Policy(init=lambda: 0, choose=choose, update=lambda state, context, plan, stats: state)
        specustream = SpecuStream(policy, nominal(TIERS, (4,)), slots=4, rounds=2)
        return specustream.plan(LaneLoad(holders={0: 1}), 0.0)

    @parameterized.parameters("cost_A", "draft_A", "switch_A", "tiers_A", "holder_B")
    def test_a_depth_policy_cannot_write_to_what_it_sees(self, name):
        def choose(state, context, noise_A2):
            getattr(context, name)[:] = 0
            return whole(context, 0), state

        with self.assertRaisesRegex(ValueError, "read-only"):
            self._plan(choose)

    def test_nor_can_a_router(self):
        context = seen([lane(0), lane(1)])
        for name, value in zip(RouteContext._fields, context, strict=True):
            if isinstance(value, np.ndarray):
                with self.assertRaisesRegex(ValueError, "read-only", msg=name):
                    value[:] = 0

    @parameterized.parameters(99, -1)
    def test_an_arm_that_does_not_exist_is_named(self, arm):
        with self.assertRaisesRegex(ValueError, f"chose arm {arm}; there are 2, from 0"):
            self._plan(lambda state, context, noise_A2: (whole(context, arm), state))
