"""Workdirs of runs that never took place, written by the real writers, with numbers that are easy to predict.

Request i arrives at i / rate seconds and goes to lane i % lanes. Everything a lane measures grows with its index.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator, Mapping

import numpy as np
from absl.testing import parameterized

from experiments import common, report_data
from experiments.report_charts import Chart, Series
from experiments.report_html import Note, Section
from experiments.report_run import Run
from streamserve import answers, jsonl, metrics
from streamserve.flowguard import Ask, Objective, Route, RouteLog, RouteOutcome
from streamserve.flowguard import signals as route_signals
from streamserve.metrics import ServiceLevels
from streamserve.specustream import DecisionLog
from streamserve.specustream.depth import NOT_RUN, DepthContext, Plan, StepStats
from streamserve.types import LanePace, LaneStats, RequestOutput
from tests import fakes

TIERS = (0, 1, 2, 4)
SLOTS = 4
OBJECTIVE = Objective(0.25, 0.015)
CONFIG = {
    "routing": {"policy": "round_robin"},
    "speculation": {"policy": "specustream", "method": "draft_model", "acceptance": None},
    "topology": {"num_pairs": 2},
    "seed": 0,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """What happened in a run.

    Attributes:
      count: requests.
      lanes: stream pairs.
      rate: requests a second.
      ttft_s: of request 0; each further one takes a hundredth more.
      tpot_s: of every request on lane 0; each further lane takes as much again.
      failed: requests that failed, the last ones.
      transfer_bytes: of each hand-off.
      objective: of the routes.
      levels: what the results are judged by; None judges nothing.
      synthetic: what acceptance was drawn from; None for a model's.
    """

    count: int = 20
    lanes: int = 2
    rate: float = 10.0
    ttft_s: float = 0.2
    tpot_s: float = 0.01
    failed: int = 0
    transfer_bytes: int = 2**20
    objective: Objective = OBJECTIVE
    levels: ServiceLevels | None = None
    synthetic: str | None = None


PLAIN = Plot()


def write_workdir(
    folder: pathlib.Path,
    plot: Plot = PLAIN,
    *,
    config: Mapping[str, object] = CONFIG,
    results: Mapping[str, object] | None = None,
    without: tuple[str, ...] = (),
) -> pathlib.Path:
    """Write all files of a run but those `without`; `results` are added to results.json."""
    folder.mkdir(parents=True)
    outputs = list(make_outputs(plot))
    summary = metrics.summarise(_tally(plot, outputs), plot.count / plot.rate, metrics.EngineStats(ticks=plot.count))
    if plot.synthetic is not None:
        summary["synthetic_acceptance"] = plot.synthetic
    common.write_json(folder / "results.json", summary | dict(results or {}))
    common.write_json(folder / "config.json", config)
    common.write_json(folder / "env.json", {"python": "3.13", "versions": {"jax": "0.10"}, "git": {"commit": "abc"}})
    lines = jsonl.JsonLinesFile(folder / "requests.jsonl")
    for output in outputs:
        reasons = {"finish_reasons": [one.finish_reason for one in output.outputs], "error": output.error}
        lines.write({"id": output.request_id, "line": 1, **answers.request_metrics(output), **reasons})
    lines.close()
    write_routes(folder / "routes.jsonl", plot)
    write_decisions(folder / "decisions.jsonl", plot)
    for name in without:
        (folder / name).unlink()
    return folder


def make_outputs(plot: Plot) -> Iterator[RequestOutput]:
    """Give the requests in the order of their arrival; each has five tokens, drafts (4, 2) and accepts (3, 0)."""
    for index in range(plot.count):
        lane, at_s = index % plot.lanes, index / plot.rate
        first_s = at_s + plot.ttft_s * (1 + index / 100)
        yield fakes.make_output(
            str(index),
            tokens=(5, 6, 7, 8, 9),
            times=(at_s, first_s, first_s + 4 * plot.tpot_s * (1 + lane)),
            drafted=(4, 2),
            accepted=(3, 0),
            measured={"lane": lane, "transfer_bytes": plot.transfer_bytes},
            error="it failed" if index >= plot.count - plot.failed else None,
        )


def write_routes(path: pathlib.Path, plot: Plot) -> None:
    """Write the decisions about lanes; each outcome is known before the next decision."""
    header = {"policy": "round_robin", "num_lanes": plot.lanes, "synthetic": plot.synthetic is not None}
    log = RouteLog(path, header=header)
    for index, output in enumerate(make_outputs(plot)):
        arm = index % plot.lanes
        seen = [_lane(lane, index) for lane in range(plot.lanes)]
        ask = Ask(
            str(index), prompt_tokens=10, max_tokens=8, waited_s=0.01, hit_tokens=(0,) * plot.lanes, queue=1 + index
        )
        context = route_signals.context(seen, [True] * plot.lanes, ask, plot.objective)
        step = log.choose(str(index), context, Route(arm, 1.0), index, 0, 100.0 + index / plot.rate)
        answered = output.error is None
        times = (plot.ttft_s, plot.tpot_s, 1.0, 5) if answered else ()
        log.learn(step, RouteOutcome(answered, *times), 100.0 + index / plot.rate)
    log.close()


def _lane(lane: int, index: int) -> LaneStats:
    """Show a lane at decision `index`; the last one has measured nothing before decision 2."""
    measured = LanePace(
        prefill_s_per_token=0.001,
        tick_s=0.02 * (1 + lane),
        tokens_per_tick=4.0,
        accepted_per_step=1.0 + lane,
        drafted_per_step=2.0,
        ttft_s=0.2 * (1 + lane),
    )
    return LaneStats(
        lane=lane,
        num_slots=SLOTS,
        free_slots=SLOTS - lane,
        num_pages=64,
        free_pages=64 - index,
        waiting=lane,
        in_transit=2 * lane,
        running=lane,
        queued_prefill_tokens=64 * lane,
        transfer_backlog_bytes=2**20 * lane,
        pace=measured if index >= 2 else LanePace(),
    )


def write_decisions(path: pathlib.Path, plot: Plot) -> None:
    """Write a decision about the depth of each lane every half second; arm and batch go round.

    A tick of depth K has one round, in which the first held slot accepts K - 1 tokens, at least none, and the others
    none.
    """
    log = DecisionLog(path, header={"policy": "specustream", "synthetic": plot.synthetic is not None})
    for step in range(2 * len(TIERS)):
        for lane in range(plot.lanes):
            arm, batch = step % len(TIERS), 1 + step % SLOTS
            held = np.arange(SLOTS) < batch
            context = DepthContext(
                tiers_A=np.array(TIERS),
                holder_B=np.where(held, np.arange(SLOTS), NOT_RUN),
                cost_A=np.full(len(TIERS), 0.01),
                draft_A=np.zeros(len(TIERS)),
                switch_A=np.zeros(len(TIERS)),
            )
            plan = Plan(arm, 1.0, np.full(SLOTS, TIERS[arm], np.int32))
            drafted = np.where(held, TIERS[arm], NOT_RUN)[:, None]
            accepted = np.where(held, 0, NOT_RUN)[:, None]
            accepted[0] = max(0, TIERS[arm] - 1)
            stats = StepStats(drafted, accepted, held.astype(int), np.zeros((SLOTS, 1), np.float32), 0.02)
            now_s = 100.5 + step / 2
            log.learn(log.choose(lane, context, plan, step, now_s), stats, now_s)
    log.close()


def _tally(plot: Plot, outputs: list[RequestOutput]) -> metrics.Tally:
    tally = metrics.Tally(plot.levels)
    for output in outputs:
        tally.add(output)
    return tally


def rewrite(path: pathlib.Path, **fields: object) -> None:
    """Change fields of a file that holds a JSON object."""
    common.write_json(path, common.read_json(path) | fields)


class SectionTestCase(parameterized.TestCase):
    """Writes a run and reads it again."""

    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def read(self, *plots: Plot, **fields) -> Run:
        plot = plots[0] if plots else Plot()
        name = f"run-{len(list(self.folder.iterdir()))}"
        return report_data.read_runs([write_workdir(self.folder / name, plot, **fields)])[0]

    def charts(self, section: Section) -> dict[str, Chart]:
        return {block.title: block for block in section.blocks if isinstance(block, Chart)}

    def notes(self, section: Section) -> list[str]:
        return [block.text for block in section.blocks if isinstance(block, Note)]

    def series(self, chart: Chart) -> dict[str, Series]:
        return {series.label: series for series in chart.series}
