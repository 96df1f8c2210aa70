"""Typed answers from a file's metadata, and the one sentence that is said of an impossible key.

This file owns what "a whole number in this range" or "a list of texts" means and how a user is told
that a key is neither. It does not know which keys there are, nor how any file stores them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from .gguf_header import Value

MOST = (1 << 64) - 1  # the greatest number a GGUF can hold


class Keys:
    """A file's metadata, asked for values of a type.

    Without a default a key must be there. A key that starts with a dot is ``prefix``'s, which is
    the architecture. ``mend`` is what a user can do about a damaged file.
    """

    def __init__(
        self, where: Path | str, get: Callable[[str], Value | None], mend: str, prefix: str = ""
    ) -> None:
        self._where = where
        self._get = get
        self._mend = mend
        self._prefix = prefix

    def name(self, key: str) -> str:
        return self._prefix + key if key.startswith(".") else key

    def value(self, key: str) -> Value | None:
        """Whatever the file says; None if it says nothing."""
        return self._get(self.name(key))

    def has(self, key: str) -> bool:
        return self.value(key) is not None

    def damaged(self, what: str) -> UserError:
        return UserError(f"{self._where} is damaged ({what}); {self._mend}")

    def _wrong(self, key: str, wanted: str) -> UserError:
        value = self.value(key)
        said = "missing" if value is None else f"{value!r:.60}"
        return self.damaged(f"{self.name(key)} is {said} instead of {wanted}")

    def integer(self, key: str, low: int = 0, high: int = MOST, default: int | None = None) -> int:
        """A whole number from low to high."""
        value = self.value(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(key, f"a number from {low} to {high}")
        return value

    def integers(
        self,
        key: str,
        low: int = 0,
        high: int = MOST,
        count: int | None = None,
        default: tuple[int, ...] | None = None,
    ) -> tuple[int, ...]:
        """Whole numbers from low to high, ``count`` of them, or else at least one.

        A number by itself stands for as many alike, as in the keys that may differ by layer.
        """
        value = self.value(key)
        if value is None and default is not None:
            return default
        numbers = value if isinstance(value, tuple) else (value,) * (1 if count is None else count)
        whole = tuple(n for n in numbers if type(n) is int and low <= n <= high)
        if value is None or len(whole) != len(numbers):
            raise self._wrong(key, f"numbers from {low} to {high}")
        self._counted(key, len(whole), count)
        return whole

    def text(self, key: str, default: str | None = None) -> str:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def texts(self, key: str, count: int | None = None) -> tuple[str, ...]:
        """A list of texts, ``count`` of them, or else at least one."""
        value = self.value(key)
        items = value if isinstance(value, tuple) else ()
        texts = tuple(item for item in items if isinstance(item, str))
        if not isinstance(value, tuple) or len(texts) != len(items):
            raise self._wrong(key, "a list of texts")
        self._counted(key, len(texts), count)
        return texts

    def _counted(self, key: str, n: int, count: int | None) -> None:
        if n != count if count is not None else n == 0:
            wanted = "at least one" if count is None else count
            raise self.damaged(f"{self.name(key)} has {n} items instead of {wanted}")
