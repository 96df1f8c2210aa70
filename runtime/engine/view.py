"""What somebody who watches an engine is shown: where each expert is and how much it is used, what
the memory went to, how steps are shared.

Reads what others own and changes nothing. It waits for no step, so what it reads may be in the
middle of one: good for eyes, not for decisions.
"""

from __future__ import annotations

import base64
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from ..system import rss

if TYPE_CHECKING:
    from ..arena import Arena
    from .planner import Plan
    from .schedule import Schedule

ABSENT, HELD, AHEAD, LOW = range(4)  # AHEAD: read before it was asked for, and not asked for yet


def experts(arena: Arena) -> dict[str, Any]:
    """By layer, then expert: ``state``, a byte each, and ``uses``, (token, rank) pairs since the
    model was opened as little-endian 32-bit numbers; both in base64.

    While every expert has its slot, nobody counts which are used.
    """
    residency, layers = arena.residency, arena.controller.layers
    n_experts = residency.n_experts
    # Each copied whole before anything else of this thread, so that no step changes it meanwhile.
    slot_of, guessed, low = residency.slot_of.copy(), residency.guessed.copy(), _low(residency)
    uses = np.array(arena.controller.uses.copy()).astype("<u4").reshape(-1, n_experts)
    state = np.zeros(uses.size, np.uint8)
    for key, slot in slot_of.items():
        state[key] = AHEAD if key in guessed else LOW if slot in low else HELD
    return {
        "layers": layers,
        "n_experts": n_experts,
        "n_used": arena.found.n_used,
        "n_held": len(slot_of),
        "n_slots": residency.n_slots,
        "expert_bytes": arena.found.slots.slot_bytes,
        "state": _text(state.reshape(-1, n_experts)[layers]),
        "uses": _text(uses[layers]),
    }


def _low(residency: Any) -> set[int]:
    """The slots with low copies, if there may be any."""
    return set() if residency.is_plain else residency.low.copy()


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def memory(arena: Arena) -> dict[str, Any]:
    """The budget, item by item, and what the process has of the machine now."""
    budget = arena.budget
    parts = [[name, n_bytes, text] for name, n_bytes, text in budget.rows() if name != "total"]
    return {"total_bytes": budget.total, "resident_bytes": rss(), "parts": parts}


def sharing(schedule: Schedule, plan: Plan | None) -> dict[str, Any]:
    """The schedule in force, and what it was chosen for; ``goal`` None: nobody planned."""
    chosen = {
        "goal": plan.goal if plan else None,
        "binds": plan.binds if plan else None,
        "disk_bytes_per_s": plan.disk_bytes_per_s if plan else None,
    }
    curve = [[p.sequences, p.decode_tps] for p in plan.curve] if plan else []
    return {**asdict(schedule), **chosen, "curve": curve}
