"""What a round costs, measured on a pair whose programs take as long as a clock says."""

import jax
import numpy as np
from absl.testing import parameterized

from streamserve.pipeserve import context_lengths, measure_costs
from tests import doubles

ROUND_S, DRAFT_S = 1e-3, 2e-4  # of one row without a draft, and of each drafted token


class _Slow:
    """Programs that take a stated time, by a clock of their own."""

    def __init__(self, pair):
        self.now_s, self.seen, self._programs = 0.0, set(), pair.programs
        self.step = {shape: self._timed(shape) for shape in pair.programs.step}

    def __getattr__(self, name):
        return getattr(self._programs, name)

    def _timed(self, shape):
        batch, tier = shape

        def step(target, draft, pools, state, table, plan):
            with jax.transfer_guard("allow"):
                depth, active = int(plan.depth.max()), np.asarray(state.active)
                length = int(state.length[0])
                assert active[:batch].all()
                assert not active[batch:].any()
                assert (np.asarray(state.draft_length) == length).all(), "nothing is to be caught up"
                pages = np.asarray(table)
            assert pages.shape[0] == batch
            assert pages.min() > 0
            self.seen.add((batch, tier, depth))
            rounds = self._programs.sizes.rounds
            self.now_s += rounds * (ROUND_S * (batch + tier + length / 100) + DRAFT_S * depth)
            return pools, state

        return step


class MeasureTest(parameterized.TestCase):
    def test_the_table_holds_the_time_of_a_round_and_of_its_draft(self):
        (pair,) = doubles.tiny_pairs(3, tiers=(0, 3), num_pairs=1)
        programs = pair.programs
        pair.programs = slow = _Slow(pair)
        self.addCleanup(setattr, pair, "programs", programs)
        costs = measure_costs(pair, (10, 50), fingerprint={"here": "now"}, clock=lambda: slow.now_s)
        self.assertEqual((costs.tiers, costs.batches, costs.contexts), ((0, 3), (2, 4), (10, 50)))
        self.assertEqual(slow.seen, {(b, t, d) for b in (2, 4) for t, d in ((0, 0), (3, 3), (3, 0))})
        for batch, length in ((2, 10), (2, 50), (4, 10), (4, 50)):
            cost_A, draft_A = costs.lookup(batch, length)
            plain = ROUND_S * (batch + length / 100)
            # After the first tick of a measurement rows are a little longer; here they stay as they are.
            np.testing.assert_allclose(cost_A, [plain, plain + 3 * (ROUND_S + DRAFT_S)], rtol=1e-6)
            np.testing.assert_allclose(draft_A, [0, 3 * DRAFT_S], rtol=1e-6, atol=1e-12)
        self.assertEqual(costs.fingerprint, {"here": "now"})
        doubles.assert_empty([pair])

    def test_a_measured_pair_serves_as_if_nothing_had_been(self):
        pairs = doubles.tiny_pairs(3, tiers=(0, 3), num_pairs=1)
        measure_costs(pairs[0], context_lengths(96), fingerprint={})
        request = doubles.make_request("a", (1, 2, 3), max_tokens=30)
        want = doubles.plain_greedy(doubles.tiny_params(0), (1, 2, 3), 30)
        self.assertEqual(list(doubles.serve(pairs, [request])["a"].completion.token_ids), want)

    @parameterized.parameters((96, (12, 72)), (2, (1,)))
    def test_lengths_lie_within_the_longest(self, longest, lengths):
        self.assertEqual(context_lengths(longest), lengths)
