"""Sections about lanes, speculation and the run as a whole: every number against one worked out otherwise."""

from unittest import mock

import numpy as np
from absl.testing import parameterized

from experiments import report_lanes, report_latency, report_speculation, report_summary, report_throughput
from experiments.report_html import Card, Note, Table
from experiments.report_run import Run
from streamserve.flowguard.predict import predict
from streamserve.metrics import ServiceLevels
from tests.experiments.report_workdir import CONFIG, Plot, SectionTestCase

LEVELS = ServiceLevels(ttft_s=0.25, tpot_s=0.015)


class SpeculationTest(SectionTestCase):
    """Depths, acceptance and arms."""

    def test_depth_and_load_of_a_lane_are_drawn_over_time(self):
        charts = self.charts(report_speculation.depth_section(self.read()))
        self.assertLen(charts, 2)
        drawn = self.series(charts["Depth and load of lane 1"])
        np.testing.assert_allclose(drawn["depth (left)"].x, 0.5 + np.arange(8) / 2)  # the first route came at 0
        np.testing.assert_array_equal(drawn["depth (left)"].y, [0, 1, 2, 4] * 2)
        np.testing.assert_array_equal(drawn["held slots (right)"].y, [1, 2, 3, 4] * 2)
        self.assertTrue(drawn["held slots (right)"].right)

    def test_depth_is_the_mean_over_held_slots_alone(self):
        run = self.read()
        first = run.decisions[1]  # two of four slots are held
        plan = first.plan._replace(depth_B=np.array([1, 0, 9, 9]))
        with mock.patch.object(report_speculation, "_by_lane", return_value=[(0, [first._replace(plan=plan)])]):
            chart = self.charts(report_speculation.depth_section(run))["Depth and load of lane 0"]
        self.assertEqual(self.series(chart)["depth (left)"].y.tolist(), [0.5])

    def test_acceptance_by_position_is_counted_from_the_log(self):
        charts = self.charts(report_speculation.acceptance_section(self.read()))
        drawn = self.series(charts["Acceptance by position"])
        # Of each round of arms: depth 1 with 2 rows accepts 0; 2 with 3 rows accepts 1 once; 4 with 4 rows 3 once.
        np.testing.assert_allclose(drawn["of all steps"].y, [100 * 2 / 9, 100 / 9, 100 / 9, 0.0])
        np.testing.assert_allclose(drawn["of the steps that drafted so deep"].y, [100 * 2 / 9, 100 / 7, 25.0, 0.0])
        np.testing.assert_allclose(charts["Accepted tokens of a step"].series[0].y, 100 * np.array([7, 1, 0, 1, 0]) / 9)
        self.assertIn("n = 36 verification steps", charts["Acceptance by position"].caption)

    def test_without_a_log_acceptance_comes_from_the_results(self):
        run = self.read(without=("decisions.jsonl",))
        section = report_speculation.acceptance_section(run)
        charts = self.charts(section)
        np.testing.assert_allclose(charts["Acceptance by position"].series[0].y, [50.0, 50.0, 50.0, 0.0])
        np.testing.assert_allclose(charts["Accepted tokens of a step"].series[0].y, [50.0, 0.0, 0.0, 50.0, 0.0])
        self.assertIn("n = 40 verification steps", charts["Accepted tokens of a step"].caption)
        self.assertEqual(
            self.notes(section),
            ["Whole run: acceptance length, bonus token included, 2.500 tokens, acceptance rate 50.000 %."],
        )

    def test_arms_are_counted_by_lane_and_depth(self):
        chart = self.charts(report_speculation.arms_section(self.read(Plot(lanes=3))))["Which depth ran"]
        self.assertEqual([series.label for series in chart.series], [f"lane {lane} (8 ticks)" for lane in range(3)])
        for lane, series in enumerate(chart.series):
            np.testing.assert_array_equal(series.y, [25.0] * 4)
            np.testing.assert_allclose(series.x, np.array([0, 1, 2, 4]) + (lane - 1) * 0.8 / 3)


class LanesTest(SectionTestCase):
    """Routing, signals and backlogs."""

    def test_shares_of_each_span_of_time_add_up(self):
        run = self.read(Plot(count=80, lanes=3, failed=2))
        section = report_lanes.routing_section(run)
        chart = self.charts(section)["Share of each lane over time"]
        self.assertLen(chart.series[0].x, 10)
        np.testing.assert_allclose(sum(series.y for series in chart.series), [100.0] * 10)
        np.testing.assert_allclose(chart.series[0].y[0], 100 * 3 / 8)
        table = next(block for block in section.blocks if isinstance(block, Table))
        self.assertEqual(table.rows[0][:5], ("lane 0", "27", "33.8", "0", "26"))
        self.assertIn("The policy is round_robin. 80 decisions over 3 lanes", table.caption)

    def test_signals_are_those_that_the_policy_saw(self):
        charts = self.charts(report_lanes.signals_section(self.read()))
        self.assertLen(charts, 8)
        for title, value in (
            ("Queued prefill of each lane", 64.0),
            ("Running requests of each lane", 1.0),
            ("Free slots of each lane", 3.0),
            ("Time of a tick of each lane", 40.0),
            ("Accepted tokens of each lane", 2.0),
            ("Recent TTFT of each lane", 0.4),
        ):
            drawn = self.series(charts[title])["lane 1"]
            np.testing.assert_allclose(drawn.y, value, err_msg=title)
            measured = title.startswith(("Time", "Accepted", "Recent"))
            self.assertLen(drawn.x, 18 if measured else 20, title)  # what is not measured yet is not 0

    def test_the_prediction_is_that_of_the_latency_aware_routers(self):
        run = self.read()
        charts = self.charts(report_lanes.signals_section(run))
        drawn = self.series(charts["Predicted TTFT of each lane"])["lane 1"]
        seen = run.routes[-1].context
        self.assertAlmostEqual(drawn.y[-1], 0.01 + predict(seen).ttft_s_A[1])
        for title in ("Predicted TTFT of each lane", "Recent TTFT of each lane"):
            self.assertEqual([mark.value for mark in charts[title].marks], [0.25])

    def test_backlogs_are_drawn_with_the_queue_before_the_lanes(self):
        charts = self.charts(report_lanes.backlog_section(self.read(Plot(lanes=3))))
        np.testing.assert_array_equal(charts["Waiting for a lane"].series[0].y, np.arange(1, 21))
        for title, value in (
            ("Waiting for prefill of each lane", 2.0),
            ("In transit of each lane", 4.0),
            ("Transfer backlog of each lane", 2.0),
        ):
            np.testing.assert_array_equal(self.series(charts[title])["lane 2"].y, [value] * 20, title)

    def test_a_signal_that_nobody_measured_is_a_sentence(self):
        section = report_lanes.signals_section(self.read(Plot(count=2)))
        self.assertLen(self.charts(section), 5)
        self.assertIn("Recent TTFT: no lane had measured it by the last decision.", self.notes(section))


class SummaryTest(SectionTestCase):
    """Headline numbers, exactness, and settings."""

    def cards(self, run: Run) -> dict[str, Card]:
        blocks = report_summary.headline_section(run).blocks
        return {block.label: block for block in blocks if isinstance(block, Card)}

    def test_headline_numbers_are_those_of_the_results(self):
        cards = self.cards(self.read(Plot(levels=LEVELS, failed=2), results={"compilations_after_warmup": 3}))
        self.assertEqual((cards["Requests answered"].value, cards["Requests failed"].value), ("18", "2"))
        self.assertEqual((cards["Duration"].value, cards["Duration"].unit), ("2", "s"))
        self.assertEqual((cards["Output tokens"].value, cards["Goodput"].value), ("45", "4.5"))
        self.assertEqual(cards["Goodput"].more, "45.0 % of requests within the objective")
        self.assertEqual(
            [card.label for card in cards.values() if card.alarm], ["Requests failed", "Compiled after warm-up"]
        )

    def test_numbers_that_are_absent_are_left_out(self):
        self.assertEmpty(self.cards(Run(name="r", results={})))

    def test_an_interrupted_run_is_an_alarm(self):
        section = report_summary.headline_section(self.read(results={"interrupted": True}))
        self.assertTrue(any(isinstance(block, Note) and block.alarm for block in section.blocks))

    @parameterized.parameters(
        ({}, "Not checked: this run did not compare its output with plain decoding", False, False),
        ({"offline_identical": 9, "offline_compared": 9}, "9 of 9 answers have the tokens of the same", False, True),
        ({"offline_identical": 8, "offline_compared": 9}, "8 of 9 answers have the tokens of the same", True, False),
        ({"offline_identical": 0, "offline_compared": 0}, "0 of 0 answers have the tokens of the same", False, False),
        (
            {"audit": {"identical": 5, "completions": 5, "wide_identical": 4, "left_out": 2, "divergences": []}},
            "5 of 5 greedy completions have the tokens of plain decoding (4 without speculation at the same width); 2",
            False,
            True,
        ),
        ({"audit": {"identical": 4, "completions": 5}}, "4 of 5 greedy completions have the tokens", True, False),
        ({"audit": {"identical": 0, "completions": 0}}, "0 of 0 greedy completions have the tokens", False, False),
    )
    def test_exactness_is_said_plainly(self, results, text, alarm, good):
        (note,) = report_summary.exactness_section(self.read(results=results)).blocks
        self.assertStartsWith(note.text, text)
        self.assertEqual((note.alarm, note.good), (alarm, good))

    def test_divergences_are_listed(self):
        found = [{"request_id": f"r{index}", "position": 3, "got": None, "margin": 1e-7} for index in range(12)]
        run = self.read(results={"audit": {"identical": 0, "completions": 12, "divergences": found}})
        table = report_summary.exactness_section(run).blocks[1]
        self.assertLen(table.rows, 10)
        self.assertEqual(table.rows[0], ("r0", "-", "3", "-", "-", "1e-07"))
        self.assertIn("First 10 of 12 divergences", table.caption)

    @parameterized.parameters(
        ({"plot": Plot(synthetic="iid:0.7")}, "iid:0.7"),
        ({"config": CONFIG | {"speculation": {"acceptance": "drift:1,2@3"}}}, "drift:1,2@3"),
        ({"config": CONFIG | {"speculation": {"method": "synthetic"}}}, "a process that is not recorded"),
    )
    def test_synthetic_acceptance_is_said_in_red_wherever_it_applies(self, fields, process):
        run = self.read(*([fields["plot"]] if "plot" in fields else []), config=fields.get("config", CONFIG))
        for section in (report_summary.headline_section(run), report_summary.exactness_section(run)):
            warning = section.blocks[0]
            self.assertStartsWith(warning.text, f"SYNTHETIC ACCEPTANCE ({process})")
            self.assertTrue(warning.alarm)
        for section in (
            report_latency.latency_section(run),
            report_latency.attainment_section(run),
            report_throughput.throughput_section([run]),
            report_speculation.depth_section(run),
            report_speculation.acceptance_section(run),
            report_speculation.arms_section(run),
            report_lanes.signals_section(run),
        ):
            self.assertTrue(section.synthetic, section.title)
        real = self.read()
        self.assertIsNone(real.synthetic)
        self.assertFalse(report_latency.latency_section(real).synthetic)

    def test_a_log_alone_can_tell_that_acceptance_was_synthetic(self):
        run = self.read(Plot(synthetic="iid:0.5"), results={"synthetic_acceptance": None})
        self.assertEqual(run.synthetic, "a process that is not recorded")

    def test_settings_are_listed_by_their_paths(self):
        rows = dict(report_summary.flat({"a": {"b": [1, 2], "c": {}}, "d": None, "e": "text"}))
        self.assertEqual(rows, {"a.b": "[1, 2]", "a.c": "{}", "d": "null", "e": "text"})
