"""A model opened for an engine: its slots, its one context, and what is asked of both.

Owns opening and closing in the right order; ``opening`` and ``arena`` do the work. Knows no
request.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import llama_cpp

from ...policies.presets import PolicyMaker
from .. import arena as arenas
from .. import opening
from ..arena import RouterReader
from ..controller import Recorder
from ..opening import Found
from ..params import ContextShape, ModelParams
from ..progress import Report
from ..routers import read_routers
from ..stats import Meter
from ..vocab import Vocabulary, metadata
from .context import Context
from .memory import Memory
from .observer import Observer


def context_shape(
    n_ctx: int,
    parallel: int = 1,
    *,
    cells: int | None = None,
    chunk: int = 512,
    score_rows: int = 1,
    n_threads: int | None = None,
) -> ContextShape:
    """The context of an engine whose sequences are at most ``n_ctx`` long, ``parallel`` of them at
    once; ``cells`` is what they share, enough for all unless it is given.

    Unified, so that a step of any sequences is one graph and each expert is read once for it. A
    step is never cut: it holds a chunk of prompts beside a token of each other sequence.
    """
    return ContextShape(
        n_ctx=cells or n_ctx * parallel,
        n_batch=chunk + (parallel if parallel > 1 else 0),
        n_outputs=max(parallel, score_rows),
        n_threads=n_threads,
        n_seq_max=parallel,
        kv_unified=True,
        flash_attn=True,
        swa_full=False,
    )


class Model:
    """A found model, loaded, with a context of this shape. UserError for what cannot be opened.

    ``kept_bytes`` of the budget are left for whoever keeps states outside the context,
    ``beside_bytes`` for other processes.
    """

    def __init__(
        self,
        found: Found,
        shape: ContextShape,
        *,
        make_policy: PolicyMaker | None = None,
        routers: RouterReader = read_routers,
        recorder: Recorder | None = None,
        observer: Observer | None = None,
        progress: Report | None = None,
        kept_bytes: int = 0,
        beside_bytes: int = 0,
    ) -> None:
        with contextlib.ExitStack() as stack:
            # Context and model go first, then the plugin, then what it used.
            after = stack.enter_context(contextlib.ExitStack())
            overrides: dict[str, int] = {}
            if found.options.experts_used is not None:
                overrides[f"{found.layout.architecture}.expert_used_count"] = found.n_used
            model_params, params = ModelParams(overrides), shape.params()
            binding, measured = opening.bound(found, model_params.params, params)
            stack.callback(binding.close)
            needs = measured.needs._replace(states=kept_bytes, beside=beside_bytes)
            measured = replace(measured, needs=needs)
            loaded = opening.load(measured, binding, model_params.params, progress)
            self.model = loaded.model
            stack.callback(llama_cpp.llama_model_free, self.model)
            self.context = Context(self.model, params, observer=observer)
            stack.callback(self.context.close)
            self.arena = arenas.start(
                loaded,
                make_policy=make_policy,
                routers=routers,
                recorder=recorder,
                progress=progress,
            )
            after.callback(self.arena.close)
            self._stack = stack.pop_all()
        self.context.arena = self.arena
        self.meter = self.context.meter = Meter(self.arena)
        self.found = self.arena.found
        self.memory = Memory(self.context.ctx, observer)
        self.vocabulary = Vocabulary(llama_cpp.llama_model_get_vocab(self.model))

    @property
    def metadata(self) -> Mapping[str, str]:
        return metadata(self.model)

    @property
    def cells(self) -> int:
        """Tokens that the memory holds, of all sequences together; llama.cpp rounds it up."""
        return int(llama_cpp.llama_n_ctx(self.context.ctx))

    @property
    def wants_equal(self) -> bool:
        """A step of unequal numbers of tokens would be cut: a state is computed token by token."""
        asked: tuple[Any, ...] = (
            llama_cpp.llama_model_is_recurrent,
            llama_cpp.llama_model_is_hybrid,
        )
        return any(ask(self.model) for ask in asked)

    def close(self) -> None:
        self._stack.close()

    def abandon(self) -> None:
        """In a forked child: nothing is freed any more, which would wait for threads."""
        _ABANDONED.append(self._stack.pop_all())


_ABANDONED: list[contextlib.ExitStack] = []
