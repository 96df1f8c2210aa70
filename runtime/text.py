"""Text from outside: files as editors on any system write them, and names, which are only data.

Knows nothing of what a text is for.
"""

from __future__ import annotations

import codecs
import re

# Longest first: UTF-32's mark begins as UTF-16's does.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SURROGATE = re.compile("[\ud800-\udfff]")

LINE_LIMIT = 2000  # a sentence is shorter, unless a file had something long to say in it


def decoded(data: bytes) -> str:
    """A file's text: UTF-8, or what its byte order mark says; lines end as on Unix.

    ValueError for what is none of these.
    """
    mark, encoding = next(
        ((mark, encoding) for mark, encoding in _MARKS if data.startswith(mark)), (b"", "utf-8")
    )
    return data[len(mark) :].decode(encoding).replace("\r\n", "\n")


def well_formed(text: str) -> str:
    """Text that UTF-8 can say: halves of surrogate pairs, from JSON or a file's name, are joined,
    and what is left of them becomes U+FFFD."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def printable(text: str) -> str:
    """Lines for a terminal: what would move its cursor, or hide, is escaped."""
    return "\n".join(shown(line, LINE_LIMIT) for line in text.split("\n"))


def shown(name: object, limit: int = 100) -> str:
    """A name in the middle of a sentence: one line, shortened in the middle beyond ``limit``
    characters."""
    text = str(name)
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]}…{text[-(limit // 3) :]}"
    return text if text.isprintable() else "".join(map(_escape, text))


def _escape(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()
