"""Fleets of stream pairs with something wrong, and the requests that come to them: what routers are compared on.

A scenario turns the engine's configuration into that of its fleet, the same for the simulation and for the engine. What
is wrong is always wrong with lane 0, which routers that take the first of equals meet first.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments import arrivals
from experiments.common import RunError
from streamserve.config import Config

VOCAB = 256  # tokens of made-up prompts: a page of them is never like another by chance


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrafficConfig:
    """Requests. Lengths are lognormal: a median, and a standard deviation of the logarithm.

    Attributes:
      burstiness: of the arrivals, as `experiments.arrivals.Pacing` has it.
      prompt_tokens: median length of a prompt.
      prompt_spread: of it.
      output_tokens: median length of an output.
      output_spread: of it.
      prefixes: different prefixes of scenario `prefixes`,
      prefix_tokens: tokens of each; the prompt goes on with `short_tokens` of its own.
      prefix_skew: the n-th prefix is asked for in proportion to n to the power of minus this.
      short_tokens: median length of a short prompt, of scenarios `prefixes`, `acceptance` and `mixed`.
      long_tokens: length of a long prompt of scenario `mixed`,
      long_share: fraction of the requests that have one.
      long_output_tokens: median length of an output of scenario `acceptance`, where decoding has to be the bottleneck.
    """

    burstiness: float
    prompt_tokens: int
    prompt_spread: float
    output_tokens: int
    output_spread: float
    prefixes: int
    prefix_tokens: int
    prefix_skew: float
    short_tokens: int
    long_tokens: int
    long_share: float
    long_output_tokens: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TroubleConfig:
    """What is wrong in each scenario.

    Attributes:
      slowdown: `degraded`: times that work on the lane seems to take.
      delay: `stalled`: how long its hand-offs are held up, as a fraction of the limit on the time to first token.
      slots: `small`: its slots,
      pool_tokens: and tokens that its decode pool holds.
      down_from: `dies`: when it does, as a fraction of the run,
      down_until: and when it comes back, likewise.
      cache_tokens: `prefixes`: tokens that the prefill pool of every lane holds.
      local_tokens: `mixed`: longest prompt that may be computed where it is decoded.
      acceptance: `acceptance`: what lanes 0, 2, .. and what lanes 1, 3, .. accept, as `specustream.synthetic` reads it.
      policy: `acceptance`: who chooses the depth: "fixed", or another policy,
      tiers: among these depths; "fixed" takes the largest.
    """

    slowdown: float
    delay: float
    slots: int
    pool_tokens: int
    down_from: float
    down_until: float
    cache_tokens: int
    local_tokens: int
    acceptance: tuple[str, str]
    policy: str
    tiers: tuple[int, ...]


class Ask(NamedTuple):
    """A request before anybody serves it."""

    at_s: float  # from the beginning
    tokens: tuple[int, ...]
    max_tokens: int


class Shape(NamedTuple):
    """Lengths of a request: of its prompt, of the part of it that others have, too, and of its output."""

    prompt: int
    shared: int
    output: int


class Scenario(NamedTuple):
    """A fleet and its traffic.

    Attributes:
      fleet: `(config, troubles, duration_s) -> config`.
      shape: `(traffic, generator) -> (Shape, which prefix, or -1)`.
    """

    fleet: Callable[[Config, TroubleConfig, float], Config]
    shape: Callable[[TrafficConfig, np.random.Generator], tuple[Shape, int]]


def prepare(name: str, config: Config, troubles: TroubleConfig, duration_s: float) -> Config:
    """Give the configuration of a scenario's fleet, for runs of `duration_s` seconds of arrivals.

    Raises:
      RunError: there is no such scenario, or its fleet cannot be configured.
    """
    if name not in SCENARIOS:
        raise RunError(f"unknown scenario {name!r}; known: {', '.join(SCENARIOS)}")
    try:
        return SCENARIOS[name].fleet(config, troubles, duration_s)
    except ValueError as error:
        raise RunError(f"scenario {name!r}: {error}") from None


def shapes(name: str, traffic: TrafficConfig, max_model_len: int, count: int, seed: int) -> list[tuple[Shape, int]]:
    """Draw lengths of requests, cut to what a model takes, and the number of each one's prefix, or -1."""
    generator, drawn = np.random.default_rng([seed, 0]), []
    for _ in range(count):
        shape, prefix = SCENARIOS[name].shape(traffic, generator)
        output = min(shape.output, max_model_len // 2)
        prompt = min(shape.prompt, max_model_len - output)
        drawn.append((Shape(prompt, min(shape.shared, prompt - 1), output), prefix))
    return drawn


def draw(
    name: str, traffic: TrafficConfig, *, max_model_len: int, rate: float, duration_s: float, seed: int
) -> list[Ask]:
    """Draw the requests of a run: the same for every router.

    Args:
      name: of the scenario.
      traffic: what comes.
      max_model_len: most tokens of prompt and output.
      rate: requests a second.
      duration_s: seconds in which they come, in expectation.
      seed: of everything; the same at every rate, as far as they go.
    """
    count = max(2, round(rate * duration_s))
    pacing = arrivals.Pacing(request_rate=rate, burstiness=traffic.burstiness)
    times_s = arrivals.draw(count, pacing, seed)
    words = np.random.default_rng([seed, 1])
    prefixes = words.integers(0, VOCAB, (traffic.prefixes, traffic.prefix_tokens))
    asks = []
    for at_s, (shape, prefix) in zip(times_s, shapes(name, traffic, max_model_len, count, seed), strict=True):
        shared = prefixes[prefix, : shape.shared].tolist() if prefix >= 0 else []
        own = words.integers(0, VOCAB, shape.prompt - len(shared)).tolist()
        asks.append(Ask(float(at_s), (*shared, *own), shape.output))
    return asks


# --- traffic


def _length(generator: np.random.Generator, median: int, spread: float) -> int:
    return max(1, round(float(median * np.exp(spread * generator.standard_normal()))))


def _usual(traffic: TrafficConfig, generator: np.random.Generator) -> tuple[Shape, int]:
    prompt = _length(generator, traffic.prompt_tokens, traffic.prompt_spread)
    return Shape(prompt, 0, _length(generator, traffic.output_tokens, traffic.output_spread)), -1


def _prefixed(traffic: TrafficConfig, generator: np.random.Generator) -> tuple[Shape, int]:
    weights = np.arange(1, traffic.prefixes + 1) ** -traffic.prefix_skew
    prefix = int(generator.choice(traffic.prefixes, p=weights / weights.sum()))
    own = _length(generator, traffic.short_tokens, traffic.prompt_spread)
    return Shape(
        traffic.prefix_tokens + own,
        traffic.prefix_tokens,
        _length(generator, traffic.output_tokens, traffic.output_spread),
    ), prefix


def _mixed(traffic: TrafficConfig, generator: np.random.Generator) -> tuple[Shape, int]:
    is_long = generator.random() < traffic.long_share
    prompt = traffic.long_tokens if is_long else _length(generator, traffic.short_tokens, traffic.prompt_spread)
    return Shape(prompt, 0, _length(generator, traffic.output_tokens, traffic.output_spread)), -1


def _talkative(traffic: TrafficConfig, generator: np.random.Generator) -> tuple[Shape, int]:
    prompt = _length(generator, traffic.short_tokens, traffic.prompt_spread)
    return Shape(prompt, 0, _length(generator, traffic.long_output_tokens, traffic.output_spread)), -1


# --- fleets


def _alike(config: Config, troubles: TroubleConfig, duration_s: float) -> Config:
    del troubles, duration_s
    return config


def _degraded(config: Config, troubles: TroubleConfig, duration_s: float) -> Config:
    del duration_s
    return _lanes(config, slowdown=_first(config, troubles.slowdown, 1.0))


def _stalled(config: Config, troubles: TroubleConfig, duration_s: float) -> Config:
    del duration_s
    return _lanes(config, transfer_delay_s=_first(config, troubles.delay * config.routing.ttft_s, 0.0))


def _small(config: Config, troubles: TroubleConfig, duration_s: float) -> Config:
    del duration_s
    pipeserve, longest = config.pipeserve, config.model.max_model_len
    pool_tokens = pipeserve.decode_pool_tokens
    if pool_tokens is None:
        if longest is None:
            raise ValueError("model.max_model_len or pipeserve.decode_pool_tokens must be given")
        pool_tokens = pipeserve.max_num_seqs * longest
    return _lanes(
        config,
        slots=_first(config, troubles.slots, pipeserve.max_num_seqs),
        decode_pool_tokens=_first(config, troubles.pool_tokens, pool_tokens),
    )


def _dies(config: Config, troubles: TroubleConfig, duration_s: float) -> Config:
    return _lanes(
        config,
        down_from_s=_first(config, troubles.down_from * duration_s, -1.0),
        down_until_s=_first(config, troubles.down_until * duration_s, -1.0),
    )


def _prefixes(config: Config, troubles: TroubleConfig, duration_s: float) -> Config:
    del duration_s
    changes = {"enable_prefix_caching": True, "prefill_pool_tokens": troubles.cache_tokens}
    return dataclasses.replace(config, pipeserve=dataclasses.replace(config.pipeserve, **changes))


def _acceptance(config: Config, troubles: TroubleConfig, duration_s: float) -> Config:
    del duration_s
    speculation = dataclasses.replace(
        config.speculation,
        method="synthetic",
        acceptance=troubles.acceptance[0],
        policy=troubles.policy,
        tiers=troubles.tiers[-1:] if troubles.policy == "fixed" else troubles.tiers,
        max_depth=None if troubles.policy == "fixed" else troubles.tiers[-1],
        num_speculative_tokens=troubles.tiers[-1],
    )
    levels = tuple(troubles.acceptance[lane % 2] for lane in range(config.topology.num_pairs))
    return _lanes(dataclasses.replace(config, speculation=speculation), acceptance=levels)


def _local(config: Config, troubles: TroubleConfig, duration_s: float) -> Config:
    del duration_s
    routing = dataclasses.replace(config.routing, local_prefill_tokens=troubles.local_tokens)
    return dataclasses.replace(config, routing=routing)


def _first(config: Config, troubled: Any, others: Any) -> tuple[Any, ...]:
    """Give lane 0 one value, and all others another."""
    return (troubled, *(others for _ in range(config.topology.num_pairs - 1)))


def _lanes(config: Config, **entries: tuple[Any, ...]) -> Config:
    return dataclasses.replace(config, lanes=dataclasses.replace(config.lanes, **entries))


SCENARIOS: Mapping[str, Scenario] = {
    "alike": Scenario(_alike, _usual),
    "degraded": Scenario(_degraded, _usual),
    "stalled": Scenario(_stalled, _usual),
    "small": Scenario(_small, _usual),
    "dies": Scenario(_dies, _usual),
    "prefixes": Scenario(_prefixes, _prefixed),
    "acceptance": Scenario(_acceptance, _talkative),
    "mixed": Scenario(_local, _mixed),
}
