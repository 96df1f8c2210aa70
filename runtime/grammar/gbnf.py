"""GBNF grammars read as llama.cpp reads them, but without its recursion.

llama.cpp's parser recurses as deep as a grammar nests, and its search for left recursion takes
exponential time on small grammars. So a grammar is read here first, and refused where that would
not end well. Owns the rules a text becomes; stacks.py follows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..errors import RequestError
from ..text import shown

MAX_BYTES = 256 << 10
MAX_NESTING = 2000  # llama.cpp's parser takes half a kilobyte of the thread's stack for each
MAX_REPEATS = 2000  # llama.cpp's own limit
MAX_ELEMENTS = 300_000
MAX_CHAIN = 5000  # rules that begin with each other; its search recurses
MAX_CALLS = 1_000_000  # of that search, which visits a rule once for every way to it

_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
_DIGITS = frozenset("0123456789")
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_HEX = {"x": 2, "u": 4, "U": 8}


class Element(NamedTuple):
    """One element of a sequence: a reference to a rule, or what one character (token) must be."""

    rule: int = -1  # >= 0: a reference
    ranges: tuple[tuple[int, int], ...] = ()  # of code points
    negated: bool = False
    is_token: bool = False

    def takes(self, code: int) -> bool:
        if self.is_token:
            return False
        return any(low <= code <= high for low, high in self.ranges) != self.negated


ANY = Element(ranges=((0, 0xFFFFFFFF),))
Sequence = list[Element]
Alternatives = dict[int, list[Sequence]]  # the alternatives of each


def bad(why: str) -> RequestError:
    return RequestError(f"the grammar cannot be used: {why}")


# --- reading ------------------------------------------------------------------------------------


class _Frame:
    """A rule while it is read: at the top or, as a rule of its own, a group in parentheses."""

    def __init__(self, rule: int, n_rules: int = 0) -> None:
        self.rule = rule
        self.n_rules = n_rules  # when it began
        self.done: list[Sequence] = []
        self.sequence: Sequence = []
        self.start = 0  # of the last symbol in the sequence
        self.n_previous = 1  # rules that symbol consists of

    def symbol(self, *elements: Element, n_rules: int = 1) -> None:
        self.start, self.n_previous = len(self.sequence), n_rules
        self.sequence += elements


class _Reader:
    """llama.cpp's own parser, without its recursion."""

    def __init__(self, text: str) -> None:
        self.text = text + "\0"  # a terminator to look at
        self.at = 0
        self.ids: dict[str, int] = {}
        self.rules: Alternatives = {}
        self.n_ids = 0
        self.n_elements = 0

    def read(self) -> None:
        self._space(True)
        while self.text[self.at] != "\0":
            self._rule()
        for alternatives in self.rules.values():
            for element in (e for sequence in alternatives for e in sequence):
                if element.rule >= 0 and element.rule not in self.rules:
                    name = next(name for name, i in self.ids.items() if i == element.rule)
                    raise bad(f"it has no rule {shown(name)}")

    def _id(self, name: str | None) -> int:
        """Of a named rule, or of a new one without a name."""
        if name is not None and name in self.ids:
            return self.ids[name]
        if name is not None:
            self.ids[name] = self.n_ids
        self.n_ids += 1
        return self.n_ids - 1

    def _space(self, newline_ok: bool) -> None:
        text = self.text
        while (c := text[self.at]) in " \t#" or (newline_ok and c in "\r\n"):
            if c == "#":
                while text[self.at] not in "\r\n\0":
                    self.at += 1
            else:
                self.at += 1

    def _word(self, letters: frozenset[str], what: str) -> str:
        start = self.at
        while self.text[self.at] in letters:
            self.at += 1
        if self.at == start:
            raise self._expected(what)
        return self.text[start : self.at]

    def _expected(self, what: str) -> RequestError:
        rest = self.text[self.at : self.at + 20].rstrip("\0")
        return bad(f"{what} is expected at {shown(rest)!r}" if rest else f"it ends before {what}")

    def _literal(self, mark: str) -> None:
        if self.text[self.at] != mark:
            raise self._expected(repr(mark))
        self.at += 1

    def _rule(self) -> None:
        frame = _Frame(self._id(self._word(_NAME, "a name")))
        self._space(False)
        for mark in "::=":
            self._literal(mark)
        self._space(True)
        self._alternatives(frame)
        if self.text[self.at] not in "\r\n\0":
            raise self._expected("the end of a line")
        self._space(True)

    def _alternatives(self, frame: _Frame) -> None:
        """Everything up to the rule's end."""
        frames = [frame]
        while True:
            frame = frames[-1]
            c = self.text[self.at]
            nested = len(frames) > 1
            if c == "(":
                if len(frames) > MAX_NESTING:
                    raise bad(f"its groups are nested more than {MAX_NESTING} deep")
                self.at += 1
                self._space(True)
                frames.append(_Frame(self._id(None), self.n_ids - 1))
            elif c == "|":
                self.at += 1
                self._space(True)
                frame.done.append(frame.sequence)
                frame.sequence = []
                frame.symbol()
            elif c == ")" and nested:
                self.at += 1
                frames.pop()
                self._end(frame)
                n_rules = max(1, self.n_ids - frame.n_rules)
                frames[-1].symbol(Element(frame.rule), n_rules=n_rules)
                self._space(len(frames) > 1)
            elif not self._symbol(frame, c):
                if nested:
                    raise self._expected("')'")
                self._end(frame)
                return
            else:
                self._space(nested)

    def _end(self, frame: _Frame) -> None:
        alternatives = [*frame.done, frame.sequence]
        self._count(sum(map(len, alternatives)) + len(alternatives))
        self.rules[frame.rule] = alternatives

    def _count(self, n: int) -> None:
        self.n_elements += n
        if self.n_elements > MAX_ELEMENTS:
            raise bad(f"its repetitions make more than {MAX_ELEMENTS} elements of it")

    def _symbol(self, frame: _Frame, c: str) -> bool:
        """One symbol, or a sign of repetition behind one; False at neither."""
        if c in _NAME:
            frame.symbol(Element(self._id(self._word(_NAME, "a name"))))
        elif c == '"':
            self.at += 1
            codes = []
            while self.text[self.at] != '"':
                codes.append(self._character())
            self.at += 1
            frame.symbol(*(Element(ranges=((code, code),)) for code in codes))
        elif c == "[":
            frame.symbol(*self._class())
        elif c in "<!":
            frame.symbol(self._token())
        elif c == ".":
            self.at += 1
            frame.symbol(ANY)
        elif c in "*+?":
            self.at += 1
            self._repeat(frame, int(c == "+"), 1 if c == "?" else None)
        elif c == "{":
            self._repeat(frame, *self._bounds())
        else:
            return False
        return True

    def _character(self) -> int:
        c = self.text[self.at]
        if c == "\0":
            raise self._expected("the end of a text or class")
        self.at += 1
        if c != "\\":
            return ord(c)
        kind = self.text[self.at]
        self.at += 1
        if kind in _ESCAPES:
            return ord(_ESCAPES[kind])
        digits = self.text[self.at : self.at + _HEX.get(kind, 0)]
        if (
            kind not in _HEX
            or len(digits) != _HEX[kind]
            or not set(digits.lower()) <= set("0123456789abcdef")
        ):
            raise bad(f"\\{shown(kind)} is no escape")
        self.at += len(digits)
        return int(digits, 16)

    def _class(self) -> Iterator[Element]:
        self.at += 1
        negated = self.text[self.at] == "^"
        self.at += negated
        ranges = []
        while self.text[self.at] != "]":
            low = high = self._character()
            if self.text[self.at] == "-" and self.text[self.at + 1] != "]":
                self.at += 1
                high = self._character()
            ranges.append((low, high))
        self.at += 1
        if ranges:  # llama.cpp makes nothing of an empty one
            yield Element(ranges=tuple(ranges), negated=negated)

    def _token(self) -> Element:
        """Which token it is does not matter here."""
        negated = self.text[self.at] == "!"
        self.at += negated
        self._literal("<")
        end = self.text.find(">", self.at)
        if end < 0:
            raise self._expected("'>'")
        self.at = end + 1
        return Element(negated=negated, is_token=True)

    def _bounds(self) -> tuple[int, int | None]:
        self.at += 1
        self._space(True)
        least = most = self._number()
        self._space(True)
        if self.text[self.at] == ",":
            self.at += 1
            self._space(True)
            most = self._number() if self.text[self.at] in _DIGITS else -1
            self._space(True)
        self._literal("}")
        if least > MAX_REPEATS:
            raise bad(f"{least} repetitions are more than {MAX_REPEATS}")
        if 0 <= most < least:
            raise bad(f"between {least} and {most} repetitions there are none")
        return least, None if most < 0 or most > MAX_REPEATS else most

    def _number(self) -> int:
        digits = self._word(_DIGITS, "a number")
        return int(digits) if len(digits) < 10 else 10**9

    def _repeat(self, frame: _Frame, least: int, most: int | None) -> None:
        """Rewrite the last symbol as llama.cpp does: copies, then a rule for each that may be left
        out."""
        symbol = frame.sequence[frame.start :]
        if not symbol:
            raise bad("there is nothing before a sign of repetition")
        total = most or least or 1
        if frame.n_previous * total > MAX_REPEATS:
            raise bad(f"its repetitions, multiplied, are more than {MAX_REPEATS}")
        n_optional = 1 if most is None else most - least
        self._count(len(symbol) * (least + n_optional))
        frame.sequence[frame.start :] = symbol * least
        last = -1
        for i in range(n_optional):
            rule = self._id(None)
            rest = [Element(rule if most is None else last)] if i or most is None else []
            self.rules[rule] = [[*symbol, *rest], []]
            last = rule
        if n_optional:
            frame.sequence.append(Element(last))
        frame.n_previous *= total


def _first(rules: Alternatives, may_be_empty: set[int]) -> dict[int, list[int]]:
    """By rule: the rules it may begin with, once for every way."""
    first: dict[int, list[int]] = {}
    for rule, alternatives in rules.items():
        first[rule] = []
        for sequence in alternatives:
            for element in sequence:
                if element.rule < 0:
                    break
                first[rule].append(element.rule)
                if element.rule not in may_be_empty:
                    break
    return first


def _order(first: dict[int, list[int]]) -> list[int] | None:
    """Every rule behind all it may begin with; None if one may begin with itself."""
    done: dict[int, None] = {}
    for start in first:
        path, inside = [(start, iter(first[start]))], {start}
        while path:
            rule, rest = path[-1]
            found = next((r for r in rest if r not in done), None)
            if found is None:
                path.pop()
                inside.discard(rule)
                done[rule] = None
            elif found in inside:
                return None
            else:
                path.append((found, iter(first[found])))
                inside.add(found)
    return list(done)


def _check_search(rules: Alternatives) -> None:
    """llama.cpp's search for rules that begin with themselves: that it finds none, and soon.

    It takes for empty only what has an empty alternative.
    """
    first = _first(rules, {rule for rule, given in rules.items() if [] in given})
    order = _order(first)
    if order is None:
        raise bad("a rule begins with itself")
    calls: dict[int, int] = {}
    depth: dict[int, int] = {}
    for rule in order:
        calls[rule] = 1 + sum(calls[r] for r in first[rule])
        depth[rule] = 1 + max((depth[r] for r in first[rule]), default=0)
        if calls[rule] > MAX_CALLS or depth[rule] > MAX_CHAIN:
            raise bad("its rules begin with each other in too many ways")


def _has_circle(rules: Alternatives) -> bool:
    """Whether a rule may begin with itself after all, behind what is empty by other rules."""
    alternatives = [(rule, sequence) for rule, given in rules.items() for sequence in given]
    left = [len(sequence) for _, sequence in alternatives]  # elements not known to be empty
    mentions: dict[int, list[int]] = {}
    for i, (_, sequence) in enumerate(alternatives):
        for element in sequence:
            mentions.setdefault(element.rule, []).append(i)
    empty: set[int] = set()
    todo = [rule for rule, sequence in alternatives if not sequence]
    while todo:
        rule = todo.pop()
        if rule in empty:
            continue
        empty.add(rule)
        for i in mentions.get(rule, ()):
            left[i] -= 1
            if left[i] == 0:
                todo.append(alternatives[i][0])
    return _order(_first(rules, empty)) is None


class Rules(NamedTuple):
    """A grammar that was read: the alternatives of each rule, and which one is the root."""

    alternatives: Alternatives
    root: int
    has_circle: bool  # a rule begins with itself behind something empty


def read(text: str, root: str) -> Rules:
    """RequestError for a grammar that llama.cpp cannot read, or not in reasonable time."""
    try:
        n_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise bad("it is no text: half of a surrogate pair is missing") from None
    if n_bytes > MAX_BYTES:
        raise bad(f"it is longer than {MAX_BYTES} bytes")
    if "\0" in text:
        raise bad("it contains a NUL")
    reader = _Reader(text)
    reader.read()
    if root not in reader.ids or reader.ids[root] not in reader.rules:
        raise bad(f"it has no rule {shown(root)}")
    _check_search(reader.rules)
    return Rules(reader.rules, reader.ids[root], _has_circle(reader.rules))
