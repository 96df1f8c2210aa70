"""Policies: what to keep, what to guess, in which order to load; and a simulator for them.

Plain Python on integers and numpy arrays. Nothing here knows llama.cpp, weights or time.
"""

from moe_gguf.policies.precision import MixedResidency, Precision
from moe_gguf.policies.presets import POLICIES, Facts, Policy, policy
from moe_gguf.policies.residency import Plan, Residency

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
