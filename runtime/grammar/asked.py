"""What an answer may be held to, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class GBNF:
    """A grammar in llama.cpp's own language.

    ``lazy``: it begins to hold at the first of ``trigger_patterns`` (regular expressions on the
    answer so far) or ``trigger_tokens``, as for a tool call in the middle of an answer.
    ``prefill``: the tokens at the prompt's end that the grammar describes too, and so is to take
    before the answer begins; only of one that is not lazy.
    """

    text: str
    root: str = "root"
    lazy: bool = False
    trigger_patterns: Sequence[str] = ()
    trigger_tokens: Sequence[int] = ()
    prefill: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Schema:
    """A JSON schema that the whole answer must satisfy; ``True`` is any JSON object."""

    schema: Mapping[str, Any] | Literal[True]
