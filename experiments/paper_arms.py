"""Arms of the reproduction of the StreamServe paper: which there are, what engine each needs, and one run of one.

A fleet is a way to divide the devices; its arms share one engine. An arm is a fleet, a router and a depth policy. This
file knows neither what the paper claims nor how arms compare.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from experiments.common import RunError, portable
from experiments.depth_arms import PLAIN
from streamserve import mesh, metrics
from streamserve.config import Config, SpeculationConfig, TopologyConfig, from_mapping
from streamserve.types import Prompt, RequestOutput

BASE_ROUTER = "round_robin"
DIGEST_DIGITS = 16  # hexadecimal, of the hash of an answer's tokens
DIGITS = 6  # of seconds
# What a row has a list of, an entry a prompt.
PER_PROMPT = ("input_tokens", "output_tokens", "ttft_s", "latency_s", "charged_s", "lane", "tokens_sha256")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """How devices are divided.

    Attributes:
      topology: as `topology.topology`.
      num_pairs: stream pairs.
      prefill_devices: of each prefill mesh.
      decode_devices: of each decode mesh, or of the one mesh of a colocated pair.
      drafts: it has a drafter and runs with every router and policy; otherwise it is a baseline.
    """

    topology: str
    num_pairs: int
    prefill_devices: int
    decode_devices: int
    drafts: bool


class Arm(NamedTuple):
    """What runs: names of a fleet, a routing policy and a depth policy."""

    fleet: str
    router: str
    policy: str

    def __str__(self) -> str:
        return "/".join(self)


def read_fleets(values: Any, chosen: Sequence[str] | None) -> dict[str, Fleet]:
    """Read the section of fleets, those that are chosen; the two that draft come first.

    Raises:
      RunError: a wrong field, an unknown name, or no pair of a disaggregated and a colocated fleet that draft.
    """
    if not isinstance(values, Mapping) or not set(chosen or ()) <= set(values):
        raise RunError(f"--fleets must be among {', '.join(values or ())}, got {', '.join(chosen or ())}")
    fleets: dict[str, Fleet] = {}
    for name in values if chosen is None else chosen:
        try:
            fleets[name] = from_mapping(Fleet, values[name], path=f"fleets.{name}.")
        except (ValueError, TypeError, AttributeError) as error:
            raise RunError(f"config field 'fleets.{name}': {error}") from None
    drafting = sorted(fleet.topology for fleet in fleets.values() if fleet.drafts)
    if drafting != ["colocated", "disaggregated"]:
        raise RunError(f"one colocated and one disaggregated fleet must draft, but those that do are {drafting}")
    return dict(sorted(fleets.items(), key=lambda item: not item[1].drafts))


def fleet_config(base: Config, fleet: Fleet, concurrency: int) -> Config:
    """Configure the engine of a fleet: slots and prefills are divided among its pairs, all else is that of `base`.

    Raises:
      RunError: the slots do not divide.
    """
    slots, rest = divmod(concurrency, fleet.num_pairs)
    if rest or not slots:
        raise RunError(f"concurrency={concurrency} must divide over {fleet.num_pairs} pairs")
    division = dataclasses.asdict(fleet)
    del division["drafts"]
    try:
        topology = TopologyConfig(share_devices=base.topology.share_devices, **division)
    except ValueError as error:
        raise RunError(str(error)) from None
    return dataclasses.replace(
        base,
        topology=topology,
        pipeserve=dataclasses.replace(base.pipeserve, max_num_seqs=slots, max_prefills=slots),
        speculation=base.speculation if fleet.drafts else SpeculationConfig(),
    )


def list_arms(fleets: Mapping[str, Fleet], routers: Sequence[str], policies: Sequence[str]) -> tuple[Arm, ...]:
    """List the arms: fleets that draft with every router and policy, baselines without either."""
    drafting = [
        Arm(name, router, policy)
        for name, fleet in fleets.items()
        if fleet.drafts
        for router in (BASE_ROUTER, *routers)
        for policy in (PLAIN, *policies)
    ]
    return (*drafting, *(Arm(name, BASE_ROUTER, PLAIN) for name, fleet in fleets.items() if not fleet.drafts))


def settings(config: Config) -> dict[str, Any]:
    """Flatten a configuration to dotted names; folders are left out, since they are a machine's."""
    values = dataclasses.asdict(config)
    del values["compilation_cache_dir"]
    return portable(dict(_flat(values, "")))


def _flat(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


class Engine(Protocol):
    """What an arm needs of `streamserve.LLM`."""

    def use_router(self, name: str) -> None:
        """Let another routing policy decide."""
        ...

    def use_policy(self, name: str) -> None:
        """Let another depth policy decide."""
        ...

    def serve(self, arrivals: Iterable[tuple[float, Prompt]]) -> Iterator[RequestOutput]:
        """Serve prompts as they arrive, outputs in order of completion."""
        ...

    def stats(self) -> metrics.EngineStats:
        """Counters."""
        ...


def engine_row(name: str, config: Config, engine: Engine, versions: Mapping[str, Any]) -> dict[str, Any]:
    """Say what the engine of a fleet is: all that its arms have in common."""
    stats = engine.stats()
    return {
        "kind": "engine",
        "fleet": name,
        "devices": min(mesh.num_devices(config.topology), jax.device_count()),  # fewer where meshes share them
        "versions": dict(versions),
        "programs": stats.programs,
        "warmup_s": round(stats.warmup_s, DIGITS),
        "settings": settings(config),
    }


def run_arm(
    engine: Engine,
    arm: Arm,
    prompts: Sequence[Prompt],
    arrivals_s: Sequence[float],
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Serve all prompts under one arm, whose router and policy begin without knowledge.

    Returns:
      What a row says of it. Lists have an entry a prompt, None where it failed; `charged_s` divides the wall time
      among prompts, in proportion to how long each was served.
    """
    engine.use_router(arm.router)
    engine.use_policy(arm.policy)
    before, begin_s = engine.stats(), clock()
    outputs = {output.request_id: output for output in engine.serve(zip(arrivals_s, prompts, strict=True))}
    duration_s, after = clock() - begin_s, engine.stats()
    ordered, tally = [outputs[prompt.request_id] for prompt in prompts], metrics.Tally()
    for output in ordered:
        tally.add(output)
    changed = ("compilations_after_warmup", "preemptions", "kv_transfer_bytes")
    return {
        "duration_s": round(duration_s, DIGITS),
        "failed": tally.failed,
        **{name: getattr(after, name) - getattr(before, name) for name in changed},
        "drafts": tally.drafts,
        "draft_tokens": tally.draft_tokens,
        "accepted_tokens": tally.accepted_tokens,
        **_per_prompt(ordered, duration_s),
    }


def _per_prompt(outputs: Sequence[RequestOutput], duration_s: float) -> dict[str, list[Any]]:
    served_s = [0.0 if output.error else _span(output, "scheduled_s", "finished_s") for output in outputs]
    total_s = sum(served_s)
    entries = []
    for output, one_s in zip(outputs, served_s, strict=True):
        if output.error:
            entries.append(dict.fromkeys(PER_PROMPT))
            continue
        tokens, times = output.outputs[0].token_ids, output.metrics[0]
        entries.append({
            "input_tokens": len(output.prompt_token_ids),
            "output_tokens": len(tokens),
            "ttft_s": round(_span(output, "arrival_s", "first_token_s"), DIGITS),
            "latency_s": round(_span(output, "arrival_s", "finished_s"), DIGITS),
            "charged_s": round(duration_s * one_s / total_s, DIGITS) if total_s else duration_s / len(outputs),
            "lane": times.lane,
            "tokens_sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:DIGEST_DIGITS],
        })  # fmt: skip
    return {name: [entry[name] for entry in entries] for name in PER_PROMPT}


def _span(output: RequestOutput, begin: str, end: str) -> float:
    """Seconds between two stamps of a request with one completion."""
    return getattr(output.metrics[0], end) - getattr(output.metrics[0], begin)
