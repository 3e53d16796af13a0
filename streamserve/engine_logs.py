"""The files that an engine writes while it serves: a timeline, decisions about depth, and decisions about lanes.

A header says what a log is about, as far as its replay needs it.
"""

import dataclasses
import os
import time
from typing import Any

import jax
import numpy as np

from streamserve.config import Config
from streamserve.flowguard import RouteLog
from streamserve.specustream import DecisionLog
from streamserve.trace import NullTracer, Tracer, TraceWriter

Path = str | os.PathLike[str]


class EngineLogs:
    """Open files, each of them or none.

    Attributes:
      tracer: is told what happened when.
      decisions: of depth policies; None for no log.
      routes: of the routing policy, likewise.
    """

    def __init__(
        self, config: Config, *, trace: Path | None = None, decisions: Path | None = None, routes: Path | None = None
    ):
        """Open the files that are named; their times count from now."""
        self.tracer: Tracer = NullTracer() if trace is None else TraceWriter(trace, epoch_s=time.monotonic())
        self.decisions = None if decisions is None else DecisionLog(decisions, header=decisions_header(config))
        self.routes = None if routes is None else RouteLog(routes, header=routes_header(config))

    def close(self) -> None:
        """Finish the files. Nobody may log decisions any more; what the tracer is told is lost."""
        self.tracer.close()
        if self.decisions is not None:
            self.decisions.close()
            self.decisions = None
        if self.routes is not None:
            self.routes.close()
            self.routes = None


def decisions_header(config: Config) -> dict[str, Any]:
    """Say what a log of decisions about depth is about."""
    speculation = config.speculation
    return {
        "policy": speculation.policy,
        "method": speculation.method,
        "acceptance": speculation.acceptance,
        "synthetic": speculation.method == "synthetic",
        "tiers": list(speculation.depths),
        "slots": config.pipeserve.max_num_seqs,
        "seed": config.seed,
        "fixed_depth": speculation.fixed_depth if speculation.policy == "fixed" else None,
        "specustream": dataclasses.asdict(speculation.specustream),
        "verifier": speculation.verifier,
        "lanes": dataclasses.asdict(config.lanes),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }


def routes_header(config: Config) -> dict[str, Any]:
    """Say what a log of routes is about."""
    return {
        "policy": config.routing.policy,
        "num_lanes": config.topology.num_pairs,
        "seed": config.seed,
        "flowguard": dataclasses.asdict(config.routing.flowguard),
        "lanes": dataclasses.asdict(config.lanes),
        "synthetic": config.speculation.method == "synthetic",
        "numpy": np.__version__,
    }
