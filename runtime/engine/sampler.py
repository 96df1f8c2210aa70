"""Stand-in."""

from __future__ import annotations

from typing import Any, NamedTuple

import llama_cpp
import numpy as np

from .request import Logprob, Request


class Sampled(NamedTuple):
    token: int
    logprob: Logprob | None


def logprob_of(logits: Any, token: int, n: int) -> Logprob:
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    best = np.argsort(-x, kind="stable")[:n]
    return Logprob(token, float(x[token]), [(int(t), float(x[t])) for t in best])


class Sampler:
    def __init__(self, model: Any, request: Request) -> None:
        s = request.sampling
        self._n = request.top_logprobs
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._chain = llama_cpp.llama_sampler_chain_init(
            llama_cpp.llama_sampler_chain_default_params()
        )
        add = llama_cpp.llama_sampler_chain_add
        if s.temp <= 0:
            add(self._chain, llama_cpp.llama_sampler_init_greedy())
        else:
            add(self._chain, llama_cpp.llama_sampler_init_top_k(s.top_k))
            add(self._chain, llama_cpp.llama_sampler_init_temp(s.temp))
            seed = llama_cpp.LLAMA_DEFAULT_SEED if s.seed is None else s.seed
            add(self._chain, llama_cpp.llama_sampler_init_dist(seed))

    def sample(self, ctx: Any, i: int) -> Sampled:
        token = int(llama_cpp.llama_sampler_sample(self._chain, ctx, i))
        if self._n is None:
            return Sampled(token, None)
        raw = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, i), (self._n_vocab,))
        return Sampled(token, logprob_of(raw, token, self._n))

    def close(self) -> None:
        if self._chain:
            llama_cpp.llama_sampler_free(self._chain)
            self._chain = None
