"""The next token of one sequence: llama.cpp's own sampler chain, held to a constraint.

Owns a chain and a constraint. Knows neither texts nor when an answer ends, and reads a context's
logits without computing anything.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..candidates import Candidates, candidates
from ..errors import RequestError, option
from ..vocab import Vocabulary
from .constraint import Constraint, Constraints
from .request import Logprob, Request, Sampling

Row = npt.NDArray[np.float32]

_MIROSTAT_M = 100  # llama.cpp's tools'
_MOST_REMEMBERED = 1 << 20  # tokens: penalties allocate room for as many as they may remember


class Sampled(NamedTuple):
    token: int
    logprob: Logprob | None  # if the request asked


class Sampler:
    """What chooses the tokens of one sequence; RequestError for settings that mean nothing.

    ``model`` is the llama_model, which outlives it. ``constraints`` are those of its vocabulary,
    kept by whoever has many requests: without them what all could share is computed anew. Any
    thread may make one; making it compiles the request's constraint.

    Many samplers may sample from one context at the same time, each in one thread, once the caller
    has called ``llama_get_logits`` after the step: that waits for the step and sorts its outputs,
    which must not happen twice at once. llama.cpp and llguidance work without the GIL.
    """

    def __init__(
        self, model: Any, request: Request, constraints: Constraints | None = None
    ) -> None:
        if constraints is None:
            constraints = Constraints(Vocabulary(llama_cpp.llama_model_get_vocab(model)))
        self._vocabulary = constraints.vocabulary
        self._top = request.top_logprobs
        self._ignore_eos = request.ignore_eos
        self._chain: Any = None
        self._constraint: Constraint | None = None
        bias = _bias(self._vocabulary, request)
        self._banned = [token for token, value in bias.items() if value == -math.inf]
        to_come = request.max_tokens or int(llama_cpp.llama_model_n_ctx_train(model))
        longest = min(len(request.tokens) + to_come, _MOST_REMEMBERED)
        _check(request.sampling)
        if request.constraint is not None:
            self._constraint = constraints.make(request.constraint)
        self._chain = llama_cpp.llama_sampler_chain_init(
            llama_cpp.llama_sampler_chain_default_params()
        )
        for sampler in _samplers(self._vocabulary, request.sampling, bias, longest):
            llama_cpp.llama_sampler_chain_add(self._chain, sampler)
        # Penalties count the prompt too, as in llama.cpp's tools.
        for token in request.tokens[-_memory(request.sampling, longest) :]:
            llama_cpp.llama_sampler_accept(self._chain, token)

    def sample(self, ctx: Any, i: int) -> Sampled:
        """The token behind row ``i`` of the context's last batch, whose output was asked for.

        As in llama.cpp's tools, the chain first chooses from all tokens, and only where the
        constraint does not allow its choice are all tokens masked and the chain asked again. It
        has drawn a random number more then than under a mask from the start: a constraint changes
        what follows for a seed even where in the end it allows everything.

        Where a constraint allows nothing but to end, this is the ending token even if the request
        ignores that.
        """
        pointer = llama_cpp.llama_get_logits_ith(ctx, i)
        assert pointer, f"row {i} has no output"
        row: Row = np.ctypeslib.as_array(pointer, (self._vocabulary.n_tokens,))
        every = candidates(self._vocabulary.n_tokens)
        every.fill(row)
        token, logit = self._choose(every)
        if self._constraint is not None and not self._constraint.allows(token):
            every.fill(row)
            token, logit = self._choose_allowed(every, self._constraint)
        if logit == -math.inf:
            raise RequestError(f"{option('logit_bias')} leaves no token: ban fewer of them")
        llama_cpp.llama_sampler_accept(self._chain, token)
        if self._constraint is not None:
            self._constraint.accept(token)
        return Sampled(token, None if self._top is None else logprob(row, token, self._top))

    def _choose(self, every: Candidates) -> tuple[int, float]:
        every.apply(self._chain)
        return every.selected()

    def _choose_allowed(self, every: Candidates, constraint: Constraint) -> tuple[int, float]:
        constraint.mask(every)
        allowed = np.isfinite(every.logits)
        open_ = allowed.copy()
        open_[self._banned] = False
        if not open_.any() and self._ignore_eos:
            for token in self._vocabulary.ending_tokens:
                if allowed[token]:
                    return token, 0.0
        return self._choose(every)

    def close(self) -> None:
        if self._chain:
            llama_cpp.llama_sampler_free(self._chain)
            self._chain = None
        if self._constraint is not None:
            self._constraint.close()
            self._constraint = None

    def __del__(self) -> None:
        if getattr(self, "_chain", None):
            self.close()


def logprob(row: Row, token: int, n_top: int) -> Logprob:
    """Of a token under these logits of a model, and of the ``n_top`` most probable, equals in the
    order of their numbers."""
    most = row.max()
    total = math.log(np.exp(row - most).sum(dtype=np.float64)) + float(most)
    n = min(n_top, len(row))
    best = np.empty(0, np.intp)
    if n:
        best = np.flatnonzero(row >= np.partition(row, len(row) - n)[len(row) - n])
        best = best[np.lexsort((best, -row[best]))][:n]
    return Logprob(
        token, float(row[token]) - total, [(int(t), float(row[t]) - total) for t in best]
    )


# --- the chain ------------------------------------------------------------------------------------


def _check(sampling: Sampling) -> None:
    """llama.cpp computes on with what is no number."""
    for field in fields(sampling):
        value = getattr(sampling, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"{option(field.name)} must be a finite number, not {value}")
    if sampling.repeat_penalty <= 0:
        raise RequestError(
            f"{option('repeat_penalty')} must be greater than 0, not {sampling.repeat_penalty}"
        )
    if sampling.mirostat not in (0, 1, 2):
        raise RequestError(f"{option('mirostat')} must be 0, 1 or 2, not {sampling.mirostat}")


def _bias(vocabulary: Vocabulary, request: Request) -> dict[int, float]:
    """The request's; ending tokens it ignores and those the model suppresses are banned."""
    bias = dict(request.sampling.logit_bias)
    vocabulary.check(list(bias))
    for token, value in bias.items():
        if math.isnan(value) or value == math.inf:
            raise RequestError(f"{option('logit_bias')} of token {token} cannot be {value}")
    n = ctypes.c_int32()
    suppressed = llama_cpp.llama_vocab_get_suppress_tokens(vocabulary.vocab, ctypes.byref(n))
    banned = [suppressed[i] for i in range(n.value)]
    if request.ignore_eos:
        banned += vocabulary.ending_tokens
    return bias | dict.fromkeys(banned, -math.inf)


def _last(n: int, longest: int) -> int:
    """Of how many tokens a penalty takes note: -1 is all of them."""
    return longest if n < 0 else min(n, longest)


def _memory(sampling: Sampling, longest: int) -> int:
    return max(
        1, _last(sampling.penalty_last_n, longest), _last(sampling.dry_penalty_last_n, longest)
    )


def _samplers(
    vocabulary: Vocabulary, sampling: Sampling, bias: dict[int, float], longest: int
) -> Iterator[Any]:
    """In the order of llama.cpp's tools."""
    s, n = sampling, vocabulary.n_tokens
    seed = 0xFFFFFFFF if s.seed is None else s.seed & 0xFFFFFFFF  # the first: a random one
    if bias:
        biases = (llama_cpp.llama_logit_bias * len(bias))(*bias.items())
        yield llama_cpp.llama_sampler_init_logit_bias(n, len(bias), biases)
    if s.mirostat and s.temp > 0:
        yield llama_cpp.llama_sampler_init_temp(s.temp)
        if s.mirostat == 1:
            tau, eta = s.mirostat_tau, s.mirostat_eta
            yield llama_cpp.llama_sampler_init_mirostat(n, seed, tau, eta, _MIROSTAT_M)
        else:
            yield llama_cpp.llama_sampler_init_mirostat_v2(seed, s.mirostat_tau, s.mirostat_eta)
        return
    yield llama_cpp.llama_sampler_init_penalties(
        n,
        _last(s.penalty_last_n, longest),
        s.repeat_penalty,
        s.frequency_penalty,
        s.presence_penalty,
    )
    breakers = [text.encode(errors="replace") for text in s.dry_breakers if vocabulary.has_texts]
    yield llama_cpp.llama_sampler_init_dry(
        vocabulary.vocab,
        s.dry_multiplier,
        s.dry_base,
        s.dry_allowed_length,
        _last(s.dry_penalty_last_n, longest),
        (ctypes.c_char_p * len(breakers))(*breakers),
        len(breakers),
    )
    if s.temp <= 0:
        yield llama_cpp.llama_sampler_init_greedy()
        return
    yield llama_cpp.llama_sampler_init_top_n_sigma(s.top_n_sigma)
    yield llama_cpp.llama_sampler_init_top_k(min(s.top_k, n))
    yield llama_cpp.llama_sampler_init_typical(s.typical_p, 0)
    yield llama_cpp.llama_sampler_init_top_p(s.top_p, 0)
    yield llama_cpp.llama_sampler_init_min_p(s.min_p, 0)
    yield llama_cpp.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, 0, seed)
    yield llama_cpp.llama_sampler_init_temp(s.temp)
    yield llama_cpp.llama_sampler_init_dist(seed)
