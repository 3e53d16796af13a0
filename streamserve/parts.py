"""Which factory stands behind a name of the config, and how a stream pair is put together from the parts.

A user's own part is named `package.module:factory` and needs no change here.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from streamserve import mesh as meshes
from streamserve.bandits import Policy
from streamserve.config import Config, PipeServeConfig, SpeculationConfig
from streamserve.flowguard import FlowGuard, MakeRouter, Objective, RouteLog, routers
from streamserve.models import Model, load_model, place, resolve_path
from streamserve.pair_protocol import Pair
from streamserve.pipeserve import (
    Handicap,
    HandicappedPair,
    LaneSizes,
    PairModels,
    Programs,
    StreamPair,
    context_lengths,
    lane_sizes,
    measure_costs,
)
from streamserve.specustream import (
    CostTable,
    DecisionLog,
    DraftWay,
    MakeDepthPolicy,
    SpecuStream,
    drafters,
    nominal,
    policies,
    synthetic,
    verify,
)
from streamserve.tokenizer import Tokenizer, load_tokenizer

# Names in a config and the factories behind them: a new one is one more line.
ROUTERS: Mapping[str, MakeRouter] = {
    "flowguard": routers.flowguard,
    "flowguard_paper": routers.flowguard_paper,
    "kv_cost": routers.kv_cost,
    "least_outstanding": routers.least_outstanding,
    "min_latency": routers.min_latency,
    "power_of_two": routers.power_of_two,
    "prefix_aware": routers.prefix_aware,
    "random": routers.uniform,
    "round_robin": routers.round_robin,
    "weighted_scorers": routers.weighted_scorers,
}
POLICIES: Mapping[str, MakeDepthPolicy] = {
    "adaedl": policies.adaedl,
    "batch_table": policies.batch_table,
    "budget": policies.budget,
    "confidence_stop": policies.confidence_stop,
    "dsde": policies.dsde,
    "ema_tiers": policies.ema_tiers,
    "exp3spec": policies.exp3spec,
    "exp3spec_rate": policies.exp3spec_rate,
    "goodput": policies.goodput,
    "heuristic": policies.heuristic,
    "nightjar": policies.nightjar,
    "oracle": policies.oracle,
    "specustream": policies.specustream,
    "specustream_paper": policies.specustream_paper,
    "thompson": policies.thompson,
    "ucbspec": policies.ucbspec,
    "ucbspec_rate": policies.ucbspec_rate,
}
VERIFIERS: Mapping[str, Callable[[], verify.Verifier]] = {
    "rejection": verify.rejection,
    "block": verify.block,
    "coupled": verify.coupled,
}
# Drafters that need no model of their own: `(vocab_size) -> Drafter`.
DRAFTERS: Mapping[str, Callable[[int], drafters.Drafter]] = {"ngram": drafters.ngram, "suffix": drafters.suffix}
MODEL_METHODS = ("draft_model", "synthetic")


def find(kind: str, name: str, known: Mapping[str, Any], *, others: Sequence[str] = ()) -> Any:
    """Find the factory behind a name.

    Args:
      kind: what it is, for the message.
      name: a key of `known`, or `package.module:factory`.
      known: names and factories.
      others: names that stand for something else, for the message.

    Raises:
      ValueError: there is no such name, module or factory.
    """
    if name in known:
        return known[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        names = ", ".join(sorted([*known, *others]))
        raise ValueError(f"unknown {kind} {name!r}; known: {names}; or your own as 'package.module:factory'")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind} {name!r} cannot be imported: {error}") from error
    if not callable(factory):
        raise ValueError(f"{kind} {name!r} is not a factory but {type(factory).__name__}")
    return factory


def check_names(config: Config) -> None:
    """Look every name up and make every policy once, before anything costly begins.

    Raises:
      ValueError: a name that stands for nothing, or a factory that does not make what it should.
    """
    speculation = config.speculation
    make_router(config)(config.topology.num_pairs)
    find("speculation.verifier", speculation.verifier, VERIFIERS)
    make_policy(speculation, config.pipeserve.max_num_seqs)
    if speculation.method not in ("none", *MODEL_METHODS):
        find("speculation.method", speculation.method, DRAFTERS, others=("none", *MODEL_METHODS))
    if speculation.policy == "oracle" and speculation.method != "synthetic":
        raise ValueError("speculation.policy='oracle' knows the true acceptance, which only method='synthetic' has")
    for told in (*((speculation.acceptance,) if speculation.acceptance else ()), *config.lanes.acceptance):
        synthetic.parse(told, max(speculation.depths))


def make_policy(config: SpeculationConfig, slots: int, *, name: str | None = None) -> Policy:
    """Build the depth policy of one lane.

    Args:
      config: names the policy and the depths.
      slots: B.
      name: of another policy; "fixed:2" for that depth.

    Raises:
      ValueError: a name that stands for nothing, or a depth that is not compiled.
    """
    name = config.policy if name is None else name
    if name == "fixed" or name.startswith("fixed:"):
        told = name.removeprefix("fixed").removeprefix(":") or str(config.fixed_depth)
        if told not in map(str, config.depths):
            raise ValueError(f"policy {name!r}: no program of that depth; there are {config.depths}")
        depth = int(told)
        return policies.fixed(config.depths, slots, depth=depth)
    factory = find("speculation.policy", name, POLICIES, others=("fixed",))
    if factory is policies.specustream:
        factory = functools.partial(factory, **dataclasses.asdict(config.specustream))
    return _made("speculation.policy", name, factory, config.depths, slots)


def _made(kind: str, name: str, factory: Callable[..., Any], *arguments: Any) -> Policy:
    """Let a factory make a policy.

    Raises:
      ValueError: it takes other arguments, or makes something else.
    """
    try:
        with contextlib.suppress(ValueError):  # some builtins tell no signature
            inspect.signature(factory).bind(*arguments)
    except TypeError as error:
        raise ValueError(f"{kind} {name!r} cannot be called with {len(arguments)} argument(s): {error}") from error
    policy = factory(*arguments)
    if not isinstance(policy, Policy):
        raise ValueError(f"{kind} {name!r} made a {type(policy).__name__}, not a Policy")
    return policy


def make_router(config: Config, *, name: str | None = None) -> MakeRouter:
    """Find what builds the routing policy.

    Args:
      config: names the policy and its coefficients.
      name: of another policy.

    Raises:
      ValueError: a name that stands for nothing.
    """
    name = config.routing.policy if name is None else name
    factory = find("routing.policy", name, ROUTERS)
    if factory is routers.flowguard:
        factory = functools.partial(factory, **dataclasses.asdict(config.routing.flowguard))
    return lambda num_lanes: _made("routing.policy", name, factory, num_lanes)


def make_flowguard(config: Config, log: RouteLog | None) -> FlowGuard:
    """Build the router."""
    routing = config.routing
    return FlowGuard(
        make_router(config),
        num_lanes=config.topology.num_pairs,
        seed=config.seed,
        objective=Objective(ttft_s=routing.ttft_s, tpot_s=routing.tpot_s),
        log=log,
    )


def handicapped(config: Config, pairs: Sequence[StreamPair]) -> list[Pair]:
    """Put handicaps before the pairs that have one."""
    lanes = config.lanes
    if not lanes.are_handicapped:
        return list(pairs)
    return [
        HandicappedPair(
            pair,
            Handicap(
                slowdown=_entry(lanes.slowdown, pair.index, 1.0),
                transfer_delay_s=_entry(lanes.transfer_delay_s, pair.index, 0.0),
                down_from_s=_entry(lanes.down_from_s, pair.index, -1.0),
                down_until_s=_entry(lanes.down_until_s, pair.index, -1.0),
            ),
        )
        for pair in pairs
    ]


def _entry(entries: Sequence[Any], index: int, otherwise: Any) -> Any:
    """Give a lane's entry of a field of `LanesConfig`."""
    return entries[index] if entries else otherwise


def route_header(config: Config) -> dict[str, Any]:
    """Say what a log of routes is about, as far as its replay needs it."""
    return {
        "policy": config.routing.policy,
        "num_lanes": config.topology.num_pairs,
        "seed": config.seed,
        "flowguard": dataclasses.asdict(config.routing.flowguard),
        "lanes": dataclasses.asdict(config.lanes),
        "synthetic": config.speculation.method == "synthetic",
        "numpy": np.__version__,
    }


def make_specustreams(
    config: Config, pairs: Sequence[StreamPair], costs: CostTable, log: DecisionLog | None
) -> list[SpecuStream]:
    """Build what plans the ticks of each lane."""
    speculation = config.speculation
    ways = []
    for pair in pairs:
        told = _entry(config.lanes.acceptance, pair.index, speculation.acceptance)
        process = None if told is None else synthetic.parse(told, max(speculation.depths))
        ways.append(DraftWay(catches_up=speculation.method in MODEL_METHODS, process=process))
    return [
        SpecuStream(
            make_policy(speculation, pair.num_slots),
            costs,
            slots=pair.num_slots,
            rounds=pair.sizes.rounds,
            seed=config.seed,
            lane=pair.index,
            way=way,
            log=log,
        )
        for pair, way in zip(pairs, ways, strict=True)
    ]


def lane_costs(
    config: Config, pairs: Sequence[StreamPair], target: Model, draft: Model | None, *, use_tqdm: bool = False
) -> CostTable:
    """Find out what a round costs at every depth: from an earlier start on this machine, or by measuring.

    Nothing is measured where there is one depth alone.
    """
    pair = max(pairs, key=lambda pair: pair.num_slots)
    sizes, speculation = pair.sizes, config.speculation
    if len(sizes.tiers) == 1 or (speculation.policy == "fixed" and len(speculation.tiers) < 2):
        return nominal(sizes.tiers, sizes.batches)
    fingerprint = _fingerprint(config, sizes, target, draft)
    measure = functools.partial(
        measure_costs,
        pair,
        context_lengths(sizes.columns * sizes.page_size),
        fingerprint=fingerprint,
        use_tqdm=use_tqdm,
    )
    if config.compilation_cache_dir is None:
        return measure()
    path = pathlib.Path(config.compilation_cache_dir).expanduser() / f"costs-{_digest(fingerprint)}.json"
    with contextlib.suppress(OSError, ValueError):  # what cannot be read is measured again
        return CostTable.from_json(path.read_text(encoding="utf-8"), fingerprint)
    costs = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}")
    written.write_text(costs.to_json(), encoding="utf-8")
    written.replace(path)
    return costs


def log_header(config: Config) -> dict[str, Any]:
    """Say what a log of decisions is about, as far as its replay needs it."""
    speculation = config.speculation
    return {
        "policy": speculation.policy,
        "method": speculation.method,
        "acceptance": speculation.acceptance,
        "synthetic": speculation.method == "synthetic",
        "tiers": list(speculation.depths),
        "slots": config.pipeserve.max_num_seqs,
        "seed": config.seed,
        "fixed_depth": speculation.fixed_depth if speculation.policy == "fixed" else None,
        "specustream": dataclasses.asdict(speculation.specustream),
        "verifier": speculation.verifier,
        "lanes": dataclasses.asdict(config.lanes),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }


def _fingerprint(config: Config, sizes: LaneSizes, target: Model, draft: Model | None) -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "cpus": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "jax": jax.__version__,
        "topology": repr(config.topology),
        "sizes": repr(sizes),
        "dtype": config.model.dtype,
        "target": repr(target.config),
        "draft": config.speculation.method if draft is None else repr(draft.config),
    }


def _digest(values: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:16]


def load_target(config: Config, mesh: jax.sharding.Mesh) -> Model:
    """Load the model that is served."""
    return _load(config, str(resolve_path(config.model.model)), mesh)


def load_draft(config: Config, target: Model, tokenizer: Tokenizer | None, mesh: jax.sharding.Mesh) -> Model | None:
    """Load the draft model, if there is one, and let it speak the target's vocabulary.

    Raises:
      ValueError: its vocabulary is another one, and there is no tokenizer to compare them by.
    """
    speculation = config.speculation
    if max(speculation.depths) == 0 or speculation.method not in MODEL_METHODS:
        return None
    assert speculation.model is not None, "the config has checked it"
    path = resolve_path(speculation.model)
    draft = _load(config, str(path), mesh)
    same_size = draft.config.vocab_size == target.config.vocab_size
    if tokenizer is None or not (path / "tokenizer.json").exists():
        if not same_size:
            raise ValueError(
                f"the draft's vocabulary has {draft.config.vocab_size} tokens and the target's "
                f"{target.config.vocab_size}; without both tokenizers they cannot be matched"
            )
        return draft
    own, its = tokenizer.vocabulary(), load_tokenizer(path).vocabulary()
    if same_size and own == its:
        return draft
    fns = drafters.tli_fns(draft.fns, own, its, target.config.vocab_size, draft.config.vocab_size)
    return draft._replace(fns=fns)


def max_model_len(config: Config, target: Model, draft: Model | None) -> int:
    """Decide how long a request may be.

    Raises:
      ValueError: the models were not made for what the config asks for.
    """
    longest = target.config.max_position
    if draft is not None:
        longest = min(longest, draft.config.max_position)
    wanted = config.model.max_model_len
    if wanted is not None and wanted > longest:
        raise ValueError(f"max_model_len={wanted} exceeds the {longest} positions that the model was made for")
    return longest if wanted is None else wanted


def make_drafter(config: SpeculationConfig, draft: Model | None, vocab_size: int) -> drafters.Drafter:
    """Build what drafts."""
    if draft is not None:
        return drafters.draft_model(draft.fns, draft.kv_shape)
    if max(config.depths) == 0:
        return drafters.none()
    factory = find("speculation.method", config.method, DRAFTERS, others=("none", *MODEL_METHODS))
    drafter = factory(vocab_size)
    if not isinstance(drafter, drafters.Drafter):
        raise ValueError(f"speculation.method {config.method!r} made a {type(drafter).__name__}, not a Drafter")
    return drafter


def make_pairs(
    config: Config, pairs: Sequence[meshes.PairMeshes], target: Model, draft: Model | None, longest: int
) -> list[StreamPair]:
    """Build the lanes, for requests of `longest` tokens; nothing is compiled yet."""
    speculation = config.speculation
    colocated = config.topology.topology == "colocated"
    local_tokens = 0 if colocated else config.routing.local_prefill_tokens
    drafter = make_drafter(speculation, draft, target.config.vocab_size)
    verifier = find("speculation.verifier", speculation.verifier, VERIFIERS)()
    if not isinstance(verifier, verify.Verifier):
        raise ValueError(f"speculation.verifier {speculation.verifier!r} made no Verifier")
    lanes = []
    for index, pair in enumerate(pairs):
        models = PairModels(
            target=target.fns,
            kv_shape=target.kv_shape,
            vocab_size=target.config.vocab_size,
            drafter=drafter,
            verifier=verifier,
            prefill_params=_params_on(pair.prefill, target, draft, drafter),
            decode_params=_params_on(pair.decode, target, draft, drafter),
            synthetic=speculation.method == "synthetic",
        )
        settings = _lane_config(config, index)
        sizes = lane_sizes(settings, max_model_len=longest, tiers=speculation.depths, local_tokens=local_tokens)
        lanes.append(StreamPair(index, Programs(pair, models, settings, sizes)))
    return lanes


def _lane_config(config: Config, index: int) -> PipeServeConfig:
    """Sizes of one lane."""
    settings, lanes = config.pipeserve, config.lanes
    return dataclasses.replace(
        settings,
        max_num_seqs=_entry(lanes.slots, index, settings.max_num_seqs),
        decode_pool_tokens=_entry(lanes.decode_pool_tokens, index, settings.decode_pool_tokens),
    )


def _load(config: Config, path: str, mesh: jax.sharding.Mesh) -> Model:
    dtype = np.dtype(jax.numpy.dtype(config.model.dtype))
    return load_model(path, mesh, dtype=dtype, load_format=config.model.load_format, seed=config.seed)


def _params_on(
    mesh: jax.sharding.Mesh, target: Model, draft: Model | None, drafter: drafters.Drafter
) -> tuple[Any, Any]:
    """Parameters of target and drafter on a mesh."""
    own = jax.device_put(drafter.params, meshes.replicated(mesh)) if draft is None else place(draft, mesh).params
    return place(target, mesh).params, own
