"""What one process of a bench runs, as a value that travels on a command line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from ..options import Options

if TYPE_CHECKING:
    from ...policies.presets import PolicyMaker

# How several sequences are computed. "": each in every step; turns: one for some tokens, then the
# next; plan: as the planner chooses for so many requests; same: all of one prompt, which bounds
# what sharing experts can give; score: as planned too, no answers, but the probability of each
# token of the prompts.
Way = Literal["", "turns", "plan", "same", "score"]
WAYS: tuple[Way, ...] = ("", "turns", "plan", "same", "score")
PLANNED: tuple[Way, ...] = ("plan", "score")


@dataclass(frozen=True)
class Spec:
    """What to run; the options but memory and policy, and all counts, are the same for all rows."""

    model: str
    n_predict: int
    prompt_tokens: int
    n_ctx: int
    n_threads: int | None
    options: Options  # ours only; memory in bytes
    stock: bool = False  # llama.cpp alone
    mmap: bool = False  # stock only
    repack: bool = False  # stock only
    fill: bool = False  # touch every weight before anything is timed
    timeline: str | None = None  # ours only: write one of a token after the counted ones
    sequences: int = 0  # through an Engine, see ``group``; 0: one stream, a step at a time
    way: Way = ""  # of several sequences
    server: str | None = None  # stock only: the file of llama-cpp-python's example server
    whole: bool = False  # ours only: demand that goes round does not stream
    open_only: bool = False  # stop once the model is open: does it fit?
    probe_only: bool = False  # measure the disk, not the model

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        values = json.loads(text)
        return cls(**{**values, "options": Options(**values["options"])})

    @property
    def make_policy(self) -> PolicyMaker | None:
        """The policy, where the options' name does not say all of it."""
        if not self.whole:
            return None
        from ...policies.presets import policy

        return lambda facts: policy(self.options.policy, facts)._replace(scan=None)
