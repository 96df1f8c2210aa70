"""Policies: what to keep, what to guess, in which order to load; and a simulator for them.

Plain Python on integers and numpy arrays. Nothing here knows llama.cpp, weights or time.
"""

from .precision import MixedResidency, Precision
from .presets import POLICIES, Facts, Policy, policy
from .residency import Plan, Residency

__all__ = [
    "POLICIES",
    "Facts",
    "MixedResidency",
    "Plan",
    "Policy",
    "Precision",
    "Residency",
    "policy",
]
