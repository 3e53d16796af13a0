"""Arrivals: the process has the rate and the burstiness that it says, and depends on its seed alone."""

import math

import numpy as np
import scipy.stats
from absl.testing import parameterized

from experiments import arrivals
from experiments.arrivals import Pacing, RampUp

COUNT = 20_000  # of arrivals where a distribution is looked at


class DrawTest(parameterized.TestCase):
    @parameterized.product(rate=(0.5, 20.0), burstiness=(0.25, 1.0, 4.0))
    def test_the_mean_rate_is_the_one_asked_for(self, rate, burstiness):
        gaps_s = np.diff(arrivals.draw(COUNT, Pacing(request_rate=rate, burstiness=burstiness), seed=7))
        standard_error = 1 / math.sqrt(burstiness * len(gaps_s))
        self.assertAlmostEqual(float(gaps_s.mean()) * rate, 1.0, delta=4 * standard_error)

    @parameterized.parameters(0.25, 1.0, 4.0)
    def test_the_coefficient_of_variation_is_one_over_the_root_of_burstiness(self, burstiness):
        times_s = arrivals.draw(COUNT, Pacing(request_rate=3.0, burstiness=burstiness), seed=3)
        self.assertAlmostEqual(arrivals.measure(times_s).cv * math.sqrt(burstiness), 1.0, delta=0.06)

    @parameterized.parameters((1.0, scipy.stats.expon(scale=0.5)), (0.3, scipy.stats.gamma(0.3, scale=0.5 / 0.3)))
    def test_gaps_are_gamma_distributed_and_those_of_a_poisson_process_at_burstiness_1(self, burstiness, law):
        gaps_s = np.diff(arrivals.draw(COUNT, Pacing(request_rate=2.0, burstiness=burstiness), seed=1))
        self.assertGreater(scipy.stats.kstest(gaps_s, law.cdf).pvalue, 0.01)

    @parameterized.product(count=(0, 1, 2, 500), burstiness=(0.05, 1.0), ramp_up=tuple(RampUp))
    def test_times_ascend_from_0(self, count, burstiness, ramp_up):
        rates = {"request_rate": 5.0} if ramp_up is RampUp.NONE else {"start_rps": 1.0, "end_rps": 9.0}
        times_s = arrivals.draw(count, Pacing(burstiness=burstiness, ramp_up=ramp_up, **rates), seed=0)
        self.assertEqual(times_s.shape, (count,))
        self.assertEqual(times_s.dtype, np.float64)
        self.assertTrue(np.isfinite(times_s).all())
        self.assertTrue((np.diff(times_s) >= 0).all())
        self.assertEqual(times_s[:1].tolist(), [0.0] * min(count, 1))

    def test_all_come_at_once_at_an_infinite_rate(self):
        self.assertEqual(arrivals.draw(9, Pacing(), seed=0).tolist(), [0.0] * 9)

    def test_the_seed_alone_decides(self):
        pacing = Pacing(request_rate=2.0, burstiness=0.5)
        first, again, other = (arrivals.draw(100, pacing, seed).tolist() for seed in (5, 5, 6))
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)

    def test_the_first_arrivals_do_not_depend_on_how_many_follow(self):
        pacing = Pacing(request_rate=2.0, burstiness=0.5)
        np.testing.assert_array_equal(arrivals.draw(300, pacing, 4)[:100], arrivals.draw(100, pacing, 4))

    @parameterized.parameters((RampUp.LINEAR, 10.5), (RampUp.EXPONENTIAL, math.sqrt(20.0)))
    def test_the_rate_grows_from_the_first_gap_to_the_last(self, ramp_up, middle):
        nearly_even = Pacing(burstiness=1e8, ramp_up=ramp_up, start_rps=1.0, end_rps=20.0)
        rates = 1 / np.diff(arrivals.draw(102, nearly_even, seed=0))  # 101 gaps, the 51st in the middle
        self.assertTrue((np.diff(rates) > 0).all())
        np.testing.assert_allclose(rates[[0, 50, 100]], [1.0, middle, 20.0], rtol=1e-3)

    @parameterized.parameters(
        ({"request_rate": 0.0}, "request_rate must be positive, got 0.0"),
        ({"request_rate": float("nan")}, "request_rate must be positive"),
        ({"burstiness": 0.0}, "burstiness must be positive and finite, got 0.0"),
        ({"burstiness": math.inf}, "burstiness must be positive and finite"),
        ({"start_rps": 1.0}, "need a ramp_up of linear or exponential"),
        ({"ramp_up": RampUp.LINEAR}, "positive, finite and growing, got None and None"),
        ({"ramp_up": RampUp.LINEAR, "end_rps": 2.0}, "growing, got None and 2.0"),
        ({"ramp_up": RampUp.EXPONENTIAL, "start_rps": 0.0, "end_rps": 2.0}, "growing, got 0.0 and 2.0"),
        ({"ramp_up": RampUp.LINEAR, "start_rps": 3.0, "end_rps": 2.0}, "growing, got 3.0 and 2.0"),
        ({"ramp_up": RampUp.LINEAR, "start_rps": 3.0, "end_rps": math.inf}, "growing, got 3.0 and inf"),
        (
            {"ramp_up": RampUp.LINEAR, "start_rps": 1.0, "end_rps": 2.0, "request_rate": 1.0},
            "ramp_up and request_rate exclude each other",
        ),
    )
    def test_what_makes_no_process_is_refused(self, fields, message):
        with self.assertRaisesRegex(ValueError, message):
            Pacing(**fields)


class ReplayTest(parameterized.TestCase):
    def test_recorded_times_begin_at_0_and_are_scaled(self):
        self.assertEqual(arrivals.replay([100.0, 100.5, 102.5], 2.0).tolist(), [0.0, 1.0, 5.0])
        self.assertEqual(arrivals.replay([], 2.0).tolist(), [])

    def test_a_scale_keeps_the_burstiness(self):
        recorded = np.cumsum(np.random.default_rng(0).gamma(0.3, 1.0, 50))
        one, half = (arrivals.measure(arrivals.replay(recorded.tolist(), scale)) for scale in (1.0, 0.5))
        self.assertAlmostEqual(half.rate, 2 * one.rate)
        self.assertAlmostEqual(half.cv, one.cv)


class MeasureTest(parameterized.TestCase):
    def test_rate_and_variation_are_those_of_the_gaps(self):
        measured = arrivals.measure(np.array([0.0, 1.0, 4.0]))  # gaps of 1 and 3 s: mean 2, standard deviation 1
        self.assertAlmostEqual(measured.rate, 2 / 4)
        self.assertAlmostEqual(measured.cv, 0.5)

    @parameterized.parameters([[]], [[3.0]], [[3.0, 3.0]])
    def test_one_moment_has_neither(self, times_s):
        self.assertEqual(arrivals.measure(np.array(times_s)), arrivals.Measured(rate=None, cv=None))
