"""Charts as SVG, and blocks as HTML."""

import re

import numpy as np
from absl.testing import parameterized

from experiments import report_charts, report_draw, report_html
from experiments.report_charts import Axis, Chart, Kind, Mark, Series
from experiments.report_html import Card, Chapter, Note, Section, Table


class DrawTest(parameterized.TestCase):
    """Charts as SVG, and blocks as HTML."""

    def _chart(self, *series: Series, **fields) -> Chart:
        axes = {"x": Axis("time (s)"), "y": Axis("depth (tokens)")}
        return Chart(title="T", caption="C, n = 1.", series=series, **(axes | fields))

    def test_an_axis_without_a_unit_is_refused(self):
        chart = self._chart(Series("a", np.arange(2.0), np.arange(2.0)), right=Axis("load"))
        with self.assertRaisesRegex(AssertionError, "'load' has no unit"):
            report_draw.draw(chart, "p-")

    def test_a_chart_without_points_is_refused(self):
        with self.assertRaisesRegex(AssertionError, "nothing to draw"):
            report_draw.draw(self._chart(Series("a", np.zeros(0), np.zeros(0))), "p-")

    @parameterized.parameters(*Kind)
    def test_every_kind_of_series_is_drawn_in_its_colour(self, kind):
        series = [Series(f"s{color}", np.arange(3.0), np.arange(3.0) + 1, kind, color) for color in (1, 9, 2)]
        svg = report_draw.draw(self._chart(*series), "p-")
        self.assertIn("var(--c1)", svg)
        self.assertIn("var(--c2)", svg)
        self.assertNotIn("var(--c0)", svg)

    def test_stacked_bars_stand_on_those_before(self):
        stack = [Series("s", np.array([0.0]), np.array([height]), Kind.STACK, width=1.0) for height in (30.0, 70.0)]
        svg = report_draw.draw(self._chart(*stack, y=Axis("share (%)", low=0.0, high=100.0)), "p-")
        bars = re.findall(r'd="M [\d.]+ ([\d.]+) L [\d.]+ [\d.]+ L [\d.]+ ([\d.]+) [^"]*" [^>]*fill: var\(--c0\)', svg)
        (first_low, first_high), (second_low, second_high) = [[float(edge) for edge in bar] for bar in bars]
        self.assertEqual(first_high, second_low)
        self.assertAlmostEqual((first_low - first_high) / (second_low - second_high), 3 / 7, places=2)

    def test_marks_and_a_logarithmic_axis_are_numbered_in_plain_digits(self):
        values = np.array([0.5, 20.0, 4000.0])
        chart = self._chart(
            Series("a", values, values), x=Axis("TTFT (ms)", log=True), marks=(Mark("limit", 100.0, vertical=True),)
        )
        svg = report_draw.draw(chart, "p-")
        self.assertIn("var(--bad)", svg)
        self.assertContainsSubset({"1", "100"}, set(re.findall(r"<text[^>]*>([^<]*)<", svg)))

    def test_digits_of_tick_labels_are_kept(self):
        svg = report_draw.draw(self._chart(Series("a", np.array([0.0, 0.00125]), np.arange(2.0))), "p-")
        self.assertIn(">0.00125<", svg)

    def test_a_distribution_begins_at_none_and_ends_at_all(self):
        series = report_charts.distribution("d", [3.0, 1.0, 2.0, 2.0])
        np.testing.assert_array_equal(series.x, [1.0, 1.0, 2.0, 2.0, 3.0])
        np.testing.assert_array_equal(series.y, [0.0, 25.0, 50.0, 75.0, 100.0])

    def test_a_long_distribution_keeps_its_ends_and_its_quantiles(self):
        series = report_charts.distribution("d", np.arange(1.0, 10_001.0).tolist())
        self.assertLen(series.x, report_charts.MAX_POINTS + 1)
        self.assertEqual((series.x[0], series.x[-1], series.y[-1]), (1.0, 10_000.0, 100.0))
        np.testing.assert_allclose(series.y[1:], series.x[1:] / 100)

    @parameterized.parameters(1, 200, 201, 586, 5000)
    def test_thinning_averages_as_many_neighbours_everywhere(self, count):
        x, y = report_charts.thinned(np.arange(float(count)), 2 * np.arange(float(count)))
        self.assertLessEqual(len(x), report_charts.MAX_POINTS)
        np.testing.assert_allclose(y, 2 * x)
        gaps = np.diff(x)[:-1]
        self.assertEmpty(gaps[gaps != -(-count // report_charts.MAX_POINTS)])

    def test_neighbouring_charts_and_cards_share_a_grid(self):
        blocks = (
            Card("a", "1"),
            Card("b", "2", "s", "more", alarm=True),
            Note("red", alarm=True),
            Note("so", good=True),
        )
        text = report_html.page("t", [Chapter("c", (Section("s", blocks, synthetic=True),))])
        self.assertEqual(text.count('<dl class="cards">'), 1)
        self.assertIn('<dd class="bad">2 <span>s</span><small>more</small></dd>', text)
        self.assertIn('<p class="note bad">red</p>', text)
        self.assertIn('<p class="note good">so</p>', text)
        self.assertIn('s <span class="badge">SYNTHETIC ACCEPTANCE</span></h2>', text)

    def test_a_table_of_many_columns_becomes_lists_where_the_page_is_narrow(self):
        columns = tuple("abcdef")
        page = [Chapter("c", (Section("s", (Table("t", columns, (columns,)), Table("t", columns[:5], ()))),))]
        text = report_html.page("t", page)
        self.assertEqual(text.count('<table class="stack">'), 1)
        self.assertIn('<td data-label="f">f</td>', text)
