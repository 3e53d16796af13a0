"""The table in the terminal: what it shows, how often it draws, and that it is silent without a terminal."""

import io
import re

from absl.testing import parameterized
from rich.console import Console

from experiments.live import REFRESH_S, LiveView, watched
from streamserve.metrics import ServiceLevels
from streamserve.types import LanePace, LaneStats
from tests import fakes

LANES = (
    LaneStats(lane=0, num_slots=4, free_slots=1, num_pages=64, free_pages=10, waiting=2, running=3),
    LaneStats(
        lane=1,
        is_up=False,
        num_slots=8,
        free_slots=8,
        num_pages=64,
        free_pages=64,
        pace=LanePace(tick_s=0.1, drafted_per_step=2.5, accepted_per_step=1.25, ttft_s=0.5, tpot_s=0.0123),
    ),
)


class LiveViewTest(parameterized.TestCase):
    """A view with a clock that stands still and a terminal that remembers."""

    def setUp(self):
        super().setUp()
        self.now_s = 100.0
        self.snapshots = 0
        self.file = io.StringIO()

    def stats(self) -> tuple[LaneStats, ...]:
        self.snapshots += 1
        return LANES

    def view(self, *, terminal: bool = True, width: int = 80, levels: ServiceLevels | None = None) -> LiveView:
        console = Console(file=self.file, force_terminal=terminal, width=width, record=True, _environ={})
        self.console = console
        return LiveView(self.stats, lambda: self.now_s, levels=levels, console=console)

    def shown(self, view: LiveView) -> list[str]:
        """Render once, and give the lines."""
        console = Console(file=io.StringIO(), width=80, record=True, _environ={})
        console.print(view.render())
        return [line.rstrip() for line in console.export_text().splitlines()]

    def test_each_lane_has_a_row_with_its_numbers(self):
        view = self.view()
        for index in range(4):
            view.update(fakes.make_output(str(index), measured={"lane": 0 if index else 1}))
        *_, first, second, _ = self.shown(view)
        self.assertEqual(first.split(), ["0", "2", "3", "1/4", "10/64", "-", "-", "-", "-", "75"])
        expected = ["1", "down", "0", "0", "8/8", "64/64", "2.5", "1.25", "500.0", "12.3", "25"]
        self.assertEqual(second.split(), expected)

    def test_the_head_names_the_columns_with_their_units(self):
        head = " ".join(" ".join(self.shown(self.view())[:-3]).split())
        for name in ("lane", "wait", "run", "depth", "TTFT ms", "TPOT ms", "share %"):
            self.assertIn(name, head)

    @parameterized.parameters(80, 120)
    def test_no_word_is_broken_in_a_terminal_of_common_width(self, width):
        console = Console(file=io.StringIO(), width=width, record=True, _environ={})
        console.print(self.view().render())
        words = set(console.export_text().split())
        self.assertContainsSubset({"lane", "wait", "run", "free", "slots", "pages", "depth", "step", "share"}, words)

    def test_totals_count_what_ended_and_how_fast(self):
        view = self.view(levels=ServiceLevels(ttft_s=0.2))
        with view:
            view.update(fakes.make_output("a", tokens=(1, 2, 3)))
            view.update(fakes.make_output("b", tokens=(1,) * 5, times=(0.0, 0.5, 1.0)))
            view.update(fakes.make_output("c", error="refused"))
            self.now_s += 4.0
            self.assertEqual(self.shown(view)[-1], "2 answered, 1 failed, 2.0 tokens/s, goodput 0.25 requests/s, 4 s")

    def test_without_limits_nothing_is_said_of_goodput(self):
        view = self.view()
        view.update(fakes.make_output("a"))
        self.now_s += 1.0
        self.assertEqual(self.shown(view)[-1], "1 answered, 0 failed, 3.0 tokens/s, 1 s")

    def test_before_any_time_has_passed_no_rate_is_shown(self):
        self.assertEqual(self.shown(self.view())[-1], "0 answered, 0 failed, 0 s")

    def test_it_draws_four_times_a_second_at_most(self):
        with self.view() as view:
            begun = self.snapshots
            for _ in range(1000):
                self.now_s += 0.01
                view.update(fakes.make_output("a"))
            drawn = self.snapshots - begun
        self.assertBetween(drawn, 10 / REFRESH_S * 0.9, 10 / REFRESH_S)

    def test_time_alone_draws_when_nothing_ends(self):
        with self.view() as view:
            begun = self.snapshots
            view.update()
            self.assertEqual(self.snapshots, begun)
            self.now_s += REFRESH_S
            view.update()
            self.assertEqual(self.snapshots, begun + 1)

    def test_the_last_state_stays_on_the_terminal(self):
        with self.view() as view:
            view.update(fakes.make_output("a"))
            self.now_s += 1.0
        text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", self.file.getvalue())
        self.assertIn("1 answered, 0 failed, 3.0 tokens/s, 1 s", text)

    def test_without_a_terminal_it_counts_and_prints_nothing(self):
        with self.view(terminal=False) as view:
            for _ in range(10):
                self.now_s += 1.0
                view.update(fakes.make_output("a"))
        self.assertEqual((self.file.getvalue(), self.snapshots), ("", 0))
        self.assertEqual(self.shown(view)[-1], "10 answered, 0 failed, 3.0 tokens/s, 10 s")

    def test_an_error_in_the_loop_passes_and_the_terminal_is_given_back(self):
        with self.assertRaisesRegex(KeyError, "loop"), self.view():
            raise KeyError("loop")
        self.assertEndsWith(self.file.getvalue(), "\x1b[?25h", "the cursor is shown again")

    def test_time_counts_from_the_beginning_of_the_run(self):
        view = self.view()
        self.now_s += 50.0  # the engine compiles
        with view:
            self.now_s += 2.0
            self.assertEndsWith(self.shown(view)[-1], ", 2 s")


class WatchedTest(parameterized.TestCase):
    @parameterized.parameters(False, True)
    def test_every_output_is_passed_on_and_nobody_is_asked_without_a_view(self, live):
        asked = []
        outputs = [fakes.make_output(str(index)) for index in range(3)]
        passed = list(watched(iter(outputs), lambda: asked.append(1) or LANES, live=live))
        self.assertEqual(passed, outputs)
        self.assertEqual(bool(asked), False)  # standard error is no terminal here
