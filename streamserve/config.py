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
      num_pairs: stream pairs (lanes).
      prefill_devices: devices of each prefill mesh, its degree of tensor parallelism.
      decode_devices: the same of each decode mesh.
      share_devices: let meshes share devices when there are too few.
    """

    num_pairs: int = 1
    prefill_devices: int = 1
    decode_devices: int = 1
    share_devices: bool = False

    def __post_init__(self) -> None:
        for name in ("num_pairs", "prefill_devices", "decode_devices"):
            _check_range(f"topology.{name}", getattr(self, name), 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PipeServeConfig:
    """Sizes of the prefill and decode programs of every stream pair.

    Attributes:
      max_num_seqs: decode slots a pair.
      prefill_buckets: prompt lengths in tokens that programs are compiled for, ascending; those beyond the model's
        length are dropped, and the model's length is added where the largest falls short of it.
      rounds_per_tick: draft-verify rounds that one dispatch runs on the device.
      max_logprobs: most `logprobs` and `prompt_logprobs` a request may ask for.
      max_stop_ids: most token ids that may end a request, end-of-sequence ids included.
      max_logit_bias: most tokens that a request's `logit_bias` may name.
    """

    max_num_seqs: int = 8
    prefill_buckets: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    rounds_per_tick: int = 4
    max_logprobs: int = 20
    max_stop_ids: int = 8
    max_logit_bias: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefill_buckets", tuple(self.prefill_buckets))
        for name in ("max_num_seqs", "rounds_per_tick", "max_stop_ids", "max_logit_bias"):
            _check_range(f"pipeserve.{name}", getattr(self, name), 1)
        _check_range("pipeserve.max_logprobs", self.max_logprobs, 0)
        buckets = self.prefill_buckets
        if not buckets or buckets[0] < 1 or any(a >= b for a, b in itertools.pairwise(buckets)):
            raise ValueError(f"pipeserve.prefill_buckets must ascend from at least 1, got {buckets}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """SpecuStream: who drafts, how deep, who verifies.

    Attributes:
      method: "draft_model", or "none" for plain decoding.
      model: folder of the draft model, or `bundled:draft`.
      num_speculative_tokens: draft depth K, 0 to 8 tokens a round.
    """

    method: str = "none"
    model: str | None = None
    num_speculative_tokens: int = 4

    def __post_init__(self) -> None:
        _check_choice("speculation.method", self.method, ("draft_model", "none"))
        if self.method == "draft_model" and self.model is None:
            raise ValueError("speculation.method='draft_model' needs speculation.model, a folder or 'bundled:draft'")
        _check_range("speculation.num_speculative_tokens", self.num_speculative_tokens, 0, MAX_DEPTH)

    @property
    def depth(self) -> int:
        """Draft depth that is really used: 0 without a drafter."""
        return 0 if self.method == "none" else self.num_speculative_tokens


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """FlowGuard.

    Attributes:
      policy: routing policy.
    """

    policy: str = "round_robin"

    def __post_init__(self) -> None:
        _check_choice("routing.policy", self.policy, ("round_robin",))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """StreamScheduler.

    Attributes:
      policy: order of admission; "fcfs" is first come, first served.
      max_waiting: requests taken from the input ahead of admission.
      max_prefills: prefills dispatched and not yet in a decode slot, a lane; back-pressure on the prefill mesh.
    """

    policy: str = "fcfs"
    max_waiting: int = 64
    max_prefills: int = 2

    def __post_init__(self) -> None:
        _check_choice("scheduler.policy", self.policy, ("fcfs",))
        _check_range("scheduler.max_waiting", self.max_waiting, 1)
        _check_range("scheduler.max_prefills", self.max_prefills, 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration of an `LLM`.

    Attributes:
      seed: of everything random; the same seed and config give the same tokens, decisions and log.
    """

    model: ModelArgs = ModelArgs()
    topology: TopologyConfig = TopologyConfig()
    pipeserve: PipeServeConfig = PipeServeConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    routing: RoutingConfig = RoutingConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        _check_range("seed", self.seed, 0)


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
