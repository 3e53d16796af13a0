"""Sections about single requests and about several runs: every number against one worked out otherwise."""

import numpy as np
from absl.testing import parameterized

from experiments import report_data, report_latency, report_throughput
from experiments.report_html import Table
from experiments.report_run import RequestRow, Run
from streamserve.metrics import ServiceLevels
from tests.experiments.report_workdir import CONFIG, Plot, SectionTestCase

LEVELS = ServiceLevels(ttft_s=0.25, tpot_s=0.015)


class RequestsTest(SectionTestCase):
    """Latencies, the objective, and hand-offs."""

    def test_distributions_are_of_answered_requests_and_marked_where_there_is_a_limit(self):
        charts = self.charts(report_latency.latency_section(self.read(Plot(failed=5))))
        ttft = charts["Time to first token (TTFT)"]
        np.testing.assert_allclose(ttft.series[0].x[1:], 200 * (1 + np.arange(15) / 100), rtol=1e-6)
        self.assertEqual([(mark.label, mark.value) for mark in ttft.marks], [("objective 250 ms", 250.0)])
        tpot = charts["Time per output token after the first (TPOT)"]
        np.testing.assert_allclose(tpot.series[0].x[1:], [10.0] * 8 + [20.0] * 7, rtol=1e-6)
        self.assertEqual([mark.value for mark in tpot.marks], [15.0])
        gaps, whole = charts["Gap between deliveries of tokens (ITL)"], charts["End-to-end latency (E2EL)"]
        self.assertIn("n = 60.", gaps.caption)
        self.assertIn("n = 15.", whole.caption)
        self.assertEmpty(gaps.marks + whole.marks)

    def test_a_long_tail_is_drawn_on_a_logarithmic_axis(self):
        run = Run(name="r", results={}, requests=tuple(RequestRow(ttft_ms=ms) for ms in (1.0, 1.0, 1.0, 100.0)))
        chart = self.charts(report_latency.latency_section(run))["Time to first token (TTFT)"]
        self.assertTrue(chart.x.log)
        self.assertIsNone(chart.x.low)

    def test_what_a_failed_request_measured_is_no_latency(self):
        rows = (RequestRow(ttft_ms=1.0), RequestRow(ttft_ms=9.0, itls_ms=(2.0,), error="timed out"))
        section = report_latency.latency_section(Run(name="r", results={}, requests=rows))
        self.assertEqual(list(self.charts(section)), ["Time to first token (TTFT)"])
        self.assertIn("n = 1.", self.charts(section)["Time to first token (TTFT)"].caption)

    def test_the_table_holds_what_the_results_say(self):
        run = self.read()
        table = next(block for block in report_latency.latency_section(run).blocks if isinstance(block, Table))
        rows = {row[0]: row[1:] for row in table.rows}
        self.assertEqual(rows["Time to first token (TTFT)"][1], f"{run.results['median_ttft_ms']:.1f}")
        self.assertLen(table.rows, 9)

    def test_a_run_without_answers_says_so(self):
        run = self.read(Plot(failed=20))
        for section in (report_latency.latency_section(run), report_latency.transfer_section(run)):
            self.assertEmpty(self.charts(section))
            self.assertNotEmpty(self.notes(section))

    @parameterized.parameters(None, LEVELS, ServiceLevels(e2el_s=0.3), ServiceLevels(ttft_s=0.25, tpot_s=1, e2el_s=0.3))
    def test_attainment_and_goodput_of_single_lines_are_those_of_the_tally(self, levels):
        plot = Plot(count=30, failed=4, levels=levels or LEVELS)
        run = self.read(plot)
        self.assertEqual(run.levels, levels or LEVELS)
        told = {name: run.results[name] for name in ("slo_attainment", "request_goodput")}
        for name in told:
            del run.results[name]
        self.assertGreater(told["slo_attainment"], 0)
        self.assertLess(told["slo_attainment"], 1)
        self.assertAlmostEqual(report_latency.attainment(run), told["slo_attainment"])
        self.assertAlmostEqual(report_latency.goodput(run), told["request_goodput"])

    def test_what_the_results_say_of_goodput_comes_first(self):
        run = self.read(results={"slo_attainment": 0.125, "request_goodput": 7.5})
        self.assertEqual((report_latency.attainment(run), report_latency.goodput(run)), (0.125, 7.5))

    def test_limits_come_from_the_results_else_the_routes_else_the_config(self):
        config = CONFIG | {"routing": {"ttft_s": 3.0, "tpot_s": 0.5}}
        results = {"slo_ttft_ms": 500.0}
        self.assertEqual(self.read(results=results, config=config).levels, ServiceLevels(ttft_s=0.5))
        self.assertEqual(self.read(config=config).levels, LEVELS)
        without = ("routes.jsonl",)
        self.assertEqual(self.read(config=config, without=without).levels, ServiceLevels(ttft_s=3.0, tpot_s=0.5))
        self.assertIsNone(self.read(without=without).levels)

    def test_lanes_are_compared_by_each_limit(self):
        chart = self.charts(report_latency.attainment_section(self.read(Plot(count=40, failed=2))))[
            "Limits met, by lane"
        ]
        shares = {label: series.y.tolist() for label, series in self.series(chart).items()}
        ttft = 100 * 13 / 19  # of requests 0, 2, .. 36 those up to 24, of 1, 3, .. 37 those up to 25: 250 ms
        np.testing.assert_allclose(shares["TTFT met"], [ttft, ttft])
        np.testing.assert_allclose(shares["TPOT met"], [100.0, 0.0])
        np.testing.assert_allclose(shares["all met"], [ttft, 0.0])

    def test_multiples_of_the_limits_count_failed_requests(self):
        section = report_latency.attainment_section(self.read(Plot(count=40, failed=2)))
        chart = self.charts(section)["Attainment of multiples of the objective"]
        ratios = np.maximum((1 + np.arange(38) / 100) * 200 / 250, np.where(np.arange(38) % 2, 20, 10) / 15)
        np.testing.assert_allclose(chart.series[0].x[1:], np.sort(ratios), rtol=1e-6)
        self.assertAlmostEqual(chart.series[0].y[-1], 95.0)
        self.assertIn("13 of 40 requests (32.5 %) are within TTFT 250 ms, TPOT 15 ms", self.notes(section)[0])

    @parameterized.parameters(
        (RequestRow(ttft_ms=250.0, tpot_ms=15.0, num_output_tokens=2, lanes=(0,)), True),
        (RequestRow(ttft_ms=250.1, tpot_ms=15.0, num_output_tokens=2, lanes=(0,)), False),
        (RequestRow(ttft_ms=1.0, tpot_ms=15.1, num_output_tokens=2, lanes=(0,)), False),
        (RequestRow(ttft_ms=1.0, num_output_tokens=1, lanes=(0,)), True),
        (RequestRow(ttft_ms=1.0, num_output_tokens=2, lanes=(0, 1)), True),
        (RequestRow(ttft_ms=1.0, num_output_tokens=3, lanes=(0, 1)), None),
        (RequestRow(ttft_ms=1.0, num_output_tokens=3, lanes=(0, 1), met={"ttft": True, "tpot": False}), False),
        (RequestRow(ttft_ms=900.0, num_output_tokens=3, lanes=(0, 1), met={"ttft": True, "tpot": True}), True),
        (RequestRow(error="timed out", met={"ttft": True, "tpot": True}), False),
        (RequestRow(), None),
    )
    def test_a_request_is_good_as_its_line_says_or_by_its_times(self, row, good):
        self.assertIs(report_latency.is_good(row, LEVELS), good)

    def test_input_lines_that_were_never_sent_are_left_out(self):
        run = self.read(Plot(count=10))
        lines = (self.folder / "run-0" / "requests.jsonl").open("a", encoding="utf-8")
        lines.write('{"id": "bad", "line": 9, "error": "no prompt"}\n')
        lines.close()
        again = report_data.read_runs([self.folder / "run-0"])[0]
        self.assertLen(again.requests, 11)
        self.assertEqual(report_latency.attainment(again), report_latency.attainment(run))
        self.assertEqual(report_latency.goodput(again), report_latency.goodput(run))
        self.assertIn("of 10 requests", self.notes(report_latency.attainment_section(again))[0])

    def test_hand_offs_are_shown_by_bytes_and_seconds(self):
        section = report_latency.transfer_section(self.read(Plot(count=10, transfer_bytes=3 * 2**20, failed=2)))
        self.assertEqual(self.notes(section), ["24.0 MiB moved with 8 of 8 answered requests, 3.00 MiB each."])
        dots = self.series(self.charts(section)["Bytes and seconds of each hand-off"])
        np.testing.assert_allclose(dots["lane 1"].y, 0.05 * (1 + np.arange(1, 8, 2) / 100), rtol=1e-6)
        np.testing.assert_array_equal(dots["lane 1"].x, [3.0] * 4)

    def test_many_hand_offs_are_drawn_in_part_and_the_caption_says_so(self):
        rows = [RequestRow(lanes=(0,), transfer_ms=1.0, kv_transfer_bytes=1.0 + index) for index in range(1001)]
        section = report_latency.transfer_section(Run(name="r", results={}, requests=tuple(rows)))
        chart = self.charts(section)["Bytes and seconds of each hand-off"]
        self.assertLen(chart.series[0].x, 334)
        self.assertIn("n = 1001, one of every 3 drawn.", chart.caption)

    def test_a_run_that_moved_nothing_says_so(self):
        section = report_latency.transfer_section(self.read(Plot(transfer_bytes=0)))
        self.assertEqual(self.notes(section)[0][:42], "No bytes moved in 20 answered requests: pr")


class ThroughputTest(SectionTestCase):
    """Several runs."""

    def runs(self) -> list[Run]:
        made = []
        for policy, rates in (("round_robin", (4.0, 2.0)), ("flowguard", (2.0,))):
            for rate in rates:
                config = CONFIG | {"routing": {"policy": policy}, "seed": int(rate)}
                made.append(
                    self.read(
                        Plot(rate=rate, levels=LEVELS), config=config, results={"arrivals": {"offered_rate": rate}}
                    )
                )
        return made

    def test_runs_are_joined_by_what_differs_in_the_order_of_rates(self):
        charts = self.charts(report_throughput.throughput_section(self.runs()))
        self.assertLen(charts, 7)
        drawn = self.series(charts["Output over rates"])
        self.assertEqual(list(drawn), ["routing.policy=round_robin", "routing.policy=flowguard"])
        np.testing.assert_array_equal(drawn["routing.policy=round_robin"].x, [2.0, 4.0])
        np.testing.assert_allclose(drawn["routing.policy=round_robin"].y, [10.0, 20.0])

    def test_a_setting_that_a_run_lacks_tells_no_ways_apart(self):
        configs = (CONFIG | {"lanes": {"slots": [1]}}, CONFIG | {"pages": 3}, CONFIG)
        runs = [self.read(config=config) for config in configs]
        chart = self.charts(report_throughput.throughput_section(runs))["Output against TTFT"]
        self.assertEqual([series.label for series in chart.series], ["all runs"])

    def test_ways_that_differ_in_much_are_numbered(self):
        configs = [{name: name + end for name in "abcde"} for end in "xyx"]
        runs = [self.read(config=config) for config in configs]
        chart = self.charts(report_throughput.throughput_section(runs))["Output against TTFT"]
        self.assertEqual(
            [(series.label, len(series.x)) for series in chart.series],
            [("way 1: a=ax, b=bx, c=cx and 2 more settings", 2), ("way 2: a=ay, b=by, c=cy and 2 more settings", 1)],
        )

    def test_goodput_and_latency_of_each_run_are_drawn(self):
        runs = self.runs()
        charts = self.charts(report_throughput.throughput_section(runs))
        drawn = self.series(charts["Goodput against TTFT"])["routing.policy=flowguard"]
        self.assertEqual((drawn.x[0], drawn.y[0]), (runs[2].results["p99_ttft_ms"], runs[2].results["request_goodput"]))
        drawn = self.series(charts["Output against end-to-end latency"])["routing.policy=flowguard"]
        self.assertEqual(drawn.x[0], runs[2].results["median_e2el_ms"])

    def test_the_table_has_a_row_for_each_run(self):
        table = report_throughput.throughput_section(self.runs()).blocks[0]
        self.assertEqual(table.rows[0][:5], ("run-0 (routing.policy=round_robin)", "4", "20", "0", "20"))

    def test_runs_without_rates_say_so_and_are_joined_by_their_own(self):
        runs = [self.read(Plot(rate=rate)) for rate in (9.0, 3.0)]
        section = report_throughput.throughput_section(runs)
        self.assertIn(
            "Output over rates: no run has both rate of arrivals (requests/s) and output (tokens/s).",
            self.notes(section),
        )
        drawn = self.charts(section)["Output against TTFT"].series[0]
        np.testing.assert_allclose(drawn.y, [15.0, 45.0])

    @parameterized.parameters(
        ({}, None),
        ({"request_rate": 2.0, "arrivals": {"offered_rate": 1.9}}, 2.0),
        ({"arrivals": {"offered_rate": 1.9, "request_rate": "inf"}}, 1.9),
        ({"arrivals": {"offered_rate": None}}, None),
    )
    def test_the_rate_is_the_one_asked_for_else_the_one_that_came(self, results, rate):
        self.assertEqual(Run(name="r", results=results).rate, rate)

    def test_one_run_is_a_point_and_its_load_is_shown(self):
        run = self.read(results={"arrivals": {"offered_rate": 3.0, "source": "x"}, "request_goodput": 2.0})
        section = report_throughput.throughput_section([run])
        self.assertStartsWith(self.notes(section)[0], "This run is one point: 50 output tokens/s, 2 good requests/s, ")
        self.assertEqual(section.blocks[1].rows, (("offered_rate", "3.0"), ("source", "x")))

    def test_synthetic_runs_among_others_are_an_alarm(self):
        runs = [self.read(), self.read(Plot(synthetic="iid:0.2"))]
        section = report_throughput.throughput_section(runs)
        self.assertTrue(section.synthetic)
        self.assertTrue(section.blocks[0].alarm)

    def test_distributions_of_runs_are_overlaid_up_to_eight(self):
        runs = [self.read(Plot(count=3)) for _ in range(9)]
        section = report_throughput.distributions_section(runs)
        chart = self.charts(section)["TTFT of each run"]
        self.assertEqual([series.label for series in chart.series], [f"run-{index}" for index in range(8)])
        self.assertIn("n = 24.", chart.caption)
        self.assertIn("The first 8 of 9 runs", self.notes(section)[0])
