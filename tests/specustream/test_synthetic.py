"""Acceptance processes: each form gives what it says, and what is no form is refused."""

import json
import pathlib
import tempfile

import numpy as np
import pytest
from absl.testing import parameterized

from streamserve.specustream import synthetic


def levels(text, ticks, *, depth=4, batch=1, seed=0):
    """Acceptance [T, K] of some ticks."""
    process, rng = synthetic.parse(text, depth), np.random.default_rng(seed)
    state, rows = process.init(), []
    for _ in range(ticks):
        acceptance_K, state = process.step(state, batch, rng.random(2))
        rows.append(acceptance_K)
    return np.array(rows)


class SyntheticTest(parameterized.TestCase):
    def test_iid_is_one_level_at_every_position_and_tick(self):
        np.testing.assert_array_equal(levels("iid:0.7", 3), np.full((3, 4), 0.7))

    @parameterized.parameters((2, [0.9, 0.7]), (3, [0.9, 0.7, 0.5]), (5, [0.9, 0.7, 0.5, 0.5, 0.5]))
    def test_positions_are_cut_or_continued_by_their_last_value(self, depth, expected):
        np.testing.assert_array_equal(levels("positions:0.9,0.7,0.5", 2, depth=depth), [expected, expected])

    def test_regimes_begin_at_the_first_level_and_last_their_dwell_in_the_mean(self):
        level_T = levels("regimes:0.9,0.5,0.2@20", 40_000)[:, 0]
        self.assertEqual(level_T[0], 0.9)
        changes = np.flatnonzero(np.diff(level_T))
        # 2000 geometric dwells of mean 20: the mean of their mean deviates by 20 / sqrt(2000) = 0.45.
        self.assertLess(abs(40_000 / len(changes) - 20), 4 * 0.45)
        counts = [np.mean(level_T[changes] == level) for level in (0.9, 0.5, 0.2)]
        np.testing.assert_allclose(counts, 1 / 3, atol=4 * np.sqrt(2 / 9 / 2000))  # every other level is as likely
        np.testing.assert_allclose([np.mean(level_T == level) for level in (0.9, 0.5, 0.2)], 1 / 3, atol=0.05)

    def test_drift_is_a_cosine_between_its_levels(self):
        level_T = levels("drift:0.9,0.3@100", 201)[:, 2]
        np.testing.assert_allclose(level_T[[0, 25, 50, 75, 100, 200]], [0.9, 0.6, 0.3, 0.6, 0.9, 0.9], atol=1e-12)

    @parameterized.parameters((0, 0.9), (1, 0.9), (5, 0.6), (9, 0.3), (20, 0.3))
    def test_load_is_linear_in_the_rows_held(self, batch, expected):
        np.testing.assert_allclose(levels("load:0.9,0.3@9", 2, batch=batch), expected)

    def test_replay_goes_round_in_its_file(self):
        lines = [json.dumps({"acceptance": row, "more": 1}) for row in ([0.9, 0.1], [0.5])]
        first, second = [0.9, 0.1, 0.1], [0.5, 0.5, 0.5]
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "rows.jsonl")
            path.write_text("\n".join(lines) + "\n\n")
            np.testing.assert_array_equal(levels(f"replay:{path}", 3, depth=3), [first, second, first])

    def test_a_process_is_pure(self):
        for text in ("regimes:0.9,0.2@3", "drift:0.9,0.3@7", "positions:0.9,0.5"):
            np.testing.assert_array_equal(levels(text, 50), levels(text, 50))

    @parameterized.parameters(
        "nothing", "fast:0.7", "iid:", "iid:often", "iid:0.5,0.6", "iid:1.5", "iid:nan", "positions:-0.1",
        "regimes:0.9,0.2", "regimes:0.9@20", "regimes:0.9,0.2@0.5", "drift:0.9,0.3,0.1@100", "drift:0.9,0.3@1",
        "load:0.9@8", "load:0.9,0.3@1", "regimes:0.9,0.2@nan", "regimes:0.9,0.2@inf",
    )  # fmt: skip
    def test_what_is_no_process_is_refused_with_the_forms_that_are(self, text):
        with pytest.raises(ValueError, match=r"known forms: iid:0\.7, positions:.*replay:PATH"):
            synthetic.parse(text, 4)

    @parameterized.parameters("", "no json", "[1]", '{"acceptance": 0.5}', '{"other": [0.5]}', '{"acceptance": []}')
    def test_a_file_that_does_not_hold_acceptance_is_refused(self, text):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "rows.jsonl")
            path.write_text(text)
            with pytest.raises(ValueError, match="replay:"):
                synthetic.parse(f"replay:{path}", 4)
        with pytest.raises(ValueError, match="FileNotFoundError"):
            synthetic.parse("replay:/no/such/file", 4)

    def test_there_is_a_position_at_least(self):
        with pytest.raises(ValueError, match="max_depth=0"):
            synthetic.parse("iid:0.5", 0)
