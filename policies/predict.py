"""How to guess a later layer's experts with that layer's own router.

After Fate (arXiv 2502.12224): the next layer's router, applied to what this layer's router saw,
names most of the next layer's experts. Only the description of such guesses is here: whoever has
routers, or a recording of what they said, makes a ``Predictor`` of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from .base import Predictor

Variant = Literal["raw", "renorm", "residual"]


class Gates(NamedTuple):
    """Which guesses to ask of the model's own routers.

    ``variant`` is what is fed to a later layer's router:

    - ``raw``: this layer's gate input as it is (the paper).
    - ``renorm``: with this layer's norm weight taken out and the later layer's put in.
    - ``residual``: plus the mean of how the gate input changed between the two layers so far.

    ``ahead`` is for how many layers ahead. ``widen`` times the experts one token uses are ranked
    per token and layer: twice covers most of what can be guessed with profit.

    A guess's confidence is calibrated: by the router's own confidence and the rank of the guess,
    how often such guesses came true lately. Several tokens vote: an expert's votes are the number
    of tokens expected to choose it, its confidence is 1 - prod(1 - p) over them.
    """

    variant: Variant = "residual"
    ahead: int = 1
    widen: int = 2


# Makes the predictor so described; None where there is nothing to make it of.
GatesMaker = Callable[[Gates], Predictor | None]
