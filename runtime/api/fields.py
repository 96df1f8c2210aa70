"""The fields of a client's JSON object, each checked as it is read.

``null`` is an absent field, and fields that nobody reads are ignored; a bad value of one that is
read is a Refusal with its name. Knows no field by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..text import shown
from .refusal import Refusal


def wrong(param: str, wanted: str, value: object = None) -> Refusal:
    given = "" if value is None else f", not {shown(repr(value), 60)}"
    return Refusal(f"{param} must be {wanted}{given}", param)


class Fields:
    """The fields of ``body``; ``path`` is where it stands inside another."""

    def __init__(self, body: object, path: str = "") -> None:
        if not isinstance(body, Mapping):
            raise wrong(path or "body", "an object", body)
        self._body = body
        self._path = path

    def path(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def value(self, name: str) -> Any:
        return self._body.get(name)

    def inner(self, name: str) -> Fields | None:
        """The object in a field."""
        value = self.value(name)
        return None if value is None else Fields(value, self.path(name))

    def wrong(self, name: str, wanted: str) -> Refusal:
        return wrong(self.path(name), wanted, self.value(name))

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def optional_flag(self, name: str) -> bool | None:
        """None where it is left open."""
        return None if self.value(name) is None else self.flag(name)

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.number(name, low, high, f"a whole number from {low} to {high}")
        if value is None:
            return None
        if value != int(value):
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return int(value)

    def number(
        self, name: str, low: float, high: float, wanted: str | None = None
    ) -> int | float | None:
        value: int | float | None = self.value(name)
        if value is None:
            return None
        if not is_number(value) or not low <= value <= high:
            raise self.wrong(name, wanted or f"a number from {low:g} to {high:g}")
        return value

    def text(self, name: str) -> str | None:
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "text")
        return value

    def texts(self, name: str, most: int) -> Sequence[str]:
        """One text, or a list of at most so many, none of them empty."""
        value = self.value(name)
        if value is None:
            return ()
        texts = [value] if isinstance(value, str) else value
        if (
            not isinstance(texts, list)
            or len(texts) > most
            or not all(isinstance(text, str) and text for text in texts)
        ):
            raise self.wrong(name, f"text or a list of at most {most}, none of them empty")
        return texts


def is_number(value: object) -> bool:
    """Not true, false, or what JSON cannot say."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)
