"""How to guess a later layer's experts with that layer's own router.

After Fate (arXiv 2502.12224): the next layer's router, applied to what this layer's router saw,
names most of the next layer's experts. The work is done in native/gates.cpp.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Variant = Literal["raw", "renorm", "residual"]


class Gates(NamedTuple):
    """Which guesses to make, in place of a ``Predictor``.

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
