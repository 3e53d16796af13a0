"""The whole configuration, and the sections that belong to no component: the model and the scheduler."""

import dataclasses

from streamserve.config.checks import check_choice, check_range
from streamserve.config.lanes import LanesConfig, TopologyConfig
from streamserve.config.pipeserve import PipeServeConfig
from streamserve.config.routing import RoutingConfig
from streamserve.config.speculation import SpeculationConfig

BUNDLED_TARGET = "bundled:target"
BUNDLED_DRAFT = "bundled:draft"
DTYPES = ("float32", "bfloat16", "float16")


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
        check_choice("model.dtype", self.dtype, DTYPES)
        check_choice("model.load_format", self.load_format, ("auto", "dummy"))
        if self.max_model_len is not None:
            check_range("model.max_model_len", self.max_model_len, 2)


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
            check_range(f"scheduler.{name}", getattr(self, name), 1)
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

    model: ModelArgs = dataclasses.field(default_factory=ModelArgs)
    topology: TopologyConfig = dataclasses.field(default_factory=TopologyConfig)
    pipeserve: PipeServeConfig = dataclasses.field(default_factory=PipeServeConfig)
    speculation: SpeculationConfig = dataclasses.field(default_factory=SpeculationConfig)
    routing: RoutingConfig = dataclasses.field(default_factory=RoutingConfig)
    lanes: LanesConfig = dataclasses.field(default_factory=LanesConfig)
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    seed: int = 0
    compilation_cache_dir: str | None = None

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0)
        if self.speculation.audit and self.pipeserve.max_logprobs < 2:
            raise ValueError("speculation.audit needs the two best tokens: pipeserve.max_logprobs must be at least 2")
        for field in dataclasses.fields(LanesConfig):
            entries = getattr(self.lanes, field.name)
            if entries and len(entries) != self.topology.num_pairs:
                raise ValueError(f"lanes.{field.name} has {len(entries)} entries for {self.topology.num_pairs} pairs")
        if self.lanes.acceptance and self.speculation.method != "synthetic":
            raise ValueError("lanes.acceptance and speculation.method='synthetic' go together")
