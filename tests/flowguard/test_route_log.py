"""The log of routes: what is written can be read, and decided again."""

import json
import pathlib
import tempfile

import numpy as np
from absl.testing import parameterized

from streamserve.flowguard import FlowGuard, RouteLog, RouteOutcome, read_routes, replay_routes
from streamserve.parts import ROUTERS
from tests.flowguard.lane_states import ask, lane

OUTCOMES = (RouteOutcome(True, 0.2, 0.01, 1.0, 9), RouteOutcome(True, 3.0, 0.3, 9.0, 40), RouteOutcome(False))


class RouteLogTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = pathlib.Path(folder.name) / "routes.jsonl"

    def _written(self, name: str, *, seed: int = 5) -> list:
        """Route sixty requests, whose ends come late and out of order; one is cancelled, one routed twice."""
        log = RouteLog(self.path, header={"policy": name, "seed": seed})
        flowguard = FlowGuard(ROUTERS[name], num_lanes=3, seed=seed, log=log)
        routes = []
        for turn in range(60):
            lanes = [
                lane(
                    index,
                    running=(turn * (index + 2)) % 5,
                    in_transit=turn % 3,
                    queued_prefill_tokens=90 * (turn % 7),
                    local_tokens=128 if index == 1 else 0,
                )
                for index in range(3)
            ]
            asked = ask(3, request_id=str(min(turn, 58)), hit_tokens=(turn, 0, 99 - turn), waited_s=turn / 7)
            flowguard.route(asked, lanes, [turn % 5 != 0, True, True])
            if turn % 4 == 0:  # a lane refuses, and nothing of that is logged
                flowguard.route(asked, lanes, [True, False, True])
            routes.append(flowguard.route(asked, lanes, [turn % 5 != 0, True, True]))
            flowguard.begun(turn + 0.125)
            if turn == 20:
                flowguard.withdraw("20")
            if turn >= 6:
                flowguard.learn(str(turn - 6 + (turn % 2) * 2), OUTCOMES[turn % 3], turn + 0.25)
        flowguard.stop_logging()
        flowguard.learn("58", OUTCOMES[0], 99.0)
        log.close()
        log.close()
        return routes

    @parameterized.parameters(*ROUTERS)
    def test_what_is_read_is_what_was_decided_and_decides_again_alike(self, name):
        routes = self._written(name)
        header, logged = read_routes(self.path)
        self.assertEqual(header, {"policy": name, "seed": 5})
        self.assertEqual([one.route for one in logged], routes)
        self.assertEqual([one.chosen_s for one in logged], [turn + 0.125 for turn in range(60)])
        self.assertEqual((logged[7].learned_s, logged[20].learned_s), (11.25, None))
        self.assertEqual(logged[7].context.prompt_tokens, 100)
        self.assertEqual(logged[7].context.hit_tokens_A.tolist(), [7, 0, 92])
        self.assertEqual(logged[7].context.waited_s, 1.0)
        self.assertEqual(logged[7].context.local_A.tolist(), [False, True, False])
        self.assertEqual(any(one.route.local for one in logged), name == "flowguard")
        self.assertIsNone(logged[20].outcome)
        self.assertIsNone(logged[58].outcome)  # it was routed anew
        self.assertEqual(replay_routes(ROUTERS[name](3), logged, num_lanes=3, seed=5), [])

    def test_another_seed_or_outcome_decides_otherwise(self):
        self._written("random")
        _, logged = read_routes(self.path)
        self.assertNotEmpty(replay_routes(ROUTERS["random"](3), logged, num_lanes=3, seed=6))
        self._written("flowguard")
        _, logged = read_routes(self.path)
        turned = [one._replace(outcome=one.outcome and OUTCOMES[2]) for one in logged]
        eager = ROUTERS["flowguard"](3, prior_weight=0.1)
        self.assertNotEmpty(replay_routes(eager, turned, num_lanes=3, seed=5))

    def test_the_outcome_comes_with_its_grade(self):
        self._written("round_robin")
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        graded = [(line["good"], round(line["reward"], 3)) for line in lines[1:] if "outcome" in line]
        self.assertContainsSubset([(True, 1.0), (False, 0.333), (False, 0.0)], graded)

    def test_a_damaged_file_is_refused_with_the_line(self):
        self._written("round_robin")
        lines = self.path.read_text().splitlines()
        cases = {
            "line 1: no header, the file is empty": [],
            "line 1: KeyError": ["{}", *lines[1:]],
            "line 5: ": [*lines[:4], lines[4][:50], *lines[5:]],
            "line 62: ValueError: step 0 for the second time": [*lines, lines[1]],
            "step 0 is missing": [lines[0], *lines[2:]],
            "format 2 is not 1": [lines[0].replace('"format": 1', '"format": 2'), *lines[1:]],
        }
        for message, damaged in cases.items():
            self.path.write_text("".join(line + "\n" for line in damaged))
            with self.assertRaisesRegex(ValueError, message):
                read_routes(self.path)

    def test_what_was_lost_is_noticed_on_replay(self):
        self._written("flowguard")
        _, logged = read_routes(self.path)
        lost = [one._replace(outcome=None, order=-1) if one.step == 3 else one for one in logged]
        with self.assertRaisesRegex(ValueError, "feedback"):
            replay_routes(ROUTERS["flowguard"](3), lost, num_lanes=3, seed=5)

    def test_numbers_come_back_bit_for_bit(self):
        log = RouteLog(self.path, header={})
        flowguard = FlowGuard(ROUTERS["round_robin"], num_lanes=2, seed=0, log=log)
        third = np.nextafter(1 / 3, 1)
        flowguard.route(ask(2, waited_s=float(third)), [lane(0), lane(1)], [True, True])
        flowguard.begun(0.0)
        log.close()
        self.assertEqual(read_routes(self.path)[1][0].context.waited_s, third)
