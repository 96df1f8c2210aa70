"""Bodies of ``/v1/completions``: plain prompts, and the scoring of given texts.

Scoring is what ``echo`` with ``logprobs`` asks for: the response then has the log probability of
each token of the prompt, for which ``max_tokens`` may be 0. Clients that score, lm-eval's
local-completions among them, rely on one entry per token: of the first, which nothing precedes, it
is null, and a token with which the model ends has one too.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..engine.generation import Result
from ..engine.request import Event, Finished, Logprob, PromptScored, Request, Token
from ..errors import RequestError
from ..text import well_formed
from . import settings
from .fields import Fields
from .refusal import Refusal
from .stream import DONE, Piece
from .texts import Texts, check_length
from .turn import finished
from .usage import Stamp, TimingsSoFar, finish_reason, finite, head, timings, usage

MOST_PROMPTS = 2048  # of one body, as OpenAI's, and answers to all of them
_DEFAULT_LENGTH = 16  # OpenAI's


class _Prompt(NamedTuple):
    tokens: list[int]
    text: str | None  # None: it was given as tokens


class Completions:
    """One body; ``requests`` are to be computed, in any order, for each prompt its choices."""

    def __init__(self, body: object, texts: Texts) -> None:
        fields = Fields(body)
        self._texts = texts
        self.echo = fields.flag("echo")
        self._top = fields.integer("logprobs", 0, settings.MOST_TOP)
        self._n = settings.n_choices(fields)
        self._special = not fields.flag("skip_special_tokens", default=True)
        max_tokens = settings.length(fields, _DEFAULT_LENGTH)
        _refuse_others(fields, self._n)
        self._prompts = list(_prompts(fields, texts))
        if len(self._prompts) * self._n > MOST_PROMPTS:
            raise Refusal(f"more than {MOST_PROMPTS} answers are asked for in all", "n")
        self.include_usage = settings.include_usage(fields)
        self.timings_per_token = fields.flag("timings_per_token")
        for prompt in self._prompts:
            check_length("prompt", prompt.tokens, max_tokens, texts)
        sampling = settings.sampling(fields, texts.n_vocab)
        self.requests = [
            Request(
                tokens=prompt.tokens,
                max_tokens=max_tokens,
                sampling=settings.choice(sampling, k),
                stop=fields.texts("stop", settings.MOST_STOPS),
                constraint=settings.constraint(fields),
                top_logprobs=self._top,
                prompt_logprobs=self._top if self.echo else None,
                ignore_eos=fields.flag("ignore_eos"),
                special=self._special,
            )
            for prompt in self._prompts
            for k in range(self._n)
        ]

    def response(self, results: Sequence[Result], stamp: Stamp) -> dict[str, Any]:
        """The response body of what the requests came to."""
        return {
            **head(stamp, "text_completion"),
            "choices": [self._choice(i, result) for i, result in enumerate(results)],
            "usage": self.usage([result.finished for result in results]),
            "timings": timings(results[0].finished),
        }

    def stream(self, stamp: Stamp) -> CompletionStream:
        return CompletionStream(self, stamp)

    def usage(self, ends: Sequence[Finished]) -> dict[str, Any]:
        return usage(ends, self._n)

    def line(self, i: int) -> Line:
        """The answer ``i`` in pieces."""
        prompt = self._prompts[i // self._n]
        return Line(
            self._texts, prompt.tokens, self._before(prompt), self._special, self.echo, self._top
        )

    def _before(self, prompt: _Prompt) -> str:
        """The prompt as text, where anybody wants it."""
        if not self.echo and self._top is None:
            return ""
        return prompt.text if prompt.text is not None else self._texts.text(prompt.tokens)

    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        line, end = self.line(index), result.finished
        scored = line.scored(result.prompt_logprobs)
        scored.add(line.generated(result.tokens, result.logprobs))
        if end.ending is not None:
            scored.add(line.generated([end.ending.token], [end.ending], is_end=True))
        return {
            "index": index,
            "text": line.before + result.text if self.echo else result.text,
            "logprobs": None if self._top is None else scored.body(),
            "finish_reason": finish_reason(end.reason),
        }


class Scored:
    """OpenAI's log probabilities of tokens of a completion."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.scores: list[float | None] = []
        self.best: list[Mapping[str, float] | None] = []
        self.offsets: list[int] = []

    def add(self, other: Scored) -> None:
        self.tokens += other.tokens
        self.scores += other.scores
        self.best += other.best
        self.offsets += other.offsets

    def body(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.scores,
            "top_logprobs": self.best,
            "text_offset": self.offsets,
        }


class Line:
    """One answer's text behind its prompt, token by token: where in it each one stands."""

    def __init__(
        self,
        texts: Texts,
        prompt: Sequence[int],
        before: str,
        special: bool,
        echo: bool,
        top: int | None,
    ) -> None:
        self.before = before
        self._texts, self._prompt, self._special = texts, prompt, special
        self._echo, self._top = echo, top
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._end = len(before)  # of the text so far

    def scored(self, logprobs: Sequence[Logprob]) -> Scored:
        """The prompt's tokens, if they are echoed."""
        found = Scored()
        if not self._echo or self._top is None:
            return found
        ends = self._ends(self._prompt)
        # What the text has not, a mark of its beginning, stands before it.
        surplus = ends[-1] - len(self.before)
        for token, score, end in zip(self._prompt, [None, *logprobs], [0, *ends[:-1]], strict=True):
            self._add(found, token, score, max(0, end - surplus))
        return found

    def generated(
        self, tokens: Sequence[int], logprobs: Sequence[Logprob], is_end: bool = False
    ) -> Scored:
        """The next tokens; the one with which a model ends has no text."""
        found = Scored()
        if self._top is None:
            return found
        for token, score in zip(tokens, logprobs, strict=True):
            self._add(found, token, score, self._end)
            if not is_end:
                piece = self._texts.piece(token, self._special)
                self._end += len(self._decoder.decode(piece))
        return found

    def _ends(self, tokens: Sequence[int]) -> list[int]:
        """How many whole characters there are when each of the tokens has come."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        n, ends = 0, []
        for token in tokens:
            n += len(decoder.decode(self._texts.piece(token, True)))
            ends.append(n)
        return ends

    def _add(self, found: Scored, token: int, score: Logprob | None, offset: int) -> None:
        found.tokens.append(self._name(token))
        found.scores.append(score and finite(score.logprob))
        found.best.append(score and self._best(score))
        found.offsets.append(offset)

    def _best(self, score: Logprob) -> Mapping[str, float]:
        """The best, and the token itself; where two are named alike, the better one."""
        best: dict[str, float] = {}
        for token, logprob in score.top:
            best.setdefault(self._name(token), finite(logprob))
        best.setdefault(self._name(score.token), finite(score.logprob))
        return best

    def _name(self, token: int) -> str:
        """A token as text; a part of a character as OpenAI writes it."""
        piece = self._texts.piece(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class CompletionStream:
    """Chunks of one body's choices."""

    def __init__(self, call: Completions, stamp: Stamp) -> None:
        self._call, self._stamp = call, stamp
        self._lines = [call.line(i) for i in range(len(call.requests))]
        self._timings = [
            TimingsSoFar(len(request.tokens), call.timings_per_token) for request in call.requests
        ]
        self._ends: dict[int, Finished] = {}

    def begin(self) -> list[Piece]:
        return []

    def push(self, i: int, events: Sequence[Event]) -> list[Piece]:
        line, scored, text = self._lines[i], Scored(), ""
        for event in events:
            if isinstance(event, PromptScored):
                text += line.before if self._call.echo else ""
                scored.add(line.scored(event.logprobs))
            elif isinstance(event, Token):
                text += event.text
                if event.logprob is not None:
                    scored.add(line.generated([event.token], [event.logprob]))
        end = finished(events)
        if end is not None:
            self._ends[i] = end
            text += end.text
            if end.ending is not None:
                scored.add(line.generated([end.ending.token], [end.ending], is_end=True))
        pieces, so_far = [], self._timings[i].push(events)
        if text or scored.tokens:
            pieces.append(self._chunk(i, text, scored, **so_far))
        if end is not None:
            reason = finish_reason(end.reason)
            pieces.append(self._chunk(i, "", Scored(), reason, timings=timings(end)))
        return pieces

    def end(self) -> list[Piece]:
        if not self._call.include_usage:
            return [DONE]
        used = self._call.usage([self._ends[i] for i in range(len(self._lines))])
        return [Piece({**head(self._stamp, "text_completion"), "choices": [], "usage": used}), DONE]

    def fail(self, refusal: Refusal) -> list[Piece]:
        return [Piece(refusal.body()), DONE]

    def _chunk(
        self, i: int, text: str, scored: Scored, reason: str | None = None, **more: Any
    ) -> Piece:
        choice = {
            "index": i,
            "text": text,
            "logprobs": scored.body() if scored.tokens else None,
            "finish_reason": reason,
        }
        chunk = {**head(self._stamp, "text_completion"), "choices": [choice], **more}
        if self._call.include_usage:
            chunk["usage"] = None
        return Piece(chunk)


def _refuse_others(fields: Fields, n: int) -> None:
    """What would change the answer and is not done."""
    if fields.text("suffix"):
        raise Refusal("suffix is not supported: put what follows into the prompt", "suffix")
    best_of = fields.integer("best_of", 1, settings.MOST_CHOICES)
    if best_of is not None and best_of != n:
        raise Refusal("best_of other than n is not supported: ask for n, and choose", "best_of")


def _prompts(fields: Fields, texts: Texts) -> Sequence[_Prompt]:
    """Text, tokens, or a list of either; RequestErrors get their field's name."""
    given = fields.value("prompt")
    if isinstance(given, str) or (isinstance(given, list) and given and _is_token(given[0])):
        given = [given]
    wanted = f"text, tokens, or a list of at most {MOST_PROMPTS} of them"
    if not isinstance(given, list) or not 0 < len(given) <= MOST_PROMPTS:
        raise fields.wrong("prompt", wanted)
    prompts = []
    for one in given:
        if isinstance(one, str):
            try:
                prompts.append(_Prompt(texts.encode(well_formed(one)), well_formed(one)))
            except RequestError as error:
                raise Refusal(str(error), "prompt") from None
        elif isinstance(one, list) and all(map(_is_token, one)):
            if any(not 0 <= token < texts.n_vocab for token in one):
                raise fields.wrong("prompt", f"tokens from 0 to {texts.n_vocab - 1}")
            prompts.append(_Prompt(one, None))
        else:
            raise fields.wrong("prompt", wanted)
    return prompts


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
