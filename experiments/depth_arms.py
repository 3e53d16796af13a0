"""Runs one arm of a comparison of depth policies, simulated or on an engine, and says what came of it.

An arm is a name: of a policy, or "fixed:K" for K tokens a round; "fixed:0" is plain decoding. This file knows neither
which arms there are nor how they compare.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from experiments.common import RunError
from streamserve import metrics, parts
from streamserve.bandits import Policy
from streamserve.config import SpecuStreamConfig
from streamserve.specustream import (
    CostTable,
    MakeDepthPolicy,
    StopRule,
    policies,
    simulate,
    synthetic,
)
from streamserve.types import Prompt, RequestOutput

PLAIN = "fixed:0"
CURVE_POINTS = 50
SUMMARY_KEYS = (  # of `metrics.summarise`, those that are not there where nothing was drafted included
    "spec_decode_acceptance_rate",
    "spec_decode_acceptance_length",
    "spec_decode_num_drafts",
    "spec_decode_draft_tokens",
    "spec_decode_accepted_tokens",
    "spec_decode_per_position_acceptance_rates",
)


class CostShape(NamedTuple):
    """A made-up machine: 1 + b (K + 1) / ridge ms to verify b rows at depth K, and K draft (1 + b / ridge) ms to draft.

    Attributes:
      ridge: tokens that cost as much as reading the weights once.
      draft: size of the draft model beside the target.
    """

    ridge: float
    draft: float


SHAPES: Mapping[str, CostShape] = {"cpu_like": CostShape(8.0, 0.15), "gpu_like": CostShape(128.0, 0.06)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """What is simulated: every cell at every cost and batch.

    Attributes:
      cells: acceptance processes, as `specustream.synthetic.parse` reads them.
      costs: names of `SHAPES`; a measured table takes their place.
      batches: rows that run.
      tiers: depths, ascending; those of a measured table take their place.
      ticks: of a run.
      rounds: of a tick.
    """

    cells: tuple[str, ...]
    costs: tuple[str, ...]
    batches: tuple[int, ...]
    tiers: tuple[int, ...]
    ticks: int
    rounds: int


def fixed_arm(depth: int) -> str:
    """Name the arm of a fixed depth."""
    return f"fixed:{depth}"


def fixed_depth(arm: str) -> int | None:
    """Give the depth of a fixed arm; None for a policy."""
    return int(arm.removeprefix("fixed:")) if arm.startswith("fixed:") else None


def make_arm(arm: str, specustream: SpecuStreamConfig) -> MakeDepthPolicy:
    """Find the factory behind an arm; `specustream` are the coefficients of the policy of that name.

    Raises:
      ValueError: the name stands for nothing.
    """
    depth = fixed_depth(arm)
    if depth is not None:
        return functools.partial(policies.fixed, depth=depth)
    factory = parts.find("policy", arm, parts.POLICIES)
    if factory is policies.specustream:
        return functools.partial(factory, **dataclasses.asdict(specustream))
    return factory


def made_up_costs(name: str, tiers: Sequence[int], batches: Sequence[int]) -> CostTable:
    """Lay out one of `SHAPES` as a table.

    Raises:
      RunError: there is no such shape.
    """
    if name not in SHAPES:
        raise RunError(f"unknown cost shape {name!r}; known: {', '.join(SHAPES)}; or a measured table as --costs=FILE")
    ridge, draft = SHAPES[name]
    tier_A, batch_N1 = np.asarray(tiers, np.float64), np.asarray(batches, np.float64)[:, None]
    draft_NA = tier_A * draft * (1 + batch_N1 / ridge)
    seconds_NA = 1e-3 * (1 + batch_N1 * (tier_A + 1) / ridge + draft_NA)
    draft_NCA, seconds_NCA = 1e-3 * draft_NA[:, None], seconds_NA[:, None]
    return CostTable(tiers=tiers, batches=batches, contexts=(0,), seconds_NCA=seconds_NCA, draft_NCA=draft_NCA)


def measured_costs(path: pathlib.Path) -> CostTable:
    """Read a table that an engine has measured, wherever that was.

    Raises:
      RunError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return CostTable.from_json(text, json.loads(text)["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"cannot read the cost table {str(path)!r}: {error}") from None


def simulate_arm(
    arm: str,
    cell: str,
    costs: CostTable,
    *,
    batch: int,
    ticks: int,
    rounds: int,
    seed: int,
    specustream: SpecuStreamConfig,
) -> dict[str, Any]:
    """Simulate one arm on one cell; the luck is the same for every arm.

    Returns:
      What a row says of it alone. `regret` is to the best depth of each tick, `regret_to_fixed` to the best fixed depth
      of the run in hindsight; both are expected tokens. `stops` tells of a policy that lets a draft stop by its own
      confidence, which a simulated draft does not have: it goes on to the end.
    """
    tiers, stops = costs.tiers, set()

    def make(tiers: tuple[int, ...], slots: int) -> Policy:
        policy = make_arm(arm, specustream)(tiers, slots)

        def choose(*arguments: Any) -> Any:
            plan, state = policy.choose(*arguments)
            stops.add(plan.rule != StopRule.NEVER)
            return plan, state

        return policy._replace(choose=choose)

    trace = simulate.simulate(
        make,
        synthetic.parse(cell, max(1, *tiers)),
        costs,
        tiers=tiers,
        slots=batch,
        batch=batch,
        rounds=rounds,
        ticks=ticks,
        seed=seed,
    )
    regret_T, pulls_A = simulate.regret_T(trace), np.bincount(trace.arm_T, minlength=len(tiers))
    return {
        "goodput": simulate.goodput(trace),
        "tokens": float(trace.mean_tokens_T.sum()),
        "regret": float(regret_T.sum()),
        "regret_to_fixed": float(simulate.regret_to_fixed_T(trace).sum()),
        "stops": True in stops,
        "switches": int(np.count_nonzero(np.diff(trace.arm_T))),
        "shares": {str(tier): float(count) / ticks for tier, count in zip(tiers, pulls_A, strict=True)},
        "depth_curve": curve(np.asarray(tiers)[trace.arm_T]),
        "regret_curve": curve(regret_T.cumsum()),
    }


def curve(value_T: np.ndarray | Sequence[float]) -> dict[str, list[float]]:
    """Thin a series out to means over blocks of ticks, each at the block's middle."""
    values = np.asarray(value_T, np.float64)
    blocks = np.array_split(values, min(CURVE_POINTS, len(values))) if len(values) else []
    ends = np.cumsum([len(block) for block in blocks])
    middles = [round(float(end - len(block) / 2), 1) for end, block in zip(ends, blocks, strict=True)]
    return {"tick": middles, "value": [round(float(block.mean()), 4) for block in blocks]}


class Engine(Protocol):
    """What an arm needs of `streamserve.LLM`."""

    @property
    def specustreams(self) -> tuple[Any, ...]:
        """The `SpecuStream` of each lane, whose calls are timed."""
        ...

    def use_policy(self, name: str) -> None:
        """Let another policy decide."""
        ...

    def stream(self, prompts: Iterable[Prompt], /) -> Iterator[RequestOutput]:
        """Serve prompts, outputs in order of completion."""
        ...

    def stats(self) -> metrics.EngineStats:
        """Counters."""
        ...

    def close(self) -> None:
        """End."""
        ...


class ArmRun(NamedTuple):
    """One run of an arm: what its row says of it alone, and the tokens of each prompt."""

    row: dict[str, Any]
    tokens: tuple[tuple[int, ...], ...]


class Bench:
    """An engine whose controllers are timed."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.perf_counter):
        self._engine, self._clock = engine, clock
        self._watches = [_ControllerWatch(specustream, clock) for specustream in engine.specustreams]

    def run(self, arm: str, prompts: Sequence[Prompt]) -> ArmRun:
        """Serve all prompts under one arm, which begins without knowledge."""
        for watch in self._watches:
            watch.clear()
        self._engine.use_policy(arm)
        before, begin_s = self._engine.stats(), self._clock()
        outputs = {output.request_id: output for output in self._engine.stream(iter(prompts))}
        duration_s, after = self._clock() - begin_s, self._engine.stats()
        ordered = [outputs[prompt.request_id] for prompt in prompts]
        tokens = tuple(output.outputs[0].token_ids if output.outputs else () for output in ordered)
        row = {
            "duration": duration_s,
            "failed": sum(output.error is not None for output in ordered),
            "total_output_tokens": sum(map(len, tokens)),
            "output_throughput": sum(map(len, tokens)) / duration_s,
            **_speculation(ordered, duration_s),
            "ticks": after.ticks - before.ticks,
            "compilations_after_warmup": after.compilations_after_warmup - before.compilations_after_warmup,
            "tokens_sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
            **self._controllers(),
            "prompt_tokens": [len(one) for one in tokens],
            "prompt_seconds": _charged(ordered, duration_s),
        }
        return ArmRun(row, tokens)

    def _controllers(self) -> dict[str, Any]:
        """Say what the controllers cost and which programs they chose; the first lane's depth over time."""
        plan_s, learn_s, ticks_s = (
            sum(getattr(watch, name) for watch in self._watches) for name in ("plan_s", "learn_s", "ticks_s")
        )
        tiers = Counter(tier for watch in self._watches for tier in watch.tiers)
        planned, learned = tiers.total(), sum(watch.learned for watch in self._watches)
        return {
            "plan_us": 1e6 * plan_s / planned if planned else None,
            "learn_us": 1e6 * learn_s / learned if learned else None,
            "tick_us": 1e6 * ticks_s / learned if learned else None,
            "controller_share": (plan_s + learn_s) / ticks_s if ticks_s else None,
            "shares": {str(tier): tiers[tier] / planned for tier in sorted(tiers)},
            "depth_curve": curve(self._watches[0].tiers if self._watches else []),
        }


class _ControllerWatch:
    """Times a controller's calls, and notes what it chose."""

    def __init__(self, specustream: Any, clock: Callable[[], float]):
        self._plan, self._learn, self._clock = specustream.plan, specustream.learn, clock
        specustream.plan, specustream.learn = self.plan, self.learn
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.plan_s, self.learn_s, self.ticks_s, self.learned = 0.0, 0.0, 0.0, 0
        self.tiers: list[int] = []

    def plan(self, *arguments: Any) -> Any:
        """Plan, and note how long it took."""
        begin_s = self._clock()
        ticket = self._plan(*arguments)
        self.plan_s += self._clock() - begin_s
        self.tiers.append(ticket.tier)
        return ticket

    def learn(self, ticket: Any, output: Any, seconds: float, now_s: float) -> None:
        """Learn, and note how long it took, and how long the tick."""
        begin_s = self._clock()
        self._learn(ticket, output, seconds, now_s)
        self.learn_s += self._clock() - begin_s
        self.ticks_s += seconds
        self.learned += 1


def _speculation(outputs: Sequence[RequestOutput], duration_s: float) -> dict[str, Any]:
    """Acceptance in the names of vLLM; None where nothing was drafted. `mean_depth` counts every verification step."""
    summary = metrics.summarise(outputs, duration_s, metrics.EngineStats())
    steps = sum(len(times.drafted_per_step) for output in outputs for times in output.metrics)
    drafted = sum(sum(times.drafted_per_step) for output in outputs for times in output.metrics)
    return {
        **{key: summary.get(key) for key in SUMMARY_KEYS},
        "verify_steps": steps,
        "mean_depth": drafted / steps if steps else 0.0,
    }


def _charged(outputs: Sequence[RequestOutput], duration_s: float) -> list[float]:
    """Divide the wall time among the prompts, in proportion to how long each was served; seconds."""
    served = [sum(times.finished_s - times.scheduled_s for times in output.metrics) for output in outputs]
    total = sum(served)
    return [duration_s * one / total if total > 0 else duration_s / len(served) for one in served]
