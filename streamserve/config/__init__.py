"""Configuration: frozen, validated dataclasses, one per component. Each part receives only its own.

Every field has a sentence and a unit. Nothing here imports JAX, so that a config can be built before devices exist.
"""

from streamserve.config.engine import BUNDLED_DRAFT, BUNDLED_TARGET, Config, ModelArgs, SchedulerConfig
from streamserve.config.lanes import LanesConfig, TopologyConfig
from streamserve.config.mapping import from_mapping
from streamserve.config.pipeserve import PipeServeConfig
from streamserve.config.routing import FlowGuardConfig, RoutingConfig
from streamserve.config.speculation import SpeculationConfig, SpecuStreamConfig

__all__ = [
    "BUNDLED_DRAFT",
    "BUNDLED_TARGET",
    "Config",
    "FlowGuardConfig",
    "LanesConfig",
    "ModelArgs",
    "PipeServeConfig",
    "RoutingConfig",
    "SchedulerConfig",
    "SpecuStreamConfig",
    "SpeculationConfig",
    "TopologyConfig",
    "from_mapping",
]
