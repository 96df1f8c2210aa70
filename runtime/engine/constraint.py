"""What a request's grammar or JSON schema allows next, whoever judges it.

A grammar is llama.cpp's, within our bounds (``grammar``). A schema is judged by llguidance where
that is installed, and else by the grammar that llama_cpp makes of it. Nothing here samples.

A constraint is made by whoever submits a request, outside any step, and may take its time there: a
tenth of a second for a large grammar. Each token afterwards has bounds: of work in a grammar, of
llguidance's own fuel in a schema. A constraint belongs to one sequence and is not thread-safe;
different ones of one vocabulary may be used at the same time.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import llama_cpp
import numpy as np

from ..candidates import Candidates
from ..errors import RequestError
from ..grammar.gbnf import bad
from ..grammar.grammar import SECONDS, Grammar, check_schema, longest_texts
from ..text import shown
from ..vocab import Vocabulary
from .request import GBNF, Schema

try:
    import llguidance
    import llguidance.llamacpp
except ImportError:  # without the extra ``schema``
    llguidance = None  # type: ignore[assignment]

# Between the parts of a JSON text, as in llama.cpp's own grammars: a model that is free to write
# any number of blanks sometimes never stops.
_BLANKS = r" |\n{1,2}[ \t]{0,20}"


class Constraint(Protocol):
    """What may come next in one answer. RequestError from each method for what cannot go on."""

    def allows(self, token: int) -> bool:
        """Whether the token may come next."""

    def mask(self, every: Candidates) -> None:
        """Take from all tokens, in the order of their numbers, what may not come next."""

    def accept(self, token: int) -> None:
        """Go on behind a token that may come next."""

    def close(self) -> None: ...


def judge_of_schemas() -> str:
    """Who holds answers to JSON schemas in this process."""
    return "llama.cpp's grammar" if llguidance is None else f"llguidance {llguidance.__version__}"


class Constraints:
    """Constraints over one vocabulary. What all of them need is computed with the first; any
    thread may make one."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._lock = threading.Lock()

    def make(self, asked: GBNF | Schema) -> Constraint:
        """RequestError for what cannot be used."""
        self.vocabulary.check_texts()
        if isinstance(asked, GBNF):
            return Lazy(self, asked) if asked.lazy else self.grammar(asked.text, asked.root)
        schema = {"type": "object"} if asked.schema is True else asked.schema
        if llguidance is not None:
            with self._lock:
                tokenizer = self._tokenizer
            return Guided(tokenizer, self.vocabulary.n_tokens, schema)
        return self.grammar(_gbnf(schema))

    def grammar(self, text: str, root: str = "root") -> Grammar:
        with self._lock:
            texts = self._texts
        return Grammar(self.vocabulary, texts, text, root)

    @cached_property
    def _texts(self) -> Sequence[str]:
        return longest_texts(self.vocabulary)

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            return llguidance.llamacpp.lltokenizer_from_vocab(
                self.vocabulary.vocab, eos_token=self.vocabulary.ending_tokens or None
            )
        except (OverflowError, ValueError) as error:  # a token of 16 kB, none that ends
            raise _bad_schema(f"this model's vocabulary: {error}") from None


class Lazy:
    """A grammar that begins to hold in the middle of an answer.

    As llama.cpp's own lazy grammar: a trigger token is the first that the grammar takes; a pattern
    is looked for in all bytes of the answer, and the grammar takes what its first group that is not
    empty matched and everything behind, the whole match if there is no such group. llama.cpp ends
    the process over a pattern that is none, and over a match that its grammar does not take.

    Patterns are Python's, and trusted: nothing bounds the time that one takes.
    """

    def __init__(self, constraints: Constraints, asked: GBNF) -> None:
        self._constraints, self._asked = constraints, asked
        self._waiting = constraints.grammar(asked.text, asked.root)  # or refused at once
        self._grammar: Grammar | None = None
        constraints.vocabulary.check(asked.trigger_tokens)
        self._tokens = frozenset(asked.trigger_tokens)
        try:
            self._patterns = [re.compile(p.encode()) for p in asked.trigger_patterns]
        except (re.error, ValueError, RecursionError, OverflowError) as error:
            raise bad(f"a trigger pattern is no regular expression ({error})") from None
        self._said = bytearray()
        self._ends: list[tuple[int, int]] = []  # of what was said: each token, where it ends

    def allows(self, token: int) -> bool:
        return self._grammar is None or self._grammar.allows(token)

    def mask(self, every: Candidates) -> None:
        if self._grammar is not None:
            self._grammar.mask(every)

    def accept(self, token: int) -> None:
        vocabulary = self._constraints.vocabulary
        if self._grammar is not None:
            self._grammar.accept(token)
        elif token in self._tokens:
            self._hold(b"", [token])
        elif not vocabulary.ends(token):
            self._said += vocabulary.piece(token, special=True)
            self._ends.append((token, len(self._said)))
            if (start := self._found()) is not None:
                ends = (i for i, (_, end) in enumerate(self._ends) if end > start)
                first = next(ends, len(self._ends))
                begin = self._ends[first - 1][1] if first else 0
                self._hold(bytes(self._said[begin:start]), [t for t, _ in self._ends[first:]])

    def _found(self) -> int | None:
        """Where the text begins that the grammar is to take."""
        began = time.monotonic()
        for pattern in self._patterns:
            if match := pattern.search(self._said):
                groups = range(1, pattern.groups + 1)
                return match.start(next((g for g in groups if match[g]), 0))
        if (seconds := time.monotonic() - began) > SECONDS:
            raise bad(f"its trigger patterns took {seconds:.0f} s for one token")
        return None

    def _hold(self, before: bytes, tokens: Sequence[int]) -> None:
        """Hold from now on, and for these tokens, of which ``before`` is no part of the match."""
        self._grammar = self._waiting
        if before:
            text, root = self._asked.text, self._asked.root
            name = next(n for i in range(len(text)) if (n := f"whole-{i}") not in text)
            quoted = "".join(f"\\U{ord(c):08X}" for c in before.decode("utf-8", "replace"))
            self._waiting.close()
            self._grammar = self._constraints.grammar(
                f'{text}\n{name} ::= "{quoted}" {root}\n', name
            )
        for token in tokens:
            if not self._grammar.allows(token):
                raise bad("it does not take the text that triggers it")
            self._grammar.accept(token)

    def close(self) -> None:
        self._waiting.close()
        if self._grammar is not None:
            self._grammar.close()


class Guided:
    """A JSON schema, judged by llguidance; its methods work without the GIL."""

    def __init__(self, tokenizer: Any, n_tokens: int, schema: Mapping[str, Any]) -> None:
        self._n_tokens = n_tokens
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_pattern": _BLANKS}
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise _bad_schema(str(error)) from None
        limits = llguidance.LLParserLimits(verbose_errors=False)
        self._matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _bad_schema(self._matcher.get_error().split("\n")[0])

    def allows(self, token: int) -> bool:
        allowed = self._matcher.validate_tokens([token]) == 1
        self._check()
        return bool(allowed)

    def mask(self, every: Candidates) -> None:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=self._n_tokens, bitorder="little").view(bool)
        every.logits[~allowed] = -np.inf
        if not np.isfinite(every.logits).any():
            raise _bad_schema("it allows no token of this model here")

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def close(self) -> None:
        """Nothing to free by hand."""


def _bad_schema(why: str) -> RequestError:
    return RequestError(f"the JSON schema cannot be used: {shown(why)}")


def _gbnf(schema: Mapping[str, Any]) -> str:
    check_schema(schema)
    try:
        return str(llama_cpp.llama_grammar.json_schema_to_gbnf(json.dumps(schema)))
    except Exception as error:  # the converter has no exceptions of its own: KeyError, assertions …
        raise _bad_schema(f"{type(error).__name__}: {error}") from error
