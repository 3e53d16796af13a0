"""The record of an open-loop run: a line a request while it goes on, and its summary."""

import collections
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tqdm

from experiments import common
from experiments.offered_load import Offer, OfferedLoad
from streamserve import answers, jsonl, metrics, report_table
from streamserve.config import Config
from streamserve.metrics import EngineStats, ServiceLevels
from streamserve.types import Prompt, RequestOutput

Tokens = tuple[tuple[int, ...], ...]  # of an answer, completion by completion
LATENESS_PERCENTILES = (50, 99, 100)


class Recorder:
    """Lets a load arrive, and writes down what becomes of it."""

    def __init__(
        self,
        workdir: pathlib.Path,
        load: OfferedLoad,
        levels: ServiceLevels,
        clock: Callable[[], float],
        *,
        keeps_tokens: bool,
    ):
        """Prepare for one run.

        Args:
          workdir: requests.jsonl is written there.
          load: what arrives.
          levels: what requests are judged by.
          clock: seconds, monotonic.
          keeps_tokens: remember the tokens of greedy answers.
        """
        self._workdir, self._load, self._levels, self._clock = workdir, load, levels, clock
        self._keeps_tokens = keeps_tokens
        self.tally = metrics.Tally(levels)
        self.failures: list[str] = []  # the first few, for the message at the end
        self.in_flight: dict[str, Offer] = {}
        self.tokens: dict[str, Tokens] = {}  # of greedy answers, by request
        self._lanes: collections.Counter[int] = collections.Counter()  # completions
        self._lateness_s: list[float] = []
        self._begin_s = self._end_s = 0.0

    def __enter__(self) -> "Recorder":
        """Replace the files, write down bad lines, and show the progress bar."""
        path = self._workdir / "requests.jsonl"
        with common.writing(path):
            (self._workdir / "results.json").unlink(missing_ok=True)
            self._requests = jsonl.JsonLinesFile(path)
        self._bar = tqdm.tqdm(
            total=len(self._load.offers), desc="Serving", unit="req", file=sys.stderr, mininterval=0.5
        )
        for bad in self._load.bad_lines:
            self.tally.add_failure()
            self._write(bad.origin.id, bad.origin.line_number, {"arrival_s": None, "good": False}, bad.message)
        return self

    def __exit__(self, *exception: object) -> None:
        """Close all."""
        self._bar.close()
        self._requests.close()

    def arrivals(self) -> Iterator[tuple[float, Prompt]]:
        """Give every request and its time; the engine asks for the next as soon as it has taken one in."""
        self._begin_s = self._end_s = self._clock()
        for offer in self._load.offers:
            self.in_flight[offer.request_id] = offer
            yield offer.at_s, offer.make()
            self._lateness_s.append(self._clock() - self._begin_s - offer.at_s)

    def take(self, output: RequestOutput) -> None:
        """Record a request that the engine is done with."""
        offer = self.in_flight.pop(output.request_id)
        self._end_s = self._clock()
        self.tally.add(output)
        self._lanes.update(times.lane for times in output.metrics)
        if self._keeps_tokens and offer.greedy and output.error is None:
            self.tokens[offer.request_id] = tokens_of(output)
        met = self._levels.met(output)
        numbers = {
            "arrival_s": offer.at_s,
            **answers.request_metrics(output),
            "finish_reasons": [completion.finish_reason for completion in output.outputs],
            "good": all(met.values()),
            "met": met,
        }
        self._write(offer.id, offer.line_number, numbers, output.error)
        self._bar.update()

    def _write(self, name: str | int | None, line_number: int, numbers: Mapping[str, Any], error: str | None) -> None:
        if error is not None and len(self.failures) < common.MAX_LISTED_FAILURES:
            self.failures.append(f"line {line_number}: {error}")
        with common.writing(self._requests.path):
            self._requests.write({"id": name, "line": line_number, **numbers, "error": error})

    def results(self, stats: EngineStats, config: Config) -> dict[str, Any]:
        """Summarise the run.

        Args:
          stats: counters of the engine.
          config: of the engine.

        Returns:
          What `metrics.summarise` does, with the time from the first arrival to the last end as `duration`, besides
          - `request_rate`: of the load, where it has one;
          - `arrivals`: the facts of the load, and `lateness_pRANK_ms`: percentiles of the time from an arrival until
            the engine had taken it in, milliseconds;
          - `completions_per_lane`;
          - `synthetic_acceptance`, where there is any.
        """
        lateness_ms = 1000 * np.asarray(self._lateness_s)
        lateness = {
            f"lateness_p{rank}_ms": float(np.percentile(lateness_ms, rank))
            for rank in LATENESS_PERCENTILES
            if self._lateness_s
        }
        results = metrics.summarise(self.tally, self._end_s - self._begin_s, stats) | {
            "arrivals": {**self._load.facts, **lateness},
            "completions_per_lane": [self._lanes[lane] for lane in range(config.topology.num_pairs)],
        }
        if self._load.rate is not None:
            results["request_rate"] = self._load.rate
        if config.speculation.acceptance is not None:
            results["synthetic_acceptance"] = config.speculation.acceptance
        return results


def tokens_of(output: RequestOutput) -> Tokens:
    """Take the tokens out of an answer; none where there is an error."""
    return tuple(completion.token_ids for completion in output.outputs)


def format_results(results: Mapping[str, Any]) -> str:
    """Lay out a summary for the console: the table of offline runs, and what is particular to an open loop."""
    arrivals = results["arrivals"]
    rows = {
        "Requests refused": _shown(results["refused"], "d"),
        "Request goodput (req/s)": _shown(results.get("request_goodput"), ".2f"),
        "SLO attainment (% of sent)": _percent(results.get("slo_attainment")),
        **{
            f"  {name.upper()} <= {results[f'slo_{name}_ms']:g} ms (%)": _percent(results[f"slo_attainment_{name}"])
            for name in ("ttft", "tpot", "e2el")
            if f"slo_{name}_ms" in results
        },
        "Offered rate (req/s)": _shown(arrivals["offered_rate"], ".2f"),
        "CV of inter-arrival times": _shown(arrivals["interarrival_cv"], ".2f"),
        "Time scale": _shown(arrivals.get("time_scale"), "g"),
        "Length scale": _shown(arrivals.get("length_scale"), "g"),
        "Prompts clipped": _shown(arrivals.get("clipped_prompts"), "d"),
        "Outputs clipped": _shown(arrivals.get("clipped_outputs"), "d"),
        "P99 lateness of the loop (ms)": _shown(arrivals.get("lateness_p99_ms"), ".2f"),
        "Completions per stream pair": " ".join(map(str, results["completions_per_lane"])),
        "Same as offline (requests)": (
            f"{results['offline_identical']} of {results['offline_compared']}" if "offline_compared" in results else ""
        ),
    }
    width, label_width = report_table.WIDTH, report_table.LABEL_WIDTH
    lines = [f"{label + ':':<{label_width}}{value:>{width - label_width}}" for label, value in rows.items() if value]
    table, end = report_table.format_table(dict(results)).rsplit("\n", 1)
    return "\n".join([table, " Open Loop ".center(width, "-"), *lines, end])


def _shown(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f}"
