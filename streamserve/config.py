"""Configuration: frozen, validated dataclasses, one per component. Each part receives only its own.

Every field has a sentence and a unit. Nothing here imports JAX, so that a config can be built before devices exist.
"""

import dataclasses
import difflib
import itertools
import types
import typing
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 8
BUNDLED_TARGET = "bundled:target"
BUNDLED_DRAFT = "bundled:draft"
DTYPES = ("float32", "bfloat16", "float16")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {wanted}, got {value}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelArgs:
    """Which model to serve, and how it lies in memory.

    Attributes:
      model: a Hugging Face folder, or `bundled:target`.
      tokenizer: folder of the tokenizer; None means the model's.
      skip_tokenizer_init: serve token ids alone.
      dtype: of weights and cache in memory.
      load_format: "auto" reads safetensors, "dummy" makes random weights from the config alone.
      max_model_len: most tokens of prompt and output together; None means what the model was made for.
    """

    model: str = BUNDLED_TARGET
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    dtype: str = "float32"
    load_format: str = "auto"
    max_model_len: int | None = None

    def __post_init__(self) -> None:
        _check_choice("model.dtype", self.dtype, DTYPES)
        _check_choice("model.load_format", self.load_format, ("auto", "dummy"))
        if self.max_model_len is not None:
            _check_range("model.max_model_len", self.max_model_len, 2)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TopologyConfig:
    """How devices are divided.

    Attributes:
      topology: "disaggregated" gives each pair a prefill and a decode mesh; "colocated" one mesh for both, the control
        that disaggregation is measured against.
      num_pairs: stream pairs (lanes).
      prefill_devices: devices of each prefill mesh, its degree of tensor parallelism; unused when colocated.
      decode_devices: the same of each decode mesh.
      share_devices: let meshes share devices when there are too few.
    """

    topology: str = "disaggregated"
    num_pairs: int = 1
    prefill_devices: int = 1
    decode_devices: int = 1
    share_devices: bool = False

    def __post_init__(self) -> None:
        _check_choice("topology.topology", self.topology, ("disaggregated", "colocated"))
        for name in ("num_pairs", "prefill_devices", "decode_devices"):
            _check_range(f"topology.{name}", getattr(self, name), 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PipeServeConfig:
    """Sizes of the prefill and decode programs of every stream pair, and what its pages do.

    Attributes:
      max_num_seqs: decode slots a pair.
      decode_batches: numbers of slots, ascending, that decode programs are compiled for besides `max_num_seqs`: a tick
        runs over as few slots as are held. Numbers that are no smaller are left out.
      max_prefills: prompts between admission and a decode slot, a pair; back-pressure on the prefill mesh.
      prefill_buckets: tokens of a prefill call that programs are compiled for, ascending; rounded up to pages. The
        largest is the token budget of a call, which several prompts share and a long one is cut to.
      page_size: positions of a page of the cache, tokens.
      prefill_pool_tokens: size of the prefill mesh's pools, prefix cache included, tokens; None for `max_prefills`
        prompts of full length.
      decode_pool_tokens: size of the decode mesh's pools, tokens; None for `max_num_seqs` requests of full length.
      transfer_buckets: pages that one hand-off program carries, besides 1, ascending; those beyond the longest request
        are left out.
      rounds_per_tick: draft-verify rounds that one dispatch runs on the device.
      enable_prefix_caching: keep whole pages of prompts for those that begin alike.
      draft_kv: "transfer" hands the draft's pages over; "recompute" lets the draft read the prompt on the decode mesh.
        A colocated pair has no need of either.
      preemption: what becomes of a request that loses its pages to others: "recompute" begins it again at prefill,
        "keep" holds its pages in the host's memory until there is room.
      max_logprobs: most `logprobs` and `prompt_logprobs` a request may ask for.
      max_stop_ids: most token ids that may end a request, end-of-sequence ids included.
      max_logit_bias: most tokens that a request's `logit_bias` may name.
    """

    max_num_seqs: int = 8
    decode_batches: tuple[int, ...] = ()
    max_prefills: int = 8
    prefill_buckets: tuple[int, ...] = (64, 256, 1024)
    page_size: int = 64
    prefill_pool_tokens: int | None = None
    decode_pool_tokens: int | None = None
    transfer_buckets: tuple[int, ...] = (4, 16)
    rounds_per_tick: int = 4
    enable_prefix_caching: bool = True
    draft_kv: str = "transfer"
    preemption: str = "recompute"
    max_logprobs: int = 20
    max_stop_ids: int = 8
    max_logit_bias: int = 64

    def __post_init__(self) -> None:
        for name in ("decode_batches", "prefill_buckets", "transfer_buckets"):
            sizes = tuple(getattr(self, name))
            object.__setattr__(self, name, sizes)
            if (sizes and sizes[0] < 1) or any(a >= b for a, b in itertools.pairwise(sizes)):
                raise ValueError(f"pipeserve.{name} must ascend from at least 1, got {sizes}")
        if not self.prefill_buckets:
            raise ValueError("pipeserve.prefill_buckets must name at least one size")
        for name in (
            *("max_num_seqs", "max_prefills", "page_size", "rounds_per_tick", "max_stop_ids", "max_logit_bias"),
            *(name for name in ("prefill_pool_tokens", "decode_pool_tokens") if getattr(self, name) is not None),
        ):
            _check_range(f"pipeserve.{name}", getattr(self, name), 1)
        _check_range("pipeserve.max_logprobs", self.max_logprobs, 0)
        _check_choice("pipeserve.draft_kv", self.draft_kv, ("transfer", "recompute"))
        _check_choice("pipeserve.preemption", self.preemption, ("recompute", "keep"))


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
        _check_range("speculation.num_speculative_tokens", self.num_speculative_tokens, 0, MAX_DEPTH)
        if self.max_depth is not None:
            _check_range("speculation.max_depth", self.max_depth, 1, MAX_DEPTH)
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
        _check_range("routing.local_prefill_tokens", self.local_prefill_tokens, 0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LanesConfig:
    """Stream pairs that differ on purpose, so that routing has something to see on one machine.

    Each field is empty, or has one entry a pair.

    Attributes:
      slots: decode slots, instead of `pipeserve.max_num_seqs`.
      decode_pool_tokens: size of the decode mesh's pools, tokens, instead of that of `pipeserve`.
      slowdown: times, at least 1, that every prefill call and tick seems to take.
      transfer_delay_s: seconds that every hand-off is held up.
      down_from_s: seconds from the pair's first request at which it dies; negative for never.
      down_until_s: seconds from its first request at which it comes back, empty.
      acceptance: what synthetic acceptance draws from there, instead of `speculation.acceptance`.
    """

    slots: tuple[int, ...] = ()
    decode_pool_tokens: tuple[int, ...] = ()
    slowdown: tuple[float, ...] = ()
    transfer_delay_s: tuple[float, ...] = ()
    down_from_s: tuple[float, ...] = ()
    down_until_s: tuple[float, ...] = ()
    acceptance: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("slots", "decode_pool_tokens"):
            for value in getattr(self, name):
                _check_range(f"lanes.{name}", value, 1)
        if any(value < 1 for value in self.slowdown):
            raise ValueError(f"lanes.slowdown must be at least 1, got {self.slowdown}")
        if any(value < 0 for value in self.transfer_delay_s):
            raise ValueError(f"lanes.transfer_delay_s must not be negative, got {self.transfer_delay_s}")
        if len(self.down_from_s) != len(self.down_until_s):
            raise ValueError("lanes.down_from_s and lanes.down_until_s go together")
        for begin_s, end_s in zip(self.down_from_s, self.down_until_s, strict=True):
            if begin_s >= 0 and end_s <= begin_s:
                raise ValueError(f"a pair that dies at {begin_s} s must come back later, not at {end_s} s")

    @property
    def are_handicapped(self) -> bool:
        """Whether any pair is slowed down, held up or killed."""
        return bool(self.slowdown or self.transfer_delay_s or self.down_from_s)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """StreamScheduler.

    Attributes:
      max_waiting: requests that may wait for a lane; more are refused, or not pulled from the input yet.
      prefill_calls: prefill calls dispatched and not seen to end, a lane; a request that arrives waits for as many.
      transfer_timeout_s: seconds after which a hand-off that has not arrived is begun again.
      max_transfers: attempts at a hand-off before its request fails.
      forbid_compilation: a compilation after warm-up is an error, not a count.
    """

    max_waiting: int = 64
    prefill_calls: int = 2
    transfer_timeout_s: float = 30.0
    max_transfers: int = 3
    forbid_compilation: bool = False

    def __post_init__(self) -> None:
        for name in ("max_waiting", "prefill_calls", "max_transfers"):
            _check_range(f"scheduler.{name}", getattr(self, name), 1)
        if not self.transfer_timeout_s > 0:
            raise ValueError(f"scheduler.transfer_timeout_s must be positive, got {self.transfer_timeout_s}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration of an `LLM`.

    Attributes:
      seed: of everything random. Greedy tokens depend on nothing else; sampled ones neither, at a fixed depth or under
        the verifier "coupled"; and a depth policy decides the same when it is told the same times.
      compilation_cache_dir: folder in which compiled programs are kept for the next start; None keeps none.
    """

    model: ModelArgs = ModelArgs()
    topology: TopologyConfig = TopologyConfig()
    pipeserve: PipeServeConfig = PipeServeConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    routing: RoutingConfig = RoutingConfig()
    lanes: LanesConfig = LanesConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    seed: int = 0
    compilation_cache_dir: str | None = None

    def __post_init__(self) -> None:
        _check_range("seed", self.seed, 0)
        if self.speculation.audit and self.pipeserve.max_logprobs < 2:
            raise ValueError("speculation.audit needs the two best tokens: pipeserve.max_logprobs must be at least 2")
        for field in dataclasses.fields(LanesConfig):
            entries = getattr(self.lanes, field.name)
            if entries and len(entries) != self.topology.num_pairs:
                raise ValueError(f"lanes.{field.name} has {len(entries)} entries for {self.topology.num_pairs} pairs")
        if self.lanes.acceptance and self.speculation.method != "synthetic":
            raise ValueError("lanes.acceptance and speculation.method='synthetic' go together")


def from_mapping(cls: type, values: Mapping[str, Any], *, path: str = "") -> Any:
    """Build a config dataclass from nested mappings, checking names and types.

    Args:
      cls: `Config` or one of its parts.
      values: field name to value or nested mapping.
      path: dotted name of `cls` for messages.

    Raises:
      ValueError: an unknown field (the message lists close ones), a value of a wrong type, or one out of range.
    """
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        dotted = f"{path}{name}"
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else f"; known: {', '.join(hints)}"
            raise ValueError(f"config has no field {dotted!r}{hint}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ValueError(f"config field {dotted!r} must be a mapping, got {value!r}")
            arguments[name] = from_mapping(typing.cast(type, hints[name]), value, path=f"{dotted}.")
        else:
            arguments[name] = _coerce(dotted, value, hints[name])
    return cls(**arguments)


def _coerce(dotted: str, value: Any, hint: Any) -> Any:
    """Check a leaf value against its annotation; lists become tuples, integers floats where meant."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is types.NoneType and value is None:
            return None
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            return tuple(_coerce(dotted, item, typing.get_args(option)[0]) for item in value)
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(option, type) and isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return value
    raise ValueError(f"config field {dotted!r} must be {hint}, got {value!r}")
