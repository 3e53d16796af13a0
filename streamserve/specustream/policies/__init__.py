"""Depth policies: `(tiers, slots, *, hyper-parameters) -> Policy`, each an idea of the field with its source."""

from streamserve.specustream.policies.adaedl import adaedl
from streamserve.specustream.policies.banditspec import exp3spec, exp3spec_rate, ucbspec, ucbspec_rate
from streamserve.specustream.policies.batch_table import batch_table
from streamserve.specustream.policies.budget import budget
from streamserve.specustream.policies.confidence import confidence_stop
from streamserve.specustream.policies.dsde import dsde
from streamserve.specustream.policies.ema_tiers import ema_tiers
from streamserve.specustream.policies.fixed import fixed
from streamserve.specustream.policies.goodput import goodput
from streamserve.specustream.policies.heuristic import heuristic
from streamserve.specustream.policies.nightjar import nightjar
from streamserve.specustream.policies.oracle import oracle
from streamserve.specustream.policies.specustream import specustream
from streamserve.specustream.policies.specustream_paper import specustream_paper
from streamserve.specustream.policies.thompson import thompson

__all__ = [
    "adaedl",
    "batch_table",
    "budget",
    "confidence_stop",
    "dsde",
    "ema_tiers",
    "exp3spec",
    "exp3spec_rate",
    "fixed",
    "goodput",
    "heuristic",
    "nightjar",
    "oracle",
    "specustream",
    "specustream_paper",
    "thompson",
    "ucbspec",
    "ucbspec_rate",
]
