"""Policies: what to keep, what to guess, in which order to load; and a simulator for them.

Plain Python on integers and numpy arrays. Nothing here knows llama.cpp or weights, and nothing
reads a clock: where time matters, it is an argument.
"""

from .base import Phase
from .precision import MixedResidency, Precision
from .presets import POLICIES, Facts, Policy, PolicyMaker, policy
from .residency import Plan, Residency

__all__ = [
    "POLICIES",
    "Facts",
    "MixedResidency",
    "Phase",
    "Plan",
    "Policy",
    "PolicyMaker",
    "Precision",
    "Residency",
    "policy",
]
