"""The benchmark of the control loop: what it feeds is what a lane would, and what it writes has every cell."""

import itertools

import numpy as np
from absl import flags
from absl.testing import parameterized

from experiments import bench_controller
from streamserve.parts import POLICIES
from streamserve.types import EMPTY_TOKEN


class BenchControllerTest(parameterized.TestCase):
    @parameterized.product(depth=(0, 4), batch=(1, 4))
    def test_an_output_emits_what_its_counts_say(self, depth, batch):
        output = bench_controller.draw_output(np.random.default_rng(0), batch, depth)
        self.assertEqual(output.tokens.shape, (batch, 1 + bench_controller.ROUNDS * (depth + 1)))
        emitted_B = (np.asarray(output.tokens)[:, 1:] != EMPTY_TOKEN).sum(axis=1)
        np.testing.assert_array_equal(emitted_B, (np.asarray(output.accepted) + 1).sum(axis=1))
        self.assertLessEqual(output.accepted.max(), depth)

    @parameterized.parameters(*sorted(POLICIES))
    def test_every_policy_runs_and_each_call_is_timed(self, name):
        turns = itertools.count()
        spent = bench_controller.run(name, 4, 3, seed=0, clock=lambda: float(next(turns)))
        np.testing.assert_array_equal(spent, np.ones((3, 2)))

    def test_medians_are_of_ticks_and_the_spread_is_over_runs(self):
        runs = [np.array([[1e-6, 2e-6], [1e-6, 2e-6], [1.0, 1.0]]) * scale for scale in (1, 2, 3)]
        found = bench_controller.summary(runs)
        for name, median in (("plan", 2.0), ("learn", 4.0), ("total", 6.0)):
            self.assertAlmostEqual(found[name]["median"], median)
            self.assertAlmostEqual(found[name]["q25"], 0.75 * median)

    def test_there_is_a_row_of_each_policy_at_each_batch(self):
        rows = bench_controller.bench(("goodput", "specustream"), ticks=2, repeats=2)
        cells = [(row["policy"], row["batch"]) for row in rows]
        self.assertEqual(cells, list(itertools.product(("goodput", "specustream"), bench_controller.BATCHES)))
        self.assertContainsSubset({"plan", "learn", "total"}, rows[0].keys())

    def test_flags_have_defaults_that_cover_every_policy(self):
        values = flags.FlagValues()
        bench_controller.define_flags(values)
        values(["bench_controller", "--ticks=3"])
        self.assertEqual((values.policies, values.ticks), (sorted(POLICIES), 3))
