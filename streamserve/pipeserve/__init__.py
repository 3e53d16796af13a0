"""PipeServe: disaggregated prefill and decode over stream pairs."""

from streamserve.pipeserve.pair import StreamPair
from streamserve.pipeserve.programs import CompilationCounter, CompilationError, PairModels, Programs
from streamserve.pipeserve.sizes import LaneSizes, lane_sizes
from streamserve.pipeserve.warmup import persistent_cache, warm_up

__all__ = [
    "CompilationCounter",
    "CompilationError",
    "LaneSizes",
    "PairModels",
    "Programs",
    "StreamPair",
    "lane_sizes",
    "persistent_cache",
    "warm_up",
]
