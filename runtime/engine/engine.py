"""``moe_gguf.Engine``: many requests through one model, its experts on disk and in slots.

Owns nothing but the way in: opening a model for so many sequences, and what a request may say. A
thread of its own computes (``loop``).
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import llama_cpp
import llama_cpp._logger

from ...policies.presets import PolicyMaker
from .. import opening
from ..arena import Arena, RouterReader
from ..chat.templates import Prompt as Written
from ..chat.templates import Templates, room
from ..controller import Recorder
from ..errors import RequestError, UserError, option
from ..opening import Found
from ..options import Options
from ..params import n_ctx_of
from ..progress import Report
from ..routers import read_routers
from ..sizes import parse_size
from ..stats import Step
from ..text import well_formed
from . import view
from .copies import Shelf
from .generation import Generation
from .identity import identity_of
from .loop import Loop
from .model import Model, context_shape
from .observer import Observer
from .planner import SCORE_ROWS, Goal, Plan, Workload
from .planning import planned
from .request import Request, Sampling
from .schedule import Schedule
from .store import Store

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message] | Written

# Of one that is told nothing: they take turns in the memory of one, since a small group decodes
# slower than its sequences one after the other.
_AUTO_PARALLEL, _AUTO_QUANTUM = 4, 16
_KEPT_SHARE = 50  # of the budget, the part for copies of past sequences

_SAMPLING = {field.name for field in fields(Sampling)}
_REQUEST = {field.name for field in fields(Request)} - {"tokens", "sampling"}

_OPEN: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine:
    """A Mixture-of-Experts GGUF inside a memory budget, for any number of requests.

    Takes by name every field of ``Options`` (see ``moe_gguf.Llama``). ``n_ctx`` is the longest one
    sequence may get; None: the model's own, at most 4096. ``parallel`` sequences are in memory at
    once, the others wait. ``cells`` is how many tokens they hold together; left out, enough for all
    of them, or with ``parallel`` "auto" for one. ``schedule`` says how they share the steps; left
    out, all decode in every step, or with "auto" in turns. With a ``goal``, latency or throughput,
    ``planner`` chooses all three that were left out, for sequences as ``workload`` says; a model
    that was never measured on this machine then is, which takes about ten seconds, once.
    ``score_rows`` is how many tokens of prompts are scored in a step; each costs the memory of a
    row of logits. Left out, 64, or with a goal what the workload wants.

    What has been computed is not computed again for the same ``owner``. A finished sequence stays
    in memory while its cells are not needed, then as a copy in ``kept`` bytes of the budget (a
    size; "auto": a fiftieth of it), then, if there is a ``cache_dir``, on disk, in files of
    ``cache_size`` in all, from where later engines of the same model go on. ``chat`` leaves room in
    the budget for the processes that a model's chat template is run in, where it has one; without
    it no conversations are taken.

    ``make_policy``, ``routers``, ``recorder`` and ``progress`` are as in ``moe_gguf.Llama``;
    ``observer`` hears of each step and of all else that changes the context's memory.

    Raises UserError for files and budgets that cannot work. Methods may be called from any thread.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        n_ctx: int | None = None,
        parallel: int | Literal["auto"] = "auto",
        cells: int | None = None,
        schedule: Schedule | None = None,
        goal: Goal | None = None,
        workload: Workload | None = None,
        score_rows: int | None = None,
        n_threads: int | None = None,
        make_policy: PolicyMaker | None = None,
        routers: RouterReader = read_routers,
        recorder: Recorder | None = None,
        observer: Observer | None = None,
        progress: Report | None = None,
        kept: str | int = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        cache_size: str | int = "4GiB",
        chat: bool = True,
        verbose: bool = False,
        **options: Any,
    ) -> None:
        chosen = Options.taken_from(options)
        if options:
            raise TypeError(f"Engine has no argument {', '.join(sorted(options))}")
        llama_cpp._logger.set_verbose(verbose)
        found = opening.find(Path(model), chosen)
        self.n_ctx = n_ctx_of(found.layout, n_ctx)
        beside = room(found.layout.keys) if chat else 0
        self.plan: Plan | None = None
        if goal is not None and parallel != 1 and schedule is None:
            self.plan = planned(
                replace(found, total=found.total - beside),
                goal,
                n_ctx=self.n_ctx,
                parallel=None if parallel == "auto" else parallel,
                workload=workload,
                n_threads=n_threads,
                score_rows=score_rows,
            )
            parallel, cells = self.plan.n_seq_max, cells or self.plan.cells
            schedule, score_rows = self.plan.schedule, self.plan.score_rows
        elif parallel == "auto":
            parallel, cells = _AUTO_PARALLEL, cells or self.n_ctx
            schedule = schedule or Schedule(1, _AUTO_QUANTUM)
        _check_parallel(parallel)
        self.parallel = parallel  # sequences in memory at once
        schedule = schedule or Schedule(parallel)
        shape = context_shape(
            self.n_ctx,
            parallel,
            cells=cells,
            chunk=schedule.chunk,
            score_rows=score_rows or SCORE_ROWS,
            n_threads=n_threads,
        )
        kept_bytes = found.total // _KEPT_SHARE if kept == "auto" else _bytes(kept)
        self._model = Model(
            found,
            shape,
            make_policy=make_policy,
            routers=routers,
            recorder=recorder,
            observer=observer,
            progress=progress,
            kept_bytes=kept_bytes,
            beside_bytes=beside,
        )
        store = None
        if cache_dir is not None:
            identity = identity_of(self._model.found, shape)
            try:
                store = Store(Path(cache_dir), identity, _bytes(cache_size), _note)
            except BaseException:
                self._model.close()
                raise
        self.vocabulary = self._model.vocabulary
        self._chat = chat
        self._templates: Templates | None = None
        self._lock = threading.Lock()
        self._loop = Loop(
            self._model,
            schedule,
            self.n_ctx,
            Shelf(kept_bytes, store),
            store,
            self.plan.at if self.plan else None,
        )
        self._finalizer = weakref.finalize(self, self._loop.close)  # at exit too
        _OPEN.add(self)
        if verbose:
            print(self.mode_line, file=sys.stderr)

    # -- requests

    def submit(self, prompt: Prompt, **settings: Any) -> Generation:
        """Have this computed; its events come as they happen.

        ``prompt`` is text, tokens, the messages of a conversation, or what ``templates`` made of
        one. ``settings`` are the fields of ``Request`` and of ``Sampling`` by name; ``stop`` may be
        one text. A conversation's answer also ends where its template says, and what a parser of
        ``templates`` tells its parts by appears in the text. RequestError for what cannot be
        computed as it is asked.
        """
        with self._loop.using():
            request = self._request(prompt, settings)
            generation = Generation(len(request.tokens))
            generation.engine = self  # which is not closed as long as someone reads
            self._loop.submit(request, generation)
        return generation

    def _request(self, prompt: Prompt, settings: dict[str, Any]) -> Request:
        if unknown := set(settings) - _SAMPLING - _REQUEST - {"sampling"}:
            raise TypeError(f"a request has no setting {', '.join(sorted(unknown))}")
        written = self._written(prompt)
        tokens = self.encode(prompt) if written is None else list(written.tokens)
        asked = {name: settings.pop(name) for name in _SAMPLING & set(settings)}
        sampling = settings.pop("sampling", None)
        if sampling is not None and asked:
            raise TypeError("sampling and its fields exclude each other")
        if isinstance(settings.get("stop"), str):
            settings["stop"] = (settings["stop"],)
        if written is not None:
            settings["stop"] = (*settings.get("stop", ()), *written.stops)
            settings["shown"] = written.preserved | settings.get("shown", frozenset())
            settings.setdefault("constraint", written.constraint)
        request = Request(tokens=tokens, sampling=sampling or Sampling(**asked), **settings)
        self._check(request)
        return request

    def _check(self, request: Request) -> None:
        n, most = len(request.tokens), request.max_tokens
        if n == 0:
            raise RequestError("the prompt is empty: give some text")
        if n > self.n_ctx or (n == self.n_ctx and most != 0):
            raise RequestError(
                f"the prompt has {n} tokens but the context holds {self.n_ctx}: "
                f"shorten it or raise {option('n_ctx')}"
            )
        for name in ("max_tokens", "top_logprobs", "prompt_logprobs"):
            value = getattr(request, name)
            if value is not None and value < 0:
                raise RequestError(f"{name} {value} makes no sense: give 0 or more, or None")
        self.vocabulary.check(list(request.sampling.logit_bias))

    # -- text

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens that ``submit`` takes a prompt for: of text and conversations with the model's
        own start token, if it has one. Control tokens may be written in a text."""
        if isinstance(prompt, str):
            return self.tokenize(prompt)
        if (written := self._written(prompt)) is not None:
            return list(written.tokens)
        with self._loop.using():
            tokens = [int(token) for token in prompt]  # type: ignore[union-attr, arg-type]
            self.vocabulary.check(tokens)
            return tokens

    def _written(self, prompt: Prompt) -> Written | None:
        """A conversation as its template writes it; None of any other prompt."""
        if isinstance(prompt, Written):
            return prompt
        if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], Mapping):
            return self.templates.apply(prompt)
        return None

    def tokenize(self, text: str, *, add_bos: bool = True, special: bool = True) -> list[int]:
        """Tokens of a text; ``special``: control tokens may be written in it."""
        with self._loop.using():
            return self.vocabulary.tokenize(well_formed(text).encode(), add_bos, special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens; ``special``: control tokens appear in it."""
        with self._loop.using():
            return self.vocabulary.text(tokens, special).decode("utf-8", "replace")

    @property
    def templates(self) -> Templates:
        """How the model writes conversations and its answers are read. RequestError where it has no
        template, or the budget no room for it."""
        with self._loop.using() as model, self._lock:
            if self._templates is None:
                if not self._chat:
                    raise RequestError(
                        f"this engine has no room for conversations: open it with {option('chat')}"
                    )
                self._templates = Templates(self.vocabulary, model.metadata)
            return self._templates

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the file says of the model, by llama.cpp's keys."""
        return self._model.metadata

    # -- what is known of it

    @property
    def arena(self) -> Arena:
        return self._model.arena

    @property
    def found(self) -> Found:
        return self._model.found

    @property
    def mode_line(self) -> str:
        """One line on what is in force: model, budget, reads, policy, device."""
        return self.arena.mode_line()

    @property
    def last_step(self) -> Step | None:
        """The newest step that was computed, for a timeline of it."""
        return self._model.meter.last_step

    def sequences(self) -> list[dict[str, Any]]:
        """Those in memory now: how far each is, for whoever watches."""
        return [
            {
                "slot": sequence.slot,
                "number": sequence.number,
                "prompt_tokens": sequence.n_prompt,
                "computed": sequence.computed,
                "generated": len(sequence.tokens) - sequence.n_prompt,
                "max_tokens": sequence.request.max_tokens,
            }
            for sequence in list(self._loop.scheduler.running)
        ]

    def stats(self) -> dict[str, Any]:
        """Counters since opening; the names are the same everywhere."""
        scheduler = self._loop.scheduler
        requests = {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            **asdict(self._loop.counts),
            "preempted": scheduler.n_preempted,
            "cells": scheduler.cells,
            "cells_used": sum(s.computed for s in list(scheduler.running)),
            **self._loop.states.stats(),
        }
        with self._loop.using() as model:
            return {
                **model.meter.table(),
                "requests": requests,
                "memory": view.memory(model.arena),
                "schedule": view.sharing(scheduler.schedule, self.plan),
            }

    def experts(self) -> dict[str, Any]:
        """Where each expert is and how much it is used, for whoever watches."""
        with self._loop.using() as model:
            return view.experts(model.arena)

    # -- the end

    def close(self) -> None:
        """End all requests with EngineClosed and free the model. Again: nothing."""
        self._finalizer()
        with self._lock:
            if self._templates is not None:
                self._templates.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def abandon(self) -> None:
        """In a forked child: nothing is computed or freed here, and waiting raises UserError."""
        self._finalizer.detach()
        self._loop.abandon()


def _bytes(size: str | int) -> int:
    return size if isinstance(size, int) else parse_size(size, "room for states")


def _note(text: str) -> None:
    print(f"moe-gguf: {text}", file=sys.stderr)


def _check_parallel(parallel: int) -> None:
    most = int(llama_cpp.llama_max_parallel_sequences())
    if not 1 <= parallel <= most:
        raise UserError(
            f"{option('parallel', parallel)} is out of range: give 1 to {most}, or auto"
        )


def _abandon_all() -> None:
    for engine in list(_OPEN):
        engine.abandon()


os.register_at_fork(after_in_child=_abandon_all)
