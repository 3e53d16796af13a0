"""Policies that choose among arms, and how they run on the host."""

from streamserve.bandits.base import Decision, Policy
from streamserve.bandits.host import HostPolicy

__all__ = ["Decision", "HostPolicy", "Policy"]
