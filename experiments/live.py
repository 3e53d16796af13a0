"""A run as a table in the terminal while it goes on: its lanes, and what has been answered so far.

It is fed by the script that reads the engine's outputs, in the same thread, and draws at most four times a second, so
that the loop does not wait for it. Where standard error is no terminal it counts, and prints nothing.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from streamserve.metrics import ServiceLevels
from streamserve.types import LanePace, LaneStats, RequestOutput

REFRESH_S = 0.25  # a drawing of three lanes takes 4 ms of CPU, under two percent of this
_COLUMNS = ("lane", "wait", "run", "free slots", "free pages", "depth", "acc / step", "TTFT ms", "TPOT ms", "share %")


class LiveView:
    """The table. Use it as a context manager around the loop, and call `update` as often as you like."""

    def __init__(
        self,
        stats: Callable[[], Sequence[LaneStats]],
        clock: Callable[[], float] = time.monotonic,
        *,
        levels: ServiceLevels | None = None,
        console: Console | None = None,
    ):
        """Prepare; nothing is drawn yet.

        Args:
          stats: takes a snapshot of every lane; called when the table is drawn.
          clock: seconds, monotonic.
          levels: what a request is to be answered within; None leaves goodput out.
          console: where to draw; None for standard error.
        """
        self._stats, self._clock, self._levels = stats, clock, levels
        self._console = Console(stderr=True) if console is None else console
        self._live: Live | None = None
        self._begin_s = self._drawn_s = clock()
        self._answered = self._failed = self._good = self._tokens = 0
        self._of_lane: dict[int, int] = {}  # answered completions

    def __enter__(self) -> Self:
        """Begin to count time, and to draw if there is a terminal."""
        self._begin_s = self._drawn_s = self._clock()
        if self._console.is_terminal:
            # No thread of its own, since snapshots are the loop's; standard output may be a pipe that wants its lines.
            self._live = Live(self.render(), console=self._console, auto_refresh=False, redirect_stdout=False)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        """Draw the last state, and leave it there."""
        if self._live is not None:
            live, self._live = self._live, None
            try:
                live.update(self.render())
            finally:
                live.stop()

    def update(self, output: RequestOutput | None = None) -> None:
        """Take in a request that has ended, if any, and draw if it is time."""
        if output is not None:
            self._count(output)
        now_s = self._clock()
        if self._live is not None and now_s - self._drawn_s >= REFRESH_S:
            self._drawn_s = now_s
            self._live.update(self.render(), refresh=True)

    def _count(self, output: RequestOutput) -> None:
        if output.error is not None:
            self._failed += 1
            return
        self._answered += 1
        self._tokens += sum(len(completion.token_ids) for completion in output.outputs)
        self._good += self._levels is not None and all(self._levels.met(output).values())
        for times in output.metrics:
            self._of_lane[times.lane] = self._of_lane.get(times.lane, 0) + 1

    def render(self) -> Group:
        """Lay out lanes and totals as they are now."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in _COLUMNS:
            table.add_column(column, justify="right", overflow="fold")
        served = sum(self._of_lane.values())
        for lane in self._stats():
            share = 100 * self._of_lane.get(lane.lane, 0) / served if served else 0.0
            table.add_row(*_cells(lane, share), style=None if lane.is_up else "red")
        return Group(table, Text(self._totals()))

    def _totals(self) -> str:
        """Say what has been answered so far, and how fast."""
        elapsed_s = self._clock() - self._begin_s
        parts = [f"{self._answered} answered", f"{self._failed} failed"]
        if elapsed_s > 0:
            parts.append(f"{self._tokens / elapsed_s:.1f} tokens/s")
            if self._levels is not None:
                parts.append(f"goodput {self._good / elapsed_s:.2f} requests/s")
        return ", ".join([*parts, f"{elapsed_s:.0f} s"])


def watched(
    outputs: Iterable[RequestOutput],
    stats: Callable[[], Sequence[LaneStats]],
    *,
    live: bool,
    levels: ServiceLevels | None = None,
) -> Iterator[RequestOutput]:
    """Pass outputs on, and draw the lanes meanwhile.

    Args:
      outputs: as they finish.
      stats: takes a snapshot of every lane.
      live: draw; else nothing but pass on.
      levels: what a request is to be answered within.
    """
    if not live:
        yield from outputs
        return
    with LiveView(stats, levels=levels) as view:
        for output in outputs:
            view.update(output)
            yield output


def _cells(lane: LaneStats, share: float) -> tuple[str, ...]:
    pace: LanePace = lane.pace
    ran = pace.tick_s > 0  # else nothing has been measured
    return (
        f"{lane.lane}{'' if lane.is_up else ' down'}",
        str(lane.waiting),
        str(lane.running),
        f"{lane.free_slots}/{lane.num_slots}",
        f"{lane.free_pages}/{lane.num_pages}",
        f"{pace.drafted_per_step:.1f}" if ran else "-",
        f"{pace.accepted_per_step:.2f}" if ran else "-",
        _ms(pace.ttft_s),
        _ms(pace.tpot_s),
        f"{share:.0f}",
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}" if seconds > 0 else "-"
