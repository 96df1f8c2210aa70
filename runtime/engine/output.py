"""Stand-in."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ..vocab import Vocabulary


class Output:
    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str], special: bool) -> None:
        self._vocabulary, self._special = vocabulary, special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> tuple[str, str | None]:
        return self._decoder.decode(self._vocabulary.piece(token, self._special)), None

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)
