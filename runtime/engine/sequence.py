"""What the scheduler knows of one request: its tokens, and how far the memory holds them.

Owns those two and the request's place among the others. Does not know sampling, text, or who waits
for the tokens; whoever computes hangs that on it.
"""

from __future__ import annotations

from typing import Any

from .request import Logprob, Request


class Sequence:
    """A request being computed, numbered in the order of arrival.

    ``tokens`` are the prompt and what was generated; the first ``computed`` of them are in the
    memory, under the number ``slot`` (-1: in none). ``part`` is whatever the one who computes needs
    beside it.
    """

    def __init__(self, number: int, request: Request, part: Any = None) -> None:
        self.number = number
        self.request = request
        self.priority = request.priority
        self.tokens = list(request.tokens)
        self.n_prompt = len(self.tokens)
        self.part = part
        self.slot = -1
        self.computed = 0
        self.scored: list[Logprob] = []  # of the prompt's tokens after the first
        self.turn = 0  # its place in the round of turns
        self.served = 0  # tokens it got since its turn began
        self.preempted = False
        self.cached = 0  # tokens of the prompt that were computed for others
        self.stops: set[int] = set()  # where a piece of the prompt ends, for others to go on from
        self.alike: dict[Sequence, int] = {}  # how many tokens it may begin with as others do

    @property
    def n_left(self) -> int:
        """Tokens that are known and not computed."""
        return len(self.tokens) - self.computed

    @property
    def decodes(self) -> bool:
        """Nothing is left but the token that was generated last."""
        return self.computed == len(self.tokens) - 1 >= self.n_prompt

    @property
    def is_scoring(self) -> bool:
        """Its prompt's tokens want their probabilities, and have not all got them."""
        return self.request.prompt_logprobs is not None and len(self.scored) < self.n_prompt - 1

    @property
    def first_output(self) -> int:
        """The first position whose logits are wanted; those of all later ones are too."""
        return len(self.scored) if self.is_scoring else len(self.tokens) - 1

    def n_within(self, rows: int, outputs: int) -> int:
        """How many of its next tokens a step of so many rows and outputs can take."""
        n = max(0, min(self.n_left, rows, self.first_output + outputs - self.computed))
        return min([n, *(stop - self.computed for stop in self.stops if stop > self.computed)])

    def n_outputs(self, n: int) -> int:
        """Outputs of its next ``n`` tokens."""
        return max(0, self.computed + n - max(self.first_output, self.computed))
