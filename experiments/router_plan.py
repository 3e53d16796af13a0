"""What a comparison of routers is asked to do: the sections of its config file, read and checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import common, router_capacity, router_runs, router_scenarios
from experiments.router_clock import LaneCosts
from experiments.router_runs import Simulation
from experiments.router_scenarios import Ask, TrafficConfig, TroubleConfig
from streamserve import parts
from streamserve.config import Config, from_mapping

OWN_SECTIONS = ("comparison", "traffic", "troubles", "simulation", "engine")
SAMPLE = 2000  # requests whose lengths stand for all


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonConfig:
    """What is compared.

    Attributes:
      scenarios: names of `router_scenarios.SCENARIOS`.
      loads: requests a second, as fractions of what the fleet can answer.
    """

    scenarios: tuple[str, ...]
    loads: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.scenarios or not self.loads or min(self.loads) <= 0:
            raise ValueError(f"there must be scenarios and positive loads, got {self.scenarios} and {self.loads}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """A simulated fleet.

    Attributes:
      num_pairs: lanes.
      duration_s: seconds in which requests come.
      ttft_s: limit on the time to first token, seconds.
      tpot_s: limit on the time per output token, seconds.
      rounds: what rounds cost: a name of `depth_arms.SHAPES`.
      costs: what other work takes.
    """

    num_pairs: int
    duration_s: float
    ttft_s: float
    tpot_s: float
    rounds: str
    costs: LaneCosts


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Runs on an engine.

    Attributes:
      duration_s: seconds in which requests come.
      capacity_requests: requests by which it is measured what the engine can answer.
    """

    duration_s: float
    capacity_requests: int


class Plan:
    """What is asked for, read and checked.

    Attributes:
      engine: configuration of the engine, as the file has it.
      compared, traffic, troubles, simulation, on_engine: the other sections.
      routers: names.
    """

    def __init__(self, config: Mapping[str, Any], routers: Sequence[str] | None):
        """Read it.

        Args:
          config: sections of the config file.
          routers: to compare; None for all.

        Raises:
          RunError: the config is wrong, or a router or scenario is not known.
        """
        self.engine, sampling = common.split_config({k: v for k, v in config.items() if k not in OWN_SECTIONS})
        del sampling  # lengths are the traffic's, and everything is greedy
        self.compared: ComparisonConfig = _section(ComparisonConfig, config, "comparison")
        self.traffic: TrafficConfig = _section(TrafficConfig, config, "traffic")
        self.troubles: TroubleConfig = _section(TroubleConfig, config, "troubles")
        self.simulation: SimulationConfig = _section(SimulationConfig, config, "simulation")
        self.on_engine: EngineConfig = _section(EngineConfig, config, "engine")
        self.routers = tuple(dict.fromkeys(sorted(parts.ROUTERS) if routers is None else routers))
        try:
            for name in self.routers:
                parts.find("router", name, parts.ROUTERS)
        except ValueError as error:
            raise common.RunError(str(error)) from None
        for name in self.compared.scenarios:
            router_scenarios.prepare(name, self.engine, self.troubles, 1.0)

    def asks(self, scenario: str, max_model_len: int, *, rate: float, duration_s: float, seed: int) -> list[Ask]:
        """Draw the requests of a run."""
        sizes = {"max_model_len": max_model_len, "rate": rate, "duration_s": duration_s}
        return router_scenarios.draw(scenario, self.traffic, seed=seed, **sizes)


def _section(cls: type, config: Mapping[str, Any], name: str) -> Any:
    try:
        return from_mapping(cls, config.get(name, {}), path=f"{name}.")
    except (ValueError, TypeError) as error:
        raise common.RunError(f"config section {name!r}: {error}") from None


def simulated_fleet(plan: Plan, scenario: str) -> tuple[Simulation, float]:
    """Build the fleet of a scenario; gives it, and the requests a second that it can answer.

    Raises:
      RunError: it cannot be simulated.
    """
    told, longest = plan.simulation, longest_request(plan.engine)
    try:
        base = dataclasses.replace(
            plan.engine,
            topology=dataclasses.replace(plan.engine.topology, num_pairs=told.num_pairs),
            routing=dataclasses.replace(plan.engine.routing, ttft_s=told.ttft_s, tpot_s=told.tpot_s),
        )
        config = router_scenarios.prepare(scenario, base, plan.troubles, told.duration_s)
        if config.speculation.method not in ("none", "synthetic"):
            raise ValueError("a simulated pair has no draft model; speculation.method must be 'none' or 'synthetic'")
        parts.check_names(config)
        lanes = router_capacity.fleet(config, longest)
    except ValueError as error:
        raise common.RunError(f"scenario {scenario!r} cannot be simulated: {error}") from None
    rounds = router_runs.rounds_table(told.rounds, lanes)
    drawn = router_scenarios.shapes(scenario, plan.traffic, longest, SAMPLE, 0)
    most = router_capacity.capacity(config, lanes, told.costs, rounds, drawn, duration_s=told.duration_s)
    return Simulation(config=config, lanes=lanes, costs=told.costs, rounds=rounds), most


def longest_request(config: Config) -> int:
    """Give the most tokens of a request.

    Raises:
      RunError: the config does not say.
    """
    if config.model.max_model_len is None:
        raise common.RunError("a simulation needs model.max_model_len: there is no model that has it")
    return config.model.max_model_len
