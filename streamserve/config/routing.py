"""FlowGuard: who chooses a stream pair, and the coefficients of its own policy."""

import dataclasses

from streamserve.config.checks import check_range


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlowGuardConfig:
    """Coefficients of the routing policy `flowguard`. A score lies in [0, 1] and has no unit; more is better.

    Attributes:
      ttft: weight of the score of the predicted time to first token, before anything is learnt; like all weights, the
        utility that a whole score is worth.
      tpot: the same of the predicted time per output token, which acceptance and depth decide with the tick.
      acceptance: of accepted tokens a drafted token there: how far speculation can be relied on.
      prefix: of the part of the prompt that the prefix cache holds.
      slots: of the free part of the slots, those that are promised taken off.
      pages: of the free part of the pages.
      learning: whether weights follow the outcomes.
      prior_weight: outcomes that the weights above are worth.
      forget: outcomes after which one weighs 1/e.
      explore: probability that a request goes to any lane within the guard instead of the best.
      margin: fraction of the objective by which a prediction may exceed it before the guard shuts the lane; predictions
        err.
      stale_s: seconds without a tick after which a lane's measured pace is believed by 1/e: a way back.
      local_gain: fraction of the predicted time to first token that prefilling where it decodes must save.
    """

    ttft: float = 0.5
    tpot: float = 0.3
    acceptance: float = 0.05
    prefix: float = 0.05
    slots: float = 0.05
    pages: float = 0.05
    learning: bool = True
    prior_weight: float = 50.0
    forget: float = 500.0
    explore: float = 0.01
    margin: float = 0.0
    stale_s: float = 5.0
    local_gain: float = 0.2

    def __post_init__(self) -> None:
        for name in ("ttft", "tpot", "acceptance", "prefix", "slots", "pages", "margin", "local_gain"):
            if getattr(self, name) < 0:
                raise ValueError(f"flowguard.{name} must not be negative, got {getattr(self, name)}")
        for name in ("prior_weight", "forget", "stale_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"flowguard.{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.explore <= 1:
            raise ValueError(f"flowguard.explore must be in [0, 1], got {self.explore}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """FlowGuard: who chooses the stream pair of a request, and by what a choice is judged.

    Attributes:
      policy: a name of `streamserve.parts.ROUTERS`, or a factory of yours as "package.module:factory".
      ttft_s: objective: seconds from arrival within which a request wants its first token.
      tpot_s: objective: seconds a token after the first.
      local_prefill_tokens: longest prompt, tokens, that may be computed on the decode mesh of a disaggregated pair if
        the policy says so (conditional disaggregation); 0 compiles nothing for it.
      flowguard: coefficients of the policy of that name.
    """

    policy: str = "round_robin"
    ttft_s: float = 1.0
    tpot_s: float = 0.1
    local_prefill_tokens: int = 0
    flowguard: FlowGuardConfig = FlowGuardConfig()

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"routing.{name} must be positive, got {getattr(self, name)}")
        check_range("routing.local_prefill_tokens", self.local_prefill_tokens, 0)
