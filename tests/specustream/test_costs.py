"""The cost table: what it looks up, what an observation moves, and where a saved one may be read."""

import json
import math

import numpy as np
import pytest
from absl.testing import parameterized

from streamserve.specustream.costs import CostTable, nominal

TIERS, BATCHES, CONTEXTS = (0, 2, 4), (1, 4, 8), (100, 300)
PLACE = {"machine": "a", "versions": "1"}


def table(**changes):
    """Round of (batch, context, arm): 1 ms * batch bucket's number * (1 + depth/2), twice that at the long context."""
    plain_N = np.array([1.0, 2.0, 3.0])[:, None, None]
    seconds_NCA = 1e-3 * plain_N * np.array([1.0, 2.0])[:, None] * (1 + 0.5 * np.array(TIERS))
    given = {"tiers": TIERS, "batches": BATCHES, "contexts": CONTEXTS, "fingerprint": PLACE}
    times = {"seconds_NCA": seconds_NCA, "draft_NCA": seconds_NCA * np.array([0.0, 0.25, 0.5])}
    return CostTable(**{**given, **times, **changes})


def all_costs(costs):
    """Every predicted time, [N, C, A]."""
    return np.array([[costs.lookup(batch, context)[0] for context in CONTEXTS] for batch in BATCHES])


class LookupTest(parameterized.TestCase):
    @parameterized.parameters((0, 1), (1, 1), (2, 2), (4, 2), (5, 3), (8, 3))
    def test_a_batch_costs_what_the_next_compiled_size_costs(self, batch, expected):
        np.testing.assert_allclose(table().lookup(batch, 100)[0], 1e-3 * expected * np.array([1, 2, 3]))

    @parameterized.parameters((0, 1.0), (100, 1.0), (150, 1.25), (299, 1.995), (300, 2.0), (9999, 2.0))
    def test_context_lengths_are_interpolated_and_no_more(self, length, expected):
        cost_A, draft_A = table().lookup(1, length)
        np.testing.assert_allclose(cost_A, 1e-3 * expected * np.array([1, 2, 3]))
        np.testing.assert_allclose(draft_A, cost_A * [0, 0.25, 0.5])

    def test_the_share_of_drafting_is_interpolated_too(self):
        seconds_NCA = np.ones((1, 2, 1))
        draft_NCA = np.array([0.2, 0.6])[None, :, None]
        costs = table(tiers=(2,), batches=(1,), seconds_NCA=seconds_NCA, draft_NCA=draft_NCA)
        np.testing.assert_allclose(costs.lookup(1, 200)[1], 0.4)

    def test_a_larger_batch_never_costs_less(self):
        seconds_NCA = 1e-3 * np.array([2.0, 1.0, 3.0])[:, None, None] * np.ones((3, 2, 3))
        costs = table(seconds_NCA=seconds_NCA, draft_NCA=0 * seconds_NCA)
        np.testing.assert_allclose([costs.lookup(batch, 100)[0][0] for batch in BATCHES], [2e-3, 2e-3, 3e-3])

    def test_no_program_is_that_large(self):
        with pytest.raises(ValueError, match="batch=9 is more than the largest measured one, 8"):
            table().lookup(9, 100)
        with pytest.raises(ValueError, match="batch=9"):
            table().observe(9, 100, 0, 1e-3)

    def test_what_is_looked_up_may_be_written_to(self):
        costs = table()
        costs.lookup(1, 100)[0][:] = 7.0
        np.testing.assert_allclose(costs.lookup(1, 100)[0], [1e-3, 2e-3, 3e-3])

    @parameterized.named_parameters(
        ("order", {"batches": (1, 8, 4)}, "batches=.* must ascend"),
        ("empty", {"tiers": ()}, "tiers=.* not be empty"),
        ("shape", {"batches": (1, 4)}, r"must be \(2, 2, 3\)"),
        ("zero", {"seconds_NCA": np.zeros((3, 2, 3))}, "must be a positive number"),
        ("nan", {"seconds_NCA": np.full((3, 2, 3), np.nan)}, "must be a positive number"),
        ("draft", {"draft_NCA": np.ones((3, 2, 3))}, "drafting is a part"),
    )
    def test_what_is_no_table_is_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            table(**changes)


class ObserveTest(parameterized.TestCase):
    @parameterized.parameters(0.5, 0.9, 1.3, 3.0)
    def test_predictions_follow_what_is_measured(self, factor):
        costs, rng = table(), np.random.default_rng(0)
        for _ in range(400):
            costs.observe(4, 150, 1, 1e-3 * 2 * 1.25 * 2 * factor * rng.lognormal(0, 0.05))
        self.assertLess(abs(costs.lookup(4, 150)[0][1] / (5e-3 * factor) - 1), 0.03)

    def test_an_outlier_moves_little(self):
        for seconds in (1e6, 1e-9):
            costs = table()
            costs.observe(1, 100, 1, seconds)
            moved_NCA = np.abs(np.log(all_costs(costs) / all_costs(table())))
            self.assertLessEqual(moved_NCA.max(), 0.05 * math.log(1.25) + 1e-12)
            self.assertGreater(moved_NCA.max(), 0.01)

    def test_what_was_not_measured_teaches_nothing(self):
        costs = table()
        for seconds in (0.0, -1.0, math.nan, math.inf):
            costs.observe(1, 100, 1, seconds)
        np.testing.assert_array_equal(all_costs(costs), all_costs(table()))

    def test_other_arms_move_less_the_further_they_are(self):
        costs = table(rate=0.1, shared=0.2, reach=2.0)
        costs.observe(1, 100, 0, 1e-3 * 1.1)
        moved_A = np.log(costs.lookup(1, 100)[0] / table().lookup(1, 100)[0])
        likeness_A = 0.2 + 0.8 * np.exp([0, -1, -2])
        np.testing.assert_allclose(moved_A, 0.1 * math.log(1.1) * likeness_A)
        np.testing.assert_allclose(costs.lookup(8, 100)[0], table().lookup(8, 100)[0] * 1.1**0.02)

    def test_the_newest_measurement_wins_over_the_order_of_the_batches(self):
        costs, rng = table(), np.random.default_rng(1)
        for _ in range(600):
            batch = int(rng.choice(BATCHES))
            costs.observe(batch, rng.uniform(50, 400), int(rng.integers(3)), rng.lognormal(-6, 1))
            assert (np.diff(all_costs(costs), axis=0) >= 0).all()
        for _ in range(600):
            costs.observe(8, 100, 0, 1e-4)  # less than one row was ever measured to take
        np.testing.assert_allclose(costs.lookup(8, 100)[0][0], 1e-4, rtol=0.01)
        assert (np.diff(all_costs(costs), axis=0) >= 0).all()
        for _ in range(900):
            costs.observe(1, 100, 0, 1.0)
        np.testing.assert_allclose([costs.lookup(batch, 100)[0][0] for batch in BATCHES], 1.0, rtol=0.01)


class FileTest(parameterized.TestCase):
    def test_a_table_comes_back_as_it_was(self):
        costs = table()
        for _ in range(20):
            costs.observe(4, 200, 2, 1.0)
        again = CostTable.from_json(costs.to_json(), PLACE)
        self.assertEqual((again.tiers, again.batches, again.contexts), (TIERS, BATCHES, CONTEXTS))
        self.assertEqual(again.fingerprint, PLACE)
        np.testing.assert_array_equal(all_costs(again), all_costs(costs))
        np.testing.assert_allclose(again.lookup(4, 200)[1], costs.lookup(4, 200)[1])

    def test_a_table_of_another_place_is_refused_by_what_differs(self):
        with pytest.raises(ValueError, match=r"elsewhere: machine is 'b' here and 'a' there$"):
            CostTable.from_json(table().to_json(), {"machine": "b", "versions": "1"})
        with pytest.raises(ValueError, match="elsewhere: model is 'm' here and None there; versions is None here and"):
            CostTable.from_json(table().to_json(), {"machine": "a", "model": "m"})

    @parameterized.parameters("", "[]", "{}", '{"fingerprint": 3}', json.dumps({"fingerprint": {}, "tiers": 3}))
    def test_what_is_no_table_is_refused(self, text):
        with pytest.raises(ValueError, match="no cost table"):
            CostTable.from_json(text, {})

    def test_the_nominal_table_says_one_millisecond_and_a_quarter_of_it_per_token(self):
        costs = nominal((0, 2, 4), (1, 8))
        for batch, length in ((1, 0), (8, 500)):
            cost_A, draft_A = costs.lookup(batch, length)
            np.testing.assert_allclose(cost_A, [1e-3, 1.5e-3, 2e-3])
            assert draft_A[0] == 0
            assert (draft_A < cost_A).all()
