"""What is asked of an engine and what it answers, as values.

Knows no model: whoever made the tokens of a prompt has applied templates already, and whoever reads
the answer knows what the text means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..grammar.asked import GBNF as GBNF
from ..grammar.asked import Schema as Schema


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of llama.cpp's sampler chain; the defaults are llama.cpp's own.

    ``temp`` 0 is greedy. ``seed`` None: random. ``logit_bias`` is added to logits, by token, and
    -inf bans one. ``penalty_last_n`` and ``dry_penalty_last_n`` -1: all tokens there are.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_breakers: Sequence[str] = ("\n", ":", '"', "*")
    mirostat: Literal[0, 1, 2] = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to compute.

    ``tokens`` is the prompt. ``max_tokens`` None: until the model ends or its context is full; 0:
    the prompt is only scored. ``top_logprobs`` N: the log probabilities of each generated token and
    of the N best beside it; ``prompt_logprobs`` the same of the prompt's tokens, the first left
    out. ``stop`` ends the answer where one of the texts would begin. ``special``: control tokens
    appear in the text; else only those of them that are ``shown``. Higher ``priority`` goes first.
    ``owner``: computed states of one owner are never used for another. ``progress``: events tell
    how far the prompt is.
    """

    tokens: Sequence[int]
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop: Sequence[str] = ()
    constraint: GBNF | Schema | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    special: bool = False
    shown: Set[int] = frozenset()
    priority: int = 0
    owner: str = ""
    progress: bool = False


class Logprob(NamedTuple):
    """Natural log of a token's probability under the model itself, before any sampler."""

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]  # the best, best first


class PromptScored(NamedTuple):
    """The prompt is computed; ``logprobs`` of its tokens after the first, if asked for."""

    logprobs: Sequence[Logprob]
    cached_tokens: int  # of the prompt, not computed again


class Progress(NamedTuple):
    """So many tokens of the prompt are there, of which some were not computed again."""

    n_tokens: int
    cached_tokens: int
    seconds: float  # since its first step began


class Timings(NamedTuple):
    """Seconds of one request, from when it was submitted."""

    queued_s: float  # until its first step
    first_token_s: float  # until its first token; until it was scored if there is none
    total_s: float  # until now, or its end


class Token(NamedTuple):
    """One generated token and the text that it completes: empty inside a character, or while what
    may become a stop text is held back."""

    token: int
    text: str
    logprob: Logprob | None
    timings: Timings


Reason = Literal["stop", "length", "context"]


class Finished(NamedTuple):
    """The last event of a request that did not fail.

    ``reason``: stop, the model ended or ``stop_text`` came up; length, max_tokens; context, the
    sequence is as long as its context. ``text`` is what was still held back. ``ending`` is the
    token with which the model ended, no part of the answer, if log probabilities were asked for.
    """

    reason: Reason
    stop_text: str | None
    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    timings: Timings
    ending: Logprob | None = None


Event = Progress | PromptScored | Token | Finished


class Cancelled(Exception):
    """A request was cancelled; its events end with this."""


class EngineClosed(RuntimeError):
    """The engine was closed before a request ended, or before it came."""

    def __init__(self) -> None:
        super().__init__("the engine is closed: nothing is computed any more")
