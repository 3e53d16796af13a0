"""What is logged comes back bit for bit; what is damaged or no number is refused."""

import json
import pathlib
import tempfile
import time

import numpy as np
from absl.testing import absltest, parameterized

from streamserve.specustream.decision_log import DecisionLog, read_log
from streamserve.specustream.depth import NOT_RUN, Plan, StopRule, whole
from tests.specustream.logged_runs import a_context, greedy, run, some_stats


def assert_identical(test, first, second):
    """Compare what records hold, with types of arrays and bits of floats."""
    test.assertIs(type(first), type(second))
    if isinstance(first, np.ndarray):
        test.assertEqual((first.dtype, first.shape, first.tobytes()), (second.dtype, second.shape, second.tobytes()))
    elif isinstance(first, tuple):
        for one, other in zip(first, second, strict=True):
            assert_identical(test, one, other)
    elif isinstance(first, float):
        test.assertEqual(first.hex(), second.hex())
    else:
        test.assertEqual(first, second)


class DecisionLogTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "decisions.jsonl"

    def lines(self):
        return self.path.read_text().splitlines()

    def a_log(self, **settings):
        log = DecisionLog(self.path, header={}, **settings)
        self.addCleanup(log.close)
        return log

    def test_everything_comes_back_bit_for_bit(self):
        generator = np.random.default_rng(1)
        log = DecisionLog(self.path, header={"policy": "greedy", "tiers": [0, 2]}, flush_every=3)
        given = []
        for step in range(40):
            context = a_context(generator, previous=step % 4)
            plan = Plan(2, 0.1 + 0.2, np.array([4, 0, 1], np.int32), StopRule.CONFIDENCE, 1 / 7, step % 2 == 0)
            token, stats = log.choose(1, context, plan, step, step / 3), some_stats(generator, plan)
            log.learn(token, stats, step / 3 + 0.1)
            given.append((context, plan, step, step / 3, stats, step / 3 + 0.1))
        log.close()
        header, logged = read_log(self.path)
        self.assertEqual(header, {"policy": "greedy", "tiers": [0, 2]})
        self.assertEqual([(one.lane, one.step) for one in logged], [(1, step) for step in range(40)])
        for one, was in zip(logged, given, strict=True):
            outcome = one.outcome
            assert outcome is not None
            now = (one.context, one.plan, one.feedbacks, one.chosen_s, outcome.stats, outcome.learned_s)
            assert_identical(self, now, was)
            self.assertEqual(outcome.reward, was[4].emitted_B.sum() / was[4].seconds)

    def test_divergence_is_written_only_where_it_was_wanted(self):
        run(self.path, greedy)
        raws = [json.loads(line) for line in self.lines()[1:]]
        wanted = [raw["plan"]["wants_divergence"] for raw in raws if raw["stats"]]
        self.assertIn(True, wanted)
        self.assertEqual(wanted, [raw["stats"]["divergence_BR"][1] is not None for raw in raws if raw["stats"]])

    def test_a_lost_tick_has_neither_reward_nor_stats_and_counts_as_no_feedback(self):
        generator = np.random.default_rng(1)
        log = DecisionLog(self.path, header={})
        tokens = []
        for step in range(3):
            context = a_context(generator)
            tokens.append((log.choose(0, context, whole(context, 1), 0, float(step)), whole(context, 1)))
        for token, plan in tokens[1:]:
            log.learn(token, some_stats(generator, plan), 9.0)
        log.close()
        raws = {json.loads(line)["step"]: json.loads(line) for line in self.lines()[1:]}
        for name in ("reward", "stats", "order", "learned_s"):
            self.assertIsNone(raws[0][name])
            self.assertIsNotNone(raws[1][name])
        logged = read_log(self.path)[1]
        self.assertEqual([one.outcome and one.outcome.order for one in logged], [None, 0, 1])

    def test_a_tick_that_took_no_time_has_no_reward_but_stats(self):
        log, context = self.a_log(), a_context(np.random.default_rng(1))
        stats = some_stats(np.random.default_rng(1), whole(context, 1))._replace(seconds=0.0)
        log.learn(log.choose(0, context, whole(context, 1), 0, 0.0), stats, 0.0)
        log.close()
        outcome = read_log(self.path)[1][0].outcome
        assert outcome is not None
        self.assertIsNone(outcome.reward)
        self.assertEqual(outcome.stats.seconds, 0.0)

    def test_slots_that_did_not_run_emit_nothing(self):
        log, context = self.a_log(), a_context(np.random.default_rng(1))
        stats = some_stats(np.random.default_rng(1), whole(context, 1))
        stats = stats._replace(emitted_B=np.array([NOT_RUN, 5, NOT_RUN]), seconds=2.0)
        log.learn(log.choose(0, context, whole(context, 1), 0, 0.0), stats, 0.0)
        log.close()
        self.assertEqual(json.loads(self.lines()[1])["reward"], 2.5)

    def test_lines_are_written_in_batches(self):
        log, generator = self.a_log(flush_every=4), np.random.default_rng(1)
        counts = []
        for _ in range(9):
            context = a_context(generator)
            plan = whole(context, 1)
            log.learn(log.choose(0, context, plan, 0, 0.0), some_stats(generator, plan), 0.0)
            counts.append(len(self.lines()) - 1)
        self.assertEqual(counts, [0, 0, 0, 4, 4, 4, 4, 8, 8])
        log.close()
        log.close()
        self.assertLen(self.lines(), 10)

    @parameterized.named_parameters(
        ("nan_in_an_array", {"cost_A": np.array([1.0, np.nan, 1.0, 1.0])}, {}),
        ("infinity_in_a_number", {"mean_length": np.inf}, {}),
        ("nan_in_the_stats", {}, {"seconds": np.nan}),
    )
    def test_refuses_what_is_not_a_number(self, in_context, in_stats):
        log, generator = self.a_log(flush_every=2), np.random.default_rng(1)
        context = a_context(generator)
        plan = whole(context, 1)
        log.learn(log.choose(0, context, plan, 0, 0.0), some_stats(generator, plan), 0.0)
        token = log.choose(0, context._replace(**in_context), plan, 0, 0.0)
        with self.assertRaisesRegex(AssertionError, "lane 0 step 1: Out of range float"):
            log.learn(token, some_stats(generator, plan)._replace(**in_stats), 0.0)
        log.close()
        self.assertLen(read_log(self.path)[1], 1)  # the good one before it is not lost

    def test_refuses_a_second_outcome(self):
        log, context = self.a_log(), a_context(np.random.default_rng(1))
        token, stats = (
            log.choose(0, context, whole(context, 1), 0, 0.0),
            some_stats(np.random.default_rng(1), whole(context, 1)),
        )
        log.learn(token, stats, 0.0)
        with self.assertRaisesRegex(AssertionError, "decision 0 is not open"):
            log.learn(token, stats, 0.0)

    @parameterized.named_parameters(
        ("a_line_cut_short", 4, lambda line: line[: len(line) // 2], "line 4: JSONDecodeError"),
        ("an_empty_line", 5, lambda line: "", "line 5: JSONDecodeError"),
        ("a_missing_field", 3, lambda line: line.replace('"waiting"', '"wait"'), "line 3: .*DepthContext has fields"),
        ("a_missing_key", 3, lambda line: line.replace('"feedbacks"', '"f"'), "line 3: KeyError: 'feedbacks'"),
        ("nan", 6, lambda line: line.replace('"threshold": ', '"threshold": NaN, "x": '), "line 6: .*NaN is not"),
        ("an_arm_beyond_the_tiers", 2, lambda line: line.replace('"arm": ', '"arm": 9'), r"line 2: .*plan\.arm="),
        ("a_changed_reward", 7, lambda line: line.replace('"reward": ', '"reward": 1'), "line 7: .*reward 1"),
        ("a_changed_array", 2, lambda line: line.replace('"<i8", [0, 2', '"<i8", [0, 2.5'), "line 2: .*not of type"),
        ("an_unknown_rule", 2, lambda line: line.replace('"rule": 2', '"rule": 5'), "line 2: .*5 is not a valid"),
        ("an_unknown_format", 1, lambda line: line.replace('"format": 1', '"format": 0'), "line 1: .*format 0 is"),
        ("bytes_that_are_no_text", 3, lambda line: "\udcff" + line, "line 3: UnicodeDecodeError"),
    )
    def test_says_which_line_is_damaged(self, number, damage, message):
        run(self.path, greedy, ticks=20)
        lines = self.lines()
        lines[number - 1], was = damage(lines[number - 1]), lines[number - 1]
        self.assertNotEqual(lines[number - 1], was)
        self.path.write_bytes(("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))
        with self.assertRaisesRegex(ValueError, message):
            read_log(self.path)

    def test_says_that_a_decision_is_there_twice_or_nothing_at_all(self):
        run(self.path, greedy, ticks=20)
        lines = self.lines()
        self.path.write_text("\n".join([*lines, lines[4]]) + "\n")
        with self.assertRaisesRegex(ValueError, "line 22: .*for the second time"):
            read_log(self.path)
        self.path.write_text("")
        with self.assertRaisesRegex(ValueError, "line 1: no header"):
            read_log(self.path)

    def test_the_hot_path_costs_a_fraction_of_a_tick(self):
        log, generator = self.a_log(flush_every=10_000), np.random.default_rng(1)
        context = a_context(generator)
        plan = whole(context, 1)
        stats, seconds = some_stats(generator, plan), []
        for _ in range(2000):
            begin = time.perf_counter()
            log.learn(log.choose(0, context, plan, 0, 0.0), stats, 0.0)
            seconds.append(time.perf_counter() - begin)
        self.assertLess(np.median(seconds), 100e-6)  # 3 us where nothing else runs


if __name__ == "__main__":
    absltest.main()
