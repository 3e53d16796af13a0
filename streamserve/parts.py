"""Which factory stands behind a name of the config, and what the factories must make.

A user's own part is named `package.module:factory` and needs no change here.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamserve.bandits import Policy
from streamserve.config import Config, SpeculationConfig
from streamserve.flowguard import MakeRouter, routers
from streamserve.models import Model
from streamserve.specustream import MakeDepthPolicy, drafters, policies, synthetic, verify

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


def make_verifier(config: SpeculationConfig) -> verify.Verifier:
    """Build the rule that accepts drafts."""
    verifier = find("speculation.verifier", config.verifier, VERIFIERS)()
    if not isinstance(verifier, verify.Verifier):
        raise ValueError(f"speculation.verifier {config.verifier!r} made no Verifier")
    return verifier
