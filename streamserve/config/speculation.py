"""SpecuStream: who drafts, how deep, and the coefficients of its own policy."""

import dataclasses
import itertools

from streamserve.config.checks import check_range

MAX_DEPTH = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpecuStreamConfig:
    """Coefficients of the depth policy `specustream`.

    Attributes:
      horizons: ticks after which a count weighs 1/e, ascending; one estimate of acceptance each.
      prior: acceptance of the first position before anything is known, a probability.
      prior_weight: verifications that the prior is worth, and each position's likeness to the one before it.
      share: fraction of the belief that is dealt out evenly among horizons at each tick that verified drafts.
      evidence: verifications, the most that one tick counts as when horizons are compared; rows of a tick are alike.
      caution: standard deviations of the horizons' disagreement by which a prediction is lowered.
      likeness: ticks that the other arms are worth when measured over predicted goodput of an arm is estimated.
      clip: the most by which the logarithm of a tick's measured over predicted goodput counts.
      hysteresis: fraction by which another arm must be predicted to be better before it becomes home.
      min_dwell: ticks that an arm stays home at least; the feedback of its first one takes two.
      amortise: rounds over which the price of a switch is spread.
      probe_budget: fraction of the time that probes may cost while home is plain decoding, were nothing accepted.
      patience: times the shortest interval, the longest between two probes. Each that changes nothing doubles the next
        one; a change of half of those who run sets it back.
      explore: probability that a tick runs any arm near the best.
      margin: fraction of the best predicted goodput by which an arm may be worse and still be near.
    """

    horizons: tuple[float, ...] = (4.0, 25.0, 150.0)
    prior: float = 0.6
    prior_weight: float = 3.0
    share: float = 0.02
    evidence: float = 32.0
    caution: float = 0.25
    likeness: float = 16.0
    clip: float = 0.25
    hysteresis: float = 0.01
    min_dwell: int = 2
    amortise: float = 64.0
    probe_budget: float = 0.02
    patience: float = 4.0
    explore: float = 0.01
    margin: float = 0.1

    def __post_init__(self) -> None:
        horizons = tuple(self.horizons)
        object.__setattr__(self, "horizons", horizons)
        if not horizons or horizons[0] <= 0 or any(a >= b for a, b in itertools.pairwise(horizons)):
            raise ValueError(f"specustream.horizons must ascend from above 0, got {horizons}")
        for name in ("prior", "share", "probe_budget", "explore", "margin"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"specustream.{name} must be in [0, 1], got {value}")
        for name in ("prior_weight", "evidence", "likeness", "clip", "amortise", "patience", "probe_budget"):
            if not getattr(self, name) > 0:
                raise ValueError(f"specustream.{name} must be positive, got {getattr(self, name)}")
        for name in ("caution", "hysteresis", "min_dwell"):
            if getattr(self, name) < 0:
                raise ValueError(f"specustream.{name} must not be negative, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """SpecuStream: who drafts, who decides how deep, who verifies. Names are those of `streamserve.parts`.

    Attributes:
      method: the drafter: "draft_model", "ngram", "suffix", "none" for plain decoding, "synthetic" for a draft model
        whose acceptance is drawn at random, or a factory of yours as "package.module:factory".
      model: folder of the draft model, or `bundled:draft`.
      policy: who chooses the depth: "fixed", "specustream" or another name of `streamserve.parts.POLICIES`, or a
        factory of yours.
      verifier: which rule accepts: "rejection", "block", "coupled", or a factory of yours.
      num_speculative_tokens: depth K of the policy "fixed", 0 to 8 tokens a round.
      max_depth: most tokens a round that another policy may draft, 1 to 8; None for `num_speculative_tokens`.
      tiers: depths that programs are compiled for, ascending; () for 0, 1, 2, 4, 6, 8 up to the largest, or for the
        one depth of "fixed".
      acceptance: what "synthetic" draws from, as `specustream.synthetic.parse` reads it: "iid:0.7" and others.
      audit: decode every greedy answer again without speculation, and report where it differs.
      specustream: coefficients of the policy of that name.
    """

    method: str = "none"
    model: str | None = None
    policy: str = "fixed"
    verifier: str = "rejection"
    num_speculative_tokens: int = 4
    max_depth: int | None = None
    tiers: tuple[int, ...] = ()
    acceptance: str | None = None
    audit: bool = False
    specustream: SpecuStreamConfig = SpecuStreamConfig()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiers", tuple(self.tiers))
        if self.method in ("draft_model", "synthetic") and self.model is None:
            raise ValueError(f"speculation.method={self.method!r} needs speculation.model, a folder or 'bundled:draft'")
        if (self.method == "synthetic") != (self.acceptance is not None):
            raise ValueError("speculation.acceptance and speculation.method='synthetic' go together")
        check_range("speculation.num_speculative_tokens", self.num_speculative_tokens, 0, MAX_DEPTH)
        if self.max_depth is not None:
            check_range("speculation.max_depth", self.max_depth, 1, MAX_DEPTH)
        if any(a >= b for a, b in itertools.pairwise(self.tiers)) or not set(self.tiers) <= set(range(MAX_DEPTH + 1)):
            raise ValueError(f"speculation.tiers must ascend within [0, {MAX_DEPTH}], got {self.tiers}")
        if self.policy == "fixed" and self.tiers and self.num_speculative_tokens not in self.tiers:
            raise ValueError(
                f"speculation.num_speculative_tokens={self.num_speculative_tokens} is not among {self.tiers=}"
            )
        if self.policy.startswith("fixed:"):
            raise ValueError(f"speculation.policy={self.policy!r}: say policy='fixed' and num_speculative_tokens")
        if self.method == "synthetic" and max(self.depths) == 0:
            raise ValueError("speculation.method='synthetic' needs a depth of at least 1")
        if self.audit and self.method == "synthetic":
            raise ValueError("there is nothing to audit where acceptance is synthetic: the output is not the target's")

    @property
    def fixed_depth(self) -> int:
        """Depth of the policy "fixed": 0 without a drafter."""
        return 0 if self.method == "none" else self.num_speculative_tokens

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths that programs are compiled for: (0,) without a drafter."""
        if self.method == "none":
            return (0,)
        largest = self.num_speculative_tokens if self.max_depth is None else self.max_depth
        chosen = {depth for depth in (0, 1, 2, 4, 6, 8) if depth < largest} | {largest}
        if self.policy == "fixed":
            chosen = {self.num_speculative_tokens}
        return tuple(sorted({*(self.tiers or chosen), *((0,) if self.audit else ())}))
