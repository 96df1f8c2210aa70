"""Bodies of ``/v1/chat/completions``: a conversation, and the message that continues it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..engine.generation import Result
from ..engine.request import Request
from ..errors import UserError
from . import settings
from .fields import Fields
from .messages import messages
from .refusal import Refusal
from .texts import Texts, check_length
from .usage import Stamp, finish_reason, finite, head, usage


class ChatCompletions:
    """One body; ``requests`` are to be computed, in any order: its choices."""

    def __init__(self, body: object, texts: Texts) -> None:
        fields = Fields(body)
        self._texts = texts
        _refuse_others(fields)
        try:
            tokens = texts.conversation(messages(fields))
        except UserError as error:  # a model without a template, or one that refuses this
            raise Refusal(str(error), getattr(error, "param", None) or "messages") from None
        max_tokens = settings.length(fields, None)
        check_length("messages", tokens, max_tokens, texts)
        sampling = settings.sampling(fields, texts.n_vocab)
        self._top = _top_logprobs(fields)
        self.requests = [
            Request(
                tokens=tokens,
                max_tokens=max_tokens,
                sampling=settings.choice(sampling, k),
                stop=fields.texts("stop", settings.MOST_STOPS),
                constraint=settings.constraint(fields),
                top_logprobs=self._top,
                ignore_eos=fields.flag("ignore_eos"),
                special=not fields.flag("skip_special_tokens", default=True),
            )
            for k in range(settings.n_choices(fields))
        ]

    def response(self, results: Sequence[Result], stamp: Stamp) -> dict[str, Any]:
        """The response body of what the requests came to."""
        return {
            **head(stamp, "chat.completion"),
            "choices": [self._choice(i, result) for i, result in enumerate(results)],
            "usage": usage(results, len(results)),
        }

    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        return {
            "index": index,
            "message": {
                "role": "assistant",
                "content": result.text,
                "refusal": None,
                "annotations": [],
            },
            "logprobs": None if self._top is None else self._logprobs(result),
            "finish_reason": finish_reason(result.finished.reason),
        }

    def _logprobs(self, result: Result) -> dict[str, Any]:
        content = [
            {
                **self._scored(score.token, score.logprob),
                "top_logprobs": [self._scored(token, logprob) for token, logprob in score.top],
            }
            for score in result.logprobs
        ]
        return {"content": content, "refusal": None}

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._texts.piece(token)
        return {
            "token": piece.decode(errors="replace"),
            "logprob": finite(logprob),
            "bytes": [*piece],
        }


def _top_logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs", 0, settings.MOST_TOP)
    if fields.flag("logprobs"):
        return top or 0
    if top is not None:
        raise Refusal("top_logprobs belongs to logprobs: set that to true", "top_logprobs")
    return None


def _refuse_others(fields: Fields) -> None:
    """What would change the answer and is not done."""
    for name in ("tools", "functions"):
        if fields.value(name) and fields.value("tool_choice") != "none":
            raise Refusal(f"{name} are not supported yet: leave them out", name)
    if fields.value("chat_template_kwargs"):
        raise Refusal("chat_template_kwargs are not supported yet", "chat_template_kwargs")
    if (fields.value("modalities") or ["text"]) != ["text"]:
        raise Refusal("only text is answered: leave modalities out", "modalities")
