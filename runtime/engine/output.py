"""The text of an answer while its tokens come: whole characters, and no part of a stop text.

Owns what is held back: the bytes of a character that is not complete, and text that may become a
stop text. Knows neither requests nor why an answer ends.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence, Set

from ..vocab import Vocabulary


class Output:
    """The text of one answer. What is pushed and flushed, joined, is what the tokens stand for.

    Of several ``stop`` texts that one ends it which is complete first, and of those the one that
    begins first; so it does not matter how tokens divide the text. ``special``: control tokens
    appear, and may be part of a stop text; those in ``shown`` do in any case. ``begins``: there is
    no text before the answer, so a space that only marks the beginning of a text is left out. Bytes
    that are no UTF-8 become U+FFFD.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stop: Sequence[str],
        special: bool,
        begins: bool = False,
        shown: Set[int] = frozenset(),
    ) -> None:
        self._vocabulary = vocabulary
        self._stop = [text for text in stop if text]
        self._special, self._shown = special, shown
        self._begins = begins
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # the longest end of the text that a stop text begins with

    def push(self, token: int) -> tuple[str, str | None]:
        """The text that is sure by now, and the stop text that came up behind it.

        Behind a stop text nothing is to be pushed or flushed.
        """
        piece = self._vocabulary.beginning if self._begins else self._vocabulary.piece
        self._begins = False
        return self._sure(self._decoder.decode(piece(token, self._special or token in self._shown)))

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        text, self._held = self._held + self._decoder.decode(b"", final=True), ""
        return text

    def _sure(self, more: str) -> tuple[str, str | None]:
        text = self._held + more
        found = [
            (start + len(stop), start, stop)
            for stop in self._stop
            if (start := text.find(stop)) >= 0
        ]
        if found:
            _, start, stop = min(found)
            self._held = ""
            return text[:start], stop
        n = max((_overlap(text, stop) for stop in self._stop), default=0)
        sure = len(text) - n
        self._held = text[sure:]
        return text[:sure], None


def _overlap(text: str, stop: str) -> int:
    """How long the longest end of ``text`` is with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
