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
from ..engine.request import Logprob, Request
from ..errors import RequestError
from ..text import well_formed
from . import settings
from .fields import Fields
from .refusal import Refusal
from .texts import Texts, check_length
from .usage import Stamp, finish_reason, finite, head, usage

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
        self._echo = fields.flag("echo")
        self._top = fields.integer("logprobs", 0, settings.MOST_TOP)
        self._n = settings.n_choices(fields)
        self._special = not fields.flag("skip_special_tokens", default=True)
        max_tokens = settings.length(fields, _DEFAULT_LENGTH)
        _refuse_others(fields, self._n)
        self._prompts = list(_prompts(fields, texts))
        if len(self._prompts) * self._n > MOST_PROMPTS:
            raise Refusal(f"more than {MOST_PROMPTS} answers are asked for in all", "n")
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
                prompt_logprobs=self._top if self._echo else None,
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
            "usage": usage(results, self._n),
        }

    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        prompt = self._prompts[index // self._n]
        before = ""
        if self._echo or self._top is not None:
            before = prompt.text if prompt.text is not None else self._texts.text(prompt.tokens)
        return {
            "index": index,
            "text": before + result.text if self._echo else result.text,
            "logprobs": None if self._top is None else self._logprobs(prompt, before, result),
            "finish_reason": finish_reason(result.finished.reason),
        }

    def _logprobs(self, prompt: _Prompt, before: str, result: Result) -> dict[str, Any]:
        tokens: list[int] = []
        scores: list[Logprob | None] = []
        offsets: list[int] = []
        if self._echo:
            tokens += prompt.tokens
            scores += [None, *result.prompt_logprobs]
            ends = self._ends(prompt.tokens, special=True)
            # What the text has not, a mark of its beginning, stands before it.
            surplus = ends[-1] - len(before)
            offsets += [max(0, end - surplus) for end in [0, *ends[:-1]]]
        answered = [*result.logprobs]
        if result.finished.ending is not None:
            answered.append(result.finished.ending)
        scores += answered
        tokens += [score.token for score in answered]
        ends = self._ends(result.tokens, self._special)
        offsets += [len(before) + end for end in [0, *ends][: len(answered)]]
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": [score and finite(score.logprob) for score in scores],
            "top_logprobs": [score and self._best(score) for score in scores],
            "text_offset": offsets,
        }

    def _ends(self, tokens: Sequence[int], special: bool) -> list[int]:
        """How many whole characters there are when each of the tokens has come."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        n, ends = 0, []
        for token in tokens:
            n += len(decoder.decode(self._texts.piece(token, special)))
            ends.append(n)
        return ends

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
