"""What a lane measures of itself, by hand."""

import numpy as np
from absl.testing import parameterized

from streamserve.lane_meter import LaneMeter
from streamserve.types import LanePace, StepOutput


def _output(drafted, accepted) -> StepOutput:
    drafted, accepted = np.array(drafted), np.array(accepted)
    zeros = np.zeros(len(drafted), np.int32)
    return StepOutput(tokens=zeros, accepted=accepted, drafted=drafted, divergence=zeros, finish=zeros, logprobs=None)


class LaneMeterTest(parameterized.TestCase):
    def test_nothing_measured_is_all_zeros(self):
        self.assertEqual(LaneMeter().pace(5.0), LanePace())

    def test_one_event_is_what_it_was(self):
        meter = LaneMeter()
        meter.called(200, 0.5)
        meter.arrived(100, 3000, 0.06)
        meter.ticked(_output([[2, 2], [4, -1]], [[1, 0], [3, -1]]), 2, 7, 0.02, 10.0)
        meter.held(1.5)
        meter.ended(0.3, 0.04)
        pace = meter.pace(12.5)
        want = LanePace(
            prefill_s_per_token=0.0025,
            transfer_s_per_byte=2e-5,
            transfer_bytes_per_token=30.0,
            tick_s=0.02,
            tokens_per_tick=3.5,
            accepted_per_step=4 / 3,  # three steps ran
            drafted_per_step=8 / 3,
            decode_s=1.5,
            ttft_s=0.3,
            tpot_s=0.04,
            idle_s=2.5,
        )
        for name in LanePace.__dataclass_fields__:
            self.assertAlmostEqual(getattr(pace, name), getattr(want, name), msg=name)

    def test_an_average_follows_within_some_twenty_events(self):
        meter = LaneMeter()
        for _ in range(50):
            meter.called(100, 0.1)
        for _ in range(7):
            meter.called(100, 0.4)
        halfway = meter.pace(0.0).prefill_s_per_token
        self.assertTrue(0.0023 < halfway < 0.0028, halfway)  # 0.9 ** 7 = 0.48
        for _ in range(20):
            meter.called(100, 0.4)
        self.assertAlmostEqual(meter.pace(0.0).prefill_s_per_token, 0.004, delta=3e-4)

    def test_large_calls_weigh_more(self):
        meter = LaneMeter()
        meter.called(10, 1.0)
        meter.called(1000, 1.0)
        self.assertLess(meter.pace(0.0).prefill_s_per_token, 0.0025)

    def test_what_says_nothing_is_left_out(self):
        meter = LaneMeter()
        meter.ticked(_output([[1]], [[1]]), 1, 2, 0.02, 1.0)
        meter.ticked(_output([[-1]], [[-1]]), 1, 0, 0.02, 2.0)  # the row had ended
        meter.ended(0.1, 0.0)  # it had one token
        meter.arrived(10, 0, 0.0)  # nothing moved
        pace = meter.pace(2.0)
        self.assertEqual((pace.tokens_per_tick, pace.accepted_per_step), (2.0, 1.0))
        self.assertEqual((pace.tpot_s, pace.transfer_s_per_byte, pace.idle_s), (0.0, 0.0, 0.0))

    def test_what_was_left_out_does_not_weigh_later_either(self):
        meter = LaneMeter()
        meter.ended(0.1, 0.0)  # it had one token
        meter.ended(0.1, 0.04)
        meter.arrived(10, 0, 0.5)  # nothing moved, whatever was waited for
        meter.arrived(100, 3000, 0.06)
        pace = meter.pace(0.0)
        self.assertAlmostEqual(pace.tpot_s, 0.04)
        self.assertAlmostEqual(pace.transfer_s_per_byte, 2e-5)

    def test_a_step_that_drafted_nothing_is_a_step(self):
        meter = LaneMeter()
        meter.ticked(_output([[0, 2], [0, -1]], [[0, 1], [0, -1]]), 2, 4, 0.02, 1.0)
        pace = meter.pace(1.0)
        self.assertAlmostEqual(pace.drafted_per_step, 2 / 3)
        self.assertAlmostEqual(pace.accepted_per_step, 1 / 3)
