"""SpecuStream: speculative decoding, lossless and in one jitted program a depth, and who decides how deep."""

from streamserve.specustream.controller import DraftWay, LaneLoad, SpecuStream, Ticket
from streamserve.specustream.costs import CostTable, nominal
from streamserve.specustream.decision_log import DecisionLog
from streamserve.specustream.depth import DepthContext, MakeDepthPolicy, Plan, StepStats, StopRule, whole

__all__ = [
    "CostTable",
    "DecisionLog",
    "DepthContext",
    "DraftWay",
    "LaneLoad",
    "MakeDepthPolicy",
    "Plan",
    "SpecuStream",
    "StepStats",
    "StopRule",
    "Ticket",
    "nominal",
    "whole",
]
