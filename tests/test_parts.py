"""Names of the config, and factories of a user's own."""

import sys
import types

from absl.testing import parameterized

from streamserve import parts
from streamserve.bandits import Policy
from streamserve.config import (
    Config,
    RoutingConfig,
    SpeculationConfig,
)
from streamserve.specustream import whole


def shallow(tiers: tuple[int, ...], slots: int) -> Policy:
    """Draft as little as possible: the policy that a user would write."""
    del tiers, slots
    return Policy(
        init=lambda: 0,
        choose=lambda state, context, noise_A2: (whole(context, 0), state),
        update=lambda state, context, plan, stats: state,
    )


def _speculation(**fields) -> Config:
    return Config(speculation=SpeculationConfig(**{"method": "ngram", **fields}))


class NamesTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"policy": "specustrem"}, "unknown speculation.policy 'specustrem'; known: .*budget.*, fixed, .*specustream"),
        (
            {"method": "medusa"},
            "unknown speculation.method 'medusa'; known: draft_model, ngram, none, suffix, synthetic",
        ),
        ({"verifier": "typical"}, "unknown speculation.verifier 'typical'; known: block, coupled, rejection"),
        ({"policy": "no.such.module:thing"}, "speculation.policy 'no.such.module:thing' cannot be imported"),
        ({"policy": "tests.test_parts:missing"}, "cannot be imported: .*missing"),
        ({"policy": "tests.test_parts:__name__"}, "is not a factory but str"),
        ({"policy": "oracle"}, "knows the true acceptance, which only method='synthetic' has"),
    )
    def test_a_name_that_stands_for_nothing_is_refused_with_those_that_do(self, fields, message):
        with self.assertRaisesRegex(ValueError, message):
            parts.check_names(_speculation(**fields))

    def test_an_unknown_router_and_process_are_refused(self):
        with self.assertRaisesRegex(
            ValueError, "unknown routing.policy 'best'; known: flowguard, flowguard_paper, kv_cost"
        ):
            parts.check_names(Config(routing=RoutingConfig(policy="best")))
        synthetic = {"method": "synthetic", "model": "bundled:draft", "acceptance": "often"}
        with self.assertRaisesRegex(ValueError, "iid"):
            parts.check_names(_speculation(**synthetic))

    @parameterized.parameters(*parts.POLICIES, "fixed")
    def test_every_known_policy_is_built(self, name):
        policy = parts.make_policy(SpeculationConfig(method="ngram", policy=name), 4)
        self.assertIsInstance(policy, Policy)

    def test_a_policy_of_ones_own_is_named_by_module_and_factory(self):
        config = _speculation(policy="tests.test_parts:shallow").speculation
        parts.check_names(_speculation(policy="tests.test_parts:shallow"))
        self.assertIs(parts.make_policy(config, 4).init.__code__, shallow((0,), 4).init.__code__)

    def test_what_a_factory_makes_is_checked(self):
        module = types.ModuleType("wrong_parts")
        module.factory = lambda *args: "nothing"
        sys.modules["wrong_parts"] = module
        self.addCleanup(sys.modules.pop, "wrong_parts")
        config = SpeculationConfig(method="wrong_parts:factory", policy="wrong_parts:factory")
        with self.assertRaisesRegex(ValueError, "made a str, not a Policy"):
            parts.make_policy(config, 4)
        with self.assertRaisesRegex(ValueError, "made a str, not a Drafter"):
            parts.make_drafter(config, None, 13)

    def test_a_fixed_depth_can_be_named(self):
        config = SpeculationConfig(method="ngram", policy="goodput", max_depth=4)
        self.assertEqual(config.depths, (0, 1, 2, 4))
        for name in ("fixed:3", "fixed:deep"):
            with self.assertRaisesRegex(ValueError, r"no program of that depth; there are \(0, 1, 2, 4\)"):
                parts.make_policy(config, 4, name=name)
        self.assertIsInstance(parts.make_policy(config, 4, name="fixed:2"), Policy)


class DepthsTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"method": "none"}, (0,)),
        ({"num_speculative_tokens": 3}, (3,)),
        ({"num_speculative_tokens": 3, "audit": True}, (0, 3)),
        ({"policy": "goodput", "num_speculative_tokens": 3}, (0, 1, 2, 3)),
        ({"policy": "goodput", "max_depth": 8}, (0, 1, 2, 4, 6, 8)),
        ({"policy": "goodput", "max_depth": 8, "tiers": (2, 5)}, (2, 5)),
        ({"num_speculative_tokens": 2, "tiers": (0, 2, 4)}, (0, 2, 4)),
    )
    def test_what_is_compiled(self, fields, depths):
        self.assertEqual(SpeculationConfig(**{"method": "ngram", **fields}).depths, depths)

    @parameterized.parameters(
        ({"tiers": (2, 1)}, "must ascend"),
        ({"tiers": (0, 9)}, r"within \[0, 8\]"),
        ({"tiers": (0, 2), "num_speculative_tokens": 3}, "is not among"),
        ({"max_depth": 0}, "max_depth must be in"),
        ({"acceptance": "iid:0.5"}, "go together"),
        ({"method": "synthetic", "model": "bundled:draft"}, "go together"),
        ({"method": "synthetic", "model": "x", "acceptance": "iid:0.5", "audit": True}, "nothing to audit"),
    )
    def test_what_contradicts_itself_is_refused(self, fields, message):
        with self.assertRaisesRegex(ValueError, message):
            SpeculationConfig(**{"method": "ngram", **fields})
