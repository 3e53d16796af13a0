"""The control loop: what the policy sees, what runs, and what is learnt from it."""

import numpy as np
from absl.testing import parameterized

from streamserve.bandits import Policy
from streamserve.specustream import DraftWay, LaneLoad, SpecuStream, StopRule, nominal, policies, synthetic, whole
from streamserve.specustream.depth import NOT_RUN
from streamserve.types import EMPTY_TOKEN, StepOutput

TIERS, SLOTS, ROUNDS = (0, 1, 3), 4, 2
LOAD = LaneLoad(holders={0: 7, 2: 9}, waiting=5, in_transit=2, free_pages=0.5, mean_length=40.0, cached=0.25)


class _Notes:
    """A policy that takes arms in turn and notes what it is told; not pure, since a test looks inside."""

    def __init__(self, **plan):
        self.contexts, self.told, self._plan = [], [], plan

    def policy(self) -> Policy:
        def choose(turn, context, noise_A2):
            self.contexts.append(context)
            return whole(context, turn % len(TIERS), 0.5)._replace(**self._plan), turn + 1

        def update(turn, context, plan, stats):
            self.told.append((context, plan, stats))
            return turn

        return Policy(init=lambda: 0, choose=choose, update=update)


def _controller(notes: _Notes, **options) -> SpecuStream:
    costs = nominal(TIERS, (2, SLOTS))
    return SpecuStream(notes.policy(), costs, slots=SLOTS, rounds=ROUNDS, **options)


def _output(depth: int, rows: int = 3) -> StepOutput:
    """One active row, in the first round only; it was pending and emitted one accepted token and one more."""
    tokens = np.full((rows, 1 + ROUNDS * (depth + 1)), EMPTY_TOKEN, np.int32)
    tokens[0, 0], tokens[0, 1], tokens[0, 2] = 5, 6, 8
    drafted = np.full((rows, ROUNDS), EMPTY_TOKEN, np.int32)
    accepted = drafted.copy()
    drafted[0, 0], accepted[0, 0] = depth, 1
    divergence = np.zeros((rows, ROUNDS), np.float32)
    return StepOutput(
        tokens=tokens, accepted=accepted, drafted=drafted, divergence=divergence, finish=tokens[:, 0], logprobs=None
    )


class SpecuStreamTest(parameterized.TestCase):
    def test_the_policy_sees_slots_holders_prices_and_load(self):
        notes = _Notes()
        controller = _controller(notes)
        tickets = [controller.plan(LOAD, 0.0) for _ in range(4)]
        context = notes.contexts[1]
        self.assertEqual(context.holder_B.tolist(), [7, NOT_RUN, 9, NOT_RUN])
        self.assertEqual((context.batch, context.waiting, context.in_transit), (2, 5, 2))
        self.assertEqual((context.free_pages, context.mean_length, context.cached), (0.5, 40.0, 0.25))
        self.assertEqual([one.previous for one in notes.contexts], [-1, 0, 1, 2])
        self.assertEqual([ticket.tier for ticket in tickets], [0, 1, 3, 0])
        self.assertEqual(tickets[2].step_plan.depth.tolist(), [3] * SLOTS)
        self.assertEqual(tickets[2].slots, 3)  # slot 2 is held, so the program runs over three
        self.assertIsNone(context.acceptance_K)

    def test_it_learns_what_was_emitted_of_its_own_slots(self):
        notes = _Notes()
        controller = _controller(notes)
        ticket = [controller.plan(LOAD, 0.0) for _ in range(3)][-1]
        controller.learn(ticket, _output(3), 0.5, 1.0)
        ((context, plan, stats),) = notes.told
        self.assertIs(context, notes.contexts[2])
        self.assertEqual(plan.arm, 2)
        self.assertEqual(stats.emitted_B.tolist(), [2, 0, 0, 0])  # the pending first token is prefill's
        self.assertEqual((stats.rounds, stats.row_rounds, stats.seconds), (1, 1, 0.5))
        self.assertEqual(stats.drafted_BR[3].tolist(), [NOT_RUN] * ROUNDS)

    @parameterized.parameters(
        ({}, True), ({"rule": StopRule.CONFIDENCE}, False), ({"depth_B": np.zeros(4, int)}, False)
    )
    def test_only_a_round_of_whole_drafts_refreshes_the_prices(self, plan, learns):
        notes = _Notes(**plan)
        controller = _controller(notes)
        tickets = [controller.plan(LOAD, 0.0) for _ in range(3)]
        before = notes.contexts[2].cost_A[2]
        controller.learn(tickets[2], _output(3), 1.0, 1.0)  # a second instead of some milliseconds
        controller.plan(LOAD, 0.0)
        self.assertEqual(notes.contexts[3].cost_A[2] > before, learns)

    def test_drafting_again_after_plain_ticks_has_a_price_where_the_drafter_must_catch_up(self):
        for catches_up in (True, False):
            notes = _Notes()
            controller = _controller(notes, way=DraftWay(catches_up=catches_up))
            controller.plan(LOAD, 0.0)  # depth 0
            controller.plan(LOAD, 0.0)
            switch_A = notes.contexts[1].switch_A
            self.assertEqual(switch_A[0], 0)
            self.assertEqual((switch_A[1:] > 0).tolist(), [catches_up] * 2)
            controller.plan(LOAD, 0.0)
            self.assertEqual(notes.contexts[2].switch_A.tolist(), [0, 0, 0])

    def test_a_pinned_depth_runs_whatever_the_policy_says_and_teaches_it_nothing(self):
        notes = _Notes()
        controller = _controller(notes)
        controller.pin(0, tier=3)
        ticket = controller.plan(LOAD, 0.0)
        self.assertEqual((ticket.tier, ticket.step_plan.depth.tolist()), (3, [0] * SLOTS))
        controller.learn(ticket, _output(3), 0.5, 1.0)
        self.assertEqual((notes.contexts, notes.told), ([], []))
        with self.assertRaisesRegex(ValueError, r"no program of depth 2 was compiled; there are \[0, 1, 3\]"):
            controller.pin(2)
        controller.pin(None)
        controller.plan(LOAD, 0.0)
        self.assertLen(notes.contexts, 1)

    def test_a_policy_is_not_told_of_the_ticks_of_the_one_before(self):
        first, second = _Notes(), _Notes()
        controller = _controller(first)
        ticket = controller.plan(LOAD, 0.0)
        controller.use(second.policy())
        controller.learn(ticket, _output(0), 0.5, 1.0)
        self.assertEqual((first.told, second.told), ([], []))
        controller.learn(controller.plan(LOAD, 0.0), _output(0), 0.5, 1.0)
        self.assertLen(second.told, 1)

    def test_a_synthetic_process_reaches_policy_and_program_alike_and_replays(self):
        way = DraftWay(process=synthetic.parse("regimes:0.9,0.2@3", 3))
        runs = []
        for _ in range(2):
            notes = _Notes()
            controller = _controller(notes, way=way, seed=4)
            tickets = [controller.plan(LOAD, 0.0) for _ in range(30)]
            for ticket, context in zip(tickets, notes.contexts, strict=True):
                np.testing.assert_allclose(ticket.step_plan.acceptance, context.acceptance_K, rtol=1e-6)
            runs.append([ticket.step_plan.acceptance.tolist() for ticket in tickets])
        self.assertEqual(*runs)
        self.assertLen({one[0] for one in runs[0]}, 2)


class FixedTest(parameterized.TestCase):
    def test_fixed_is_what_the_config_says(self):
        controller = SpecuStream(policies.fixed(TIERS, SLOTS, depth=1), nominal(TIERS, (4,)), slots=SLOTS, rounds=2)
        self.assertEqual({controller.plan(LOAD, 0.0).tier for _ in range(5)}, {1})
