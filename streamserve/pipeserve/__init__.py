"""PipeServe: disaggregated prefill and decode over stream pairs."""

from streamserve.pipeserve.compilation_counter import CompilationCounter, CompilationError
from streamserve.pipeserve.handicap import Handicap, HandicappedPair
from streamserve.pipeserve.measure import context_lengths, measure_costs
from streamserve.pipeserve.pair import StreamPair
from streamserve.pipeserve.programs import Programs
from streamserve.pipeserve.shapes import PairModels
from streamserve.pipeserve.sizes import LaneSizes, lane_sizes
from streamserve.pipeserve.warmup import persistent_cache, warm_up

__all__ = [
    "CompilationCounter",
    "CompilationError",
    "Handicap",
    "HandicappedPair",
    "LaneSizes",
    "PairModels",
    "Programs",
    "StreamPair",
    "context_lengths",
    "lane_sizes",
    "measure_costs",
    "persistent_cache",
    "warm_up",
]
