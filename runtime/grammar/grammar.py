"""Grammars and JSON schemas of requests, as llama.cpp applies them while tokens are sampled.

A grammar that allows no token, or takes too long, ends the request and not the process; what makes
too much work is refused before llama.cpp sees it (gbnf.py, stacks.py). What masks candidates is
llama.cpp alone.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Mapping, Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from .. import logs
from ..candidates import Candidates, candidates
from ..errors import RequestError
from ..text import shown
from ..vocab import Vocabulary
from .gbnf import bad
from .stacks import Machine

MAX_COUNT = 1000  # characters or items that may follow: llama.cpp takes twice as many rules
MAX_LEAST = 20_000  # that must be there: only the grammar's length counts
SECONDS = 10.0  # that one token may take nevertheless


def check_schema(schema: object) -> None:
    """RequestError, by the property's name, for a JSON schema that counts further than the grammar
    made of it can. That is a group for each character or item, one inside the other."""
    todo = [("the schema", schema)]
    while todo:
        name, node = todo.pop()
        if isinstance(node, list):
            todo += ((name, item) for item in node)
        if not isinstance(node, dict):
            continue
        todo += node.items()
        for least, most in (("minLength", "maxLength"), ("minItems", "maxItems")):
            low, high = (
                value if type(value := node.get(key)) in (int, float) else None
                for key in (least, most)
            )
            if low is not None and low > MAX_LEAST:
                raise _counts(least, low, name, MAX_LEAST)
            if high is not None and high - (low or 0) > MAX_COUNT:
                raise _counts(most, high, name, MAX_COUNT + (low or 0))


def check_chat(request: Mapping[str, Any]) -> None:
    """``check_schema`` of all schemas of a chat request that llama_cpp makes a grammar of."""
    if isinstance(response_format := request.get("response_format"), dict):
        check_schema(response_format)
    if isinstance(choice := request.get("tool_choice"), dict):
        wanted = (choice.get("function") or {}).get("name")
        for tool in request.get("tools") or ():
            if (tool.get("function") or {}).get("name") == wanted:
                check_schema(tool)


def _counts(key: str, value: float, name: str, limit: float) -> RequestError:
    return RequestError(
        f"{key} {value} of {shown(name)} is further than a grammar counts: leave it out, or give "
        f"at most {limit}"
    )


def longest_texts(vocabulary: Vocabulary) -> list[str]:
    """Of each character that tokens begin with, the longest: no token makes more work."""
    longest: dict[str, str] = {}
    for token in range(vocabulary.n_tokens):
        text = vocabulary.piece(token, special=True).decode("utf-8", "ignore")
        if text and len(text) > len(longest.get(text[0], "")):
            longest[text[0]] = text
    return sorted(longest.values(), key=len, reverse=True)[:128]


class Grammar:
    """llama.cpp's grammar over one vocabulary, which fails in sentences: RequestError from every
    method. ``texts`` are the vocabulary's ``longest_texts``.
    """

    def __init__(
        self, vocabulary: Vocabulary, texts: Sequence[str], text: str, root: str = "root"
    ) -> None:
        self._machine: Machine | None = Machine(text, root)
        self._machine.check(texts)
        self._vocabulary, self._texts = vocabulary, texts
        self._one = Candidates(1)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        with logs.capture() as log:
            self._sampler = llama_cpp.llama_sampler_init_grammar(
                vocabulary.vocab, text.encode(), root.encode()
            )
        if not self._sampler:
            raise bad(log.reason())

    def allows(self, token: int) -> bool:
        """Whether the token may come next."""
        if self._machine is not None:
            text = self._vocabulary.piece(token, special=True).decode("utf-8", "ignore")
            self._machine.check_one(text)
        self._one.only(token)
        self._apply(self._one)
        return bool(np.isfinite(self._one.logits[0]))

    def mask(self, every: Candidates) -> None:
        """Take from all tokens, in the order of their numbers, what may not come next."""
        if self._machine is not None:
            self._machine.check(self._texts)
        self._apply(every)
        if not np.isfinite(every.logits).any():
            raise bad("it allows no token of this model here")

    def _apply(self, those: Candidates) -> None:
        start = time.monotonic()
        those.apply(self._sampler)
        if (seconds := time.monotonic() - start) > SECONDS:
            raise bad(f"it took {seconds:.0f} s for one token; make it simpler")

    def accept(self, token: int) -> None:
        """Go on behind a token that may come next; for any other llama.cpp ends the process."""
        llama_cpp.llama_sampler_accept(self._sampler, token)
        if self._machine is not None and not self._vocabulary.ends(token):
            text = self._vocabulary.piece(token, special=True)
            self._machine.accept(self._decoder.decode(text))
            if not self._machine.stacks:  # bytes that are no text: llama.cpp has its own rules
                self._machine = None

    def close(self) -> None:
        if self._sampler:
            llama_cpp.llama_sampler_free(self._sampler)
            self._sampler = None

    def __del__(self) -> None:
        if getattr(self, "_sampler", None):
            self.close()


class Processor:
    """A grammar as a logits processor of llama_cpp's.

    Those are called from C, where no exception may pass: what went wrong is raised by ``accept``,
    which is told each token that was sampled.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._error: RequestError | None = None

    def __call__(
        self, _: npt.NDArray[np.intc], scores: npt.NDArray[np.single]
    ) -> npt.NDArray[np.single]:
        try:
            if self._error is None:
                every = candidates(len(scores))
                every.fill(scores)
                self._grammar.mask(every)
                return every.logits
        except RequestError as error:
            self._error = error
        return scores

    def accept(self, token: int) -> None:
        """The token that was sampled last."""
        if self._error is not None:
            raise self._error
        self._grammar.accept(token)
