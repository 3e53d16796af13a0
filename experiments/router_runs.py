"""Runs one router on a fleet, simulated or on an engine, and says what came of it.

An arm is a name of `streamserve.parts.ROUTERS`, or a factory as "package.module:factory". This file knows neither which
arms there are nor how they compare.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from experiments import depth_arms
from experiments.router_capacity import LaneFacts
from experiments.router_clock import LaneCosts, VirtualClock
from experiments.router_scenarios import Ask
from experiments.simulated_lane import SimulatedPair
from streamserve import assembly, metrics
from streamserve.config import Config
from streamserve.flowguard import Objective, RouteLog, RouteOutcome, is_good
from streamserve.pipeserve import Handicap, HandicappedPair
from streamserve.sampling_params import SamplingParams
from streamserve.scheduler import StreamScheduler
from streamserve.sequence import RunningRequest
from streamserve.specustream import CostTable
from streamserve.tokenizer import TextStream
from streamserve.types import Prompt, Request, RequestMetrics, RequestOutput


class Answer(NamedTuple):
    """A request that was answered."""

    times: RequestMetrics
    output_tokens: int

    @property
    def outcome(self) -> RouteOutcome:
        """What came of it, as FlowGuard's policies are told."""
        times, gaps = self.times, self.output_tokens - 1
        return RouteOutcome(
            answered=True,
            ttft_s=times.first_token_s - times.arrival_s,
            tpot_s=(times.finished_s - times.first_token_s) / gaps if gaps else 0.0,
            latency_s=times.finished_s - times.arrival_s,
            output_tokens=self.output_tokens,
        )


def summarise(
    answers: Sequence[Answer],
    *,
    asked: int,
    duration_s: float,
    objective: Objective,
    num_lanes: int,
    colocated: bool,
) -> dict[str, Any]:
    """Say what came of a run.

    Args:
      answers: of it.
      asked: requests that came.
      duration_s: seconds in which they came.
      objective: what each was to be answered within.
      num_lanes: A.
      colocated: nothing moves, wherever a prompt is computed.

    Returns:
      `goodput`: requests a second of arrivals that met both limits; `attainment`: fraction of all; percentiles of TTFT
      and TPOT (of two tokens or more), ms, None where there are none; `output_throughput`: tokens a second up to the
      last answer; `lane_share`: of the answers; `local_share`: of them, computed where they were decoded.
    """
    outcomes = [answer.outcome for answer in answers]
    good = sum(is_good(outcome, objective) for outcome in outcomes)
    begin_s = min((answer.times.arrival_s for answer in answers), default=0.0)
    end_s = max((answer.times.finished_s for answer in answers), default=0.0)
    tokens = sum(answer.output_tokens for answer in answers)
    lanes = np.bincount([answer.times.lane for answer in answers], minlength=num_lanes)
    local = sum(not answer.times.transfer_pages for answer in answers)
    count = max(1, len(answers))
    return {
        "requests": asked,
        "answered": len(answers),
        "good": good,
        "goodput": good / duration_s,
        "attainment": good / asked,
        **_percentiles("ttft", [outcome.ttft_s for outcome in outcomes]),
        **_percentiles("tpot", [outcome.tpot_s for outcome in outcomes if outcome.output_tokens > 1]),
        "output_throughput": tokens / (end_s - begin_s) if tokens else 0.0,
        "lane_share": [int(served) / count for served in lanes],
        "local_share": 0.0 if colocated else local / count,
        "cached_tokens": sum(answer.times.cached_tokens for answer in answers),
        "preemptions": sum(answer.times.num_preemptions for answer in answers),
    }


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    keys = {f"p50_{name}_ms": 50, f"p99_{name}_ms": 99}
    return {key: 1e3 * float(np.percentile(seconds, rank)) if seconds else None for key, rank in keys.items()}


# --- simulated


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A fleet in virtual time, built anew for each run.

    Attributes:
      config: of the fleet.
      lanes: of it.
      costs: what its work takes,
      rounds: and a round of decoding.
    """

    config: Config
    lanes: Sequence[LaneFacts]
    costs: LaneCosts
    rounds: CostTable

    def build(
        self, router: str, *, seed: int, log: RouteLog | None = None
    ) -> tuple[StreamScheduler, VirtualClock, list[SimulatedPair]]:
        """Build the fleet: a scheduler, the clock that it goes by, and the lanes without their handicaps.

        Raises:
          ValueError: the router's name stands for nothing.
        """
        routing = dataclasses.replace(self.config.routing, policy=router)
        config, clock = dataclasses.replace(self.config, seed=seed, routing=routing), VirtualClock()
        pairs = [
            SimulatedPair(
                index,
                lane.sizes,
                self.costs,
                self.rounds,
                clock,
                colocated=config.topology.topology == "colocated",
                reuse_prefixes=config.pipeserve.enable_prefix_caching,
                seed=seed,
            )
            for index, lane in enumerate(self.lanes)
        ]
        bare: Any = pairs  # `assembly` asks of a pair for no more than these have
        scheduler = StreamScheduler(
            [_handicapped(pair, lane, clock) for pair, lane in zip(pairs, self.lanes, strict=True)],
            assembly.make_flowguard(config, log),
            config.scheduler,
            specustreams=assembly.make_specustreams(config, bare, self.rounds, None),
            max_prefills=config.pipeserve.max_prefills,
            keeps_pages=config.pipeserve.preemption == "keep",
            start=_start,
            clock=clock,
            sleep=clock.nap,
        )
        return scheduler, clock, pairs

    def run(
        self, router: str, asks: Sequence[Ask], *, duration_s: float, seed: int, log: RouteLog | None = None
    ) -> dict[str, Any]:
        """Serve requests under one router.

        Args:
          router: who routes.
          asks: who comes when.
          duration_s: seconds in which they come.
          seed: of the router and of what is accepted.
          log: takes every decision.

        Raises:
          ValueError: the router's name stands for nothing.
        """
        scheduler, clock, pairs = self.build(router, seed=seed, log=log)
        ends = list(scheduler.serve(_timed(asks, clock)))
        answers = [
            Answer(end.metrics, len(end.completion.token_ids))
            for end in ends
            if end.metrics is not None and end.completion is not None
        ]
        routing = self.config.routing
        row = summarise(
            answers,
            asked=len(asks),
            duration_s=duration_s,
            objective=Objective(routing.ttft_s, routing.tpot_s),
            num_lanes=len(pairs),
            colocated=self.config.topology.topology == "colocated",
        )
        return row | {
            "ends": {state.value: count for state, count in scheduler.ends.items()},
            "prefill_busy": [pair.prefill_mesh.busy_s / clock() for pair in pairs],
            "decode_busy": [pair.decode_mesh.busy_s / clock() for pair in pairs],
        }


def _handicapped(pair: SimulatedPair, lane: LaneFacts, clock: VirtualClock) -> Any:
    """Put a handicap before a pair that has one."""
    handicap = Handicap(lane.slowdown, lane.delay_s, lane.down_from_s, lane.down_until_s)
    if handicap == Handicap():
        return pair
    return HandicappedPair(pair, handicap, clock=clock, sleep=clock.sleep)


def _start(request: Request, *, arrival_s: float) -> RunningRequest:
    return RunningRequest(request, TextStream(None, request.params), lambda token: None, arrival_s=arrival_s)


def _timed(asks: Sequence[Ask], clock: VirtualClock) -> Iterator[tuple[float, Request]]:
    """Turn asks into requests; a nap ends when one arrives."""
    for index, ask in enumerate(asks):
        clock.expect(ask.at_s)
        params = SamplingParams(max_tokens=ask.max_tokens, temperature=0.0, ignore_eos=True)
        yield (
            ask.at_s,
            Request(request_id=str(index), prompt_token_ids=ask.tokens, params=params, seed=index, stop_ids=()),
        )


def rounds_table(shape: str, lanes: Sequence[LaneFacts]) -> CostTable:
    """Lay out one of `depth_arms.SHAPES` for every program of a fleet.

    Raises:
      RunError: there is no such shape.
    """
    batches = sorted({batch for lane in lanes for batch in lane.sizes.batches})
    return depth_arms.made_up_costs(shape, lanes[0].sizes.tiers, batches)


# --- on an engine


class Engine(Protocol):
    """What a run needs of `streamserve.LLM`."""

    max_model_len: int

    def use_router(self, name: str, /) -> None:
        """Let another router decide."""
        ...

    def use_policy(self, name: str, /) -> None:
        """Let a depth policy decide, from the beginning."""
        ...

    def stream(self, prompts: Iterable[Prompt], /) -> Iterator[RequestOutput]:
        """Serve prompts as they are pulled."""
        ...

    def serve(self, arrivals: Iterable[tuple[float, Prompt]], /) -> Iterator[RequestOutput]:
        """Serve prompts that come when they come."""
        ...

    def stats(self) -> metrics.EngineStats:
        """Counters."""
        ...

    def close(self) -> None:
        """End."""
        ...


def run_engine(
    engine: Engine, config: Config, router: str, asks: Sequence[Ask], *, duration_s: float
) -> dict[str, Any]:
    """Serve requests under one router, which begins without knowledge, on lanes that begin empty.

    Args:
      engine: serves nobody.
      config: of it.
      router: who routes.
      asks: who comes when.
      duration_s: seconds in which they come.
    """
    engine.use_router(router)
    engine.use_policy(config.speculation.policy)  # what the router before has taught it is forgotten
    before = engine.stats()
    outputs = list(engine.serve((ask.at_s, _prompt(index, ask)) for index, ask in enumerate(asks)))
    after = engine.stats()
    row = summarise(
        [Answer(output.metrics[0], len(output.outputs[0].token_ids)) for output in outputs if output.error is None],
        asked=len(asks),
        duration_s=duration_s,
        objective=Objective(config.routing.ttft_s, config.routing.tpot_s),
        num_lanes=config.topology.num_pairs,
        colocated=config.topology.topology == "colocated",
    )
    names = ("compilations_after_warmup", "refused", "failed", "timed_out")
    return row | {name: getattr(after, name) - getattr(before, name) for name in names}


def engine_capacity(engine: Engine, router: str, asks: Sequence[Ask]) -> float:
    """Measure how many requests a second an engine answers that is never short of them."""
    engine.use_router(router)
    outputs = list(engine.stream(_prompt(index, ask) for index, ask in enumerate(asks)))
    times = [one for output in outputs for one in output.metrics]
    return len(times) / (max(one.finished_s for one in times) - min(one.arrival_s for one in times))


def _prompt(index: int, ask: Ask) -> Prompt:
    params = SamplingParams(max_tokens=ask.max_tokens, temperature=0.0, ignore_eos=True, seed=index)
    return Prompt(request_id=str(index), params=params, token_ids=ask.tokens)
