"""StreamServe: LLM serving with disaggregated prefill and decode and adaptive speculation, in JAX."""

from streamserve.config import (
    Config,
    PipeServeConfig,
    RoutingConfig,
    SchedulerConfig,
    SpeculationConfig,
    TopologyConfig,
)
from streamserve.llm import LLM
from streamserve.sampling_params import SamplingParams
from streamserve.types import CompletionOutput, Logprob, Prompt, RequestMetrics, RequestOutput

__all__ = [
    "LLM",
    "CompletionOutput",
    "Config",
    "Logprob",
    "PipeServeConfig",
    "Prompt",
    "RequestMetrics",
    "RequestOutput",
    "RoutingConfig",
    "SamplingParams",
    "SchedulerConfig",
    "SpeculationConfig",
    "TopologyConfig",
]
