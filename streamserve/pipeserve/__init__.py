"""PipeServe: disaggregated prefill and decode over stream pairs."""

from streamserve.pipeserve.pair import StreamPair
from streamserve.pipeserve.programs import CompilationCounter, PairModels
from streamserve.pipeserve.warmup import warm_up

__all__ = ["CompilationCounter", "PairModels", "StreamPair", "warm_up"]
