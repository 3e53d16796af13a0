"""Policies that choose among arms, and how they run on the host."""

from streamserve.bandits.base import Decision, Policy
from streamserve.bandits.exp3 import exp3
from streamserve.bandits.host import HostPolicy
from streamserve.bandits.replay import Decided, replay
from streamserve.bandits.thompson import gaussian_thompson
from streamserve.bandits.ucb import ucb

__all__ = ["Decided", "Decision", "HostPolicy", "Policy", "exp3", "gaussian_thompson", "replay", "ucb"]
