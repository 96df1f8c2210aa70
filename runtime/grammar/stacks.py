"""Where a grammar stands: the stacks llama.cpp keeps of it, and how much work they would make.

llama.cpp's matching of a token takes exponential time on small grammars. Its stacks are followed
here, and before a step the work is counted that given texts would make. Knows no vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import RequestError
from .gbnf import ANY, MAX_ELEMENTS, Element, bad, read

MAX_STACKS = 5000  # places in the grammar that are possible at once
MAX_PATHS = 20_000  # ways to match one token's text
MAX_TURNS = 300  # of a rule that begins with itself behind something empty
TRIED_LENGTH = 40  # of a text: what multiplies has multiplied by then
TAME_LENGTH, LONG = 8, 33  # where nothing has multiplied, only long texts are tried further
MAX_STEPS = 200_000  # rules looked into before one token

Stack = tuple[int, ...]  # numbers of elements: what is to come, the next one last


class _TooMuch(Exception):
    pass


def _ambiguous() -> RequestError:
    return bad("there are too many ways to go on by it; make it less ambiguous")


class Machine:
    """A grammar as llama.cpp runs it: stacks of what may come, and how much work they make."""

    def __init__(self, text: str, root: str = "root") -> None:
        rules = read(text, root)
        # Such a circle need not end for llama.cpp either: stacks grow with each turn.
        self._max_growth = MAX_TURNS if rules.has_circle else MAX_ELEMENTS
        self._elements: list[Element | None] = []  # None behind each sequence
        self._starts: dict[int, list[int]] = {}
        for rule, alternatives in rules.alternatives.items():
            self._starts[rule] = [self._place(sequence) for sequence in alternatives]
        self._next: dict[Stack, list[Stack]] = {}
        self._steps = 0
        self._checked: set[frozenset[Stack]] = set()
        self.stacks: set[Stack] = set()
        try:
            for start in self._starts[rules.root]:
                self.stacks.update(self._advance((start,) if self._elements[start] else ()))
        except _TooMuch:
            raise bad("there are too many ways to begin") from None

    def _place(self, sequence: list[Element]) -> int:
        start = len(self._elements)
        self._elements += [*sequence, None]
        return start

    def _advance(self, stack: Stack) -> list[Stack]:
        """What may come after ``stack``, each ending at a character, a token, or nothing."""
        if (known := self._next.get(stack)) is not None:
            return known
        out: list[Stack] = []
        todo, seen = [stack], set()
        while todo:
            current = todo.pop()
            if current in seen:
                continue
            seen.add(current)
            self._steps += 1
            if self._steps > MAX_STEPS or len(current) - len(stack) > self._max_growth:
                raise _TooMuch
            element = self._elements[current[-1]] if current else None
            if element is None or element.rule < 0:
                out.append(current)
                continue
            base = self._without_top(current)
            for start in self._starts[element.rule]:
                todo.append((*base, start) if self._elements[start] else base)
        if len(self._next) > 50_000:
            self._next.clear()
        self._next[stack] = out
        return out

    def _without_top(self, stack: Stack) -> Stack:
        after = stack[-1] + 1
        return (*stack[:-1], after) if self._elements[after] else stack[:-1]

    def _match(self, stacks: dict[Stack, int], code: int) -> dict[Stack, int]:
        """After one character: the stacks, each with the number of ways to it."""
        out: dict[Stack, int] = {}
        for stack, ways in stacks.items():
            element = self._elements[stack[-1]] if stack else None
            if element is not None and element.takes(code):
                for after in self._advance(self._without_top(stack)):
                    out[after] = out.get(after, 0) + ways
        if len(out) > MAX_STACKS or sum(out.values()) > MAX_PATHS:
            raise _TooMuch
        return out

    def _first(self, stacks: Iterable[Stack]) -> Element:
        """What takes every character that one of the stacks may go on with."""
        tops = {self._elements[stack[-1]] for stack in stacks if stack}
        ranges = {r for top in tops if top and not top.negated for r in top.ranges}
        return ANY if any(top and top.negated for top in tops) else Element(ranges=tuple(ranges))

    def check(self, texts: Sequence[str]) -> None:
        """RequestError if matching one of these texts, always the same, from here would take too
        much work."""
        key = frozenset(self.stacks)
        if key in self._checked:
            return
        self._steps = 0
        try:
            if len(self.stacks) > MAX_STACKS:
                raise _TooMuch
            begins = self._first(self.stacks)
            for text in texts:
                if begins.takes(ord(text[0])):
                    self._try(text)
        except _TooMuch:
            raise _ambiguous() from None
        if len(self._checked) > 10_000:
            self._checked.clear()
        self._checked.add(key)

    def check_one(self, text: str) -> None:
        """The same of a single text."""
        if frozenset(self.stacks) in self._checked:
            return
        self._steps = 0
        try:
            self._try(text)
        except _TooMuch:
            raise _ambiguous() from None

    def _try(self, text: str) -> None:
        stacks = dict.fromkeys(self.stacks, 1)
        for i, character in enumerate(text[:TRIED_LENGTH]):
            if not (stacks := self._match(stacks, ord(character))):
                return
            is_tame = sum(stacks.values()) <= 2 * len(self.stacks)
            if i == TAME_LENGTH and is_tame and len(text) < LONG:
                return

    def accept(self, text: str) -> None:
        """Go on behind a token of this text; an empty set of stacks where it does not match.

        Where the grammar asks for a token by its number, this one is taken for it.
        """
        self._steps = 0
        try:
            behind = [
                after
                for stack in self.stacks
                if stack and (element := self._elements[stack[-1]]) and element.is_token
                for after in self._advance(self._without_top(stack))
            ]
            for character in text:
                self.stacks = set(self._match(dict.fromkeys(self.stacks, 1), ord(character)))
            self.stacks.update(behind)
        except _TooMuch:
            raise _ambiguous() from None
