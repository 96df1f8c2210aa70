"""``moe_gguf.Llama``: llama_cpp.Llama whose routed experts live on disk and in slots.

Every method is the base class's. Only three things differ: how the model is opened, what happens
when a step fails, and ``stats()``.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import llama_cpp._logger
import llama_cpp.llama_cpp as bindings

from . import logs
from .controller import Recorder
from .errors import UserError
from .formats.ggml_types import pad_up
from .opening import OpenModel
from .options import Options
from .stats import Step, _Timer
from .system import physical_cores

DEFAULT_CTX = 4096

# llama_cpp.Llama has no hook for opening a model, so its loader function is replaced while one of
# ours is constructed. Other threads' stock models go on through the original.
_LOADER_LOCK = threading.Lock()


class _Planned(Exception):
    """Ends a construction that was only meant to measure."""

    def __init__(self, opened: OpenModel) -> None:
        super().__init__()
        self.opened = opened


class Llama(llama_cpp.Llama):
    """A Mixture-of-Experts GGUF inside a memory budget, with llama.cpp's own tokens.

    ``memory`` is a size ("4GiB", bytes) or "auto" and covers the whole process; ``policy`` names
    what stays in memory (see ``moe_gguf.policies.presets``); ``reads`` is auto, direct or
    buffered; ``lanes`` the number of reader threads (None: measured); ``experts_used`` overrides
    how many experts each token uses (lossy); ``warm`` fills the slots before the first token with
    what was popular in the runs that ``moe-gguf trace --save-routing`` recorded. Of a bundle with a
    low copy, ``low_share`` is the share of a prompt's votes whose experts, the least popular ones,
    are read low, and ``low_on_miss`` has generation read its misses low (both lossy, see
    ``moe_gguf.policies.precision``). ``n_ctx`` may also be None: the model's own, at most
    DEFAULT_CTX. Everything else is llama_cpp.Llama's; ``use_mmap``, ``use_mlock`` and
    ``n_gpu_layers`` have no meaning here.

    Raises UserError for files and budgets that cannot work, ExpertReadError from any method that
    computes when an expert cannot be read; the model stays usable after either a read error or
    an interrupt.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        memory: str | int = "auto",
        policy: str = "fate",
        reads: str = "auto",
        lanes: int | None = None,
        experts_used: int | None = None,
        device: str = "cpu",
        warm: bool = False,
        low_share: float = 0.0,
        low_on_miss: bool = False,
        recorder: Recorder | None = None,
        progress: Callable[[float, float], None] | None = None,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()  # so that close() works if opening fails
        unknown = set(kwargs) - set(inspect.signature(llama_cpp.Llama.__init__).parameters)
        if unknown:  # the base class swallows these, and memmory="1GB" would mean auto
            raise TypeError(f"Llama has no argument {', '.join(sorted(unknown))}")
        llama_cpp._logger.set_verbose(verbose)
        options = Options(
            memory=memory,
            policy=policy,
            reads=reads,
            lanes=lanes,
            experts_used=experts_used,
            low_share=low_share,
            low_on_miss=low_on_miss,
            device=device,
            warm=warm,
        )
        self.opened = OpenModel(Path(model_path), options)
        n_threads = kwargs.pop("n_threads", None) or physical_cores()
        kwargs.setdefault("n_threads_batch", n_threads)
        if "n_ctx" in kwargs:
            kwargs["n_ctx"] = self._n_ctx_asked(kwargs["n_ctx"])
        if experts_used is not None:
            key = f"{self.opened.layout.architecture}.expert_used_count"
            kwargs["kv_overrides"] = {**(kwargs.get("kv_overrides") or {}), key: experts_used}
        try:
            with self._loader(progress), logs.capture():
                super().__init__(
                    str(model_path), n_threads=n_threads, use_mmap=False, verbose=verbose, **kwargs
                )
            self._controller = self.opened.start(recorder, progress)
        except BaseException as error:
            self.close()
            self.opened.close()
            if isinstance(error, jinja2.TemplateError):
                raise UserError(
                    f"{model_path}: the chat template is damaged ({error}); convert the model again"
                ) from None
            raise
        self._timer = _Timer(self)
        self._finalizer = weakref.finalize(self, self._stack.close)  # lanes are joined at exit
        if verbose:
            print(self.opened.mode_line(), file=sys.stderr)

    def _n_ctx_asked(self, n_ctx: int | None) -> int:
        """A length llama.cpp takes as it is; the base class sizes its arrays by what it is told."""
        n_ctx_train = self.opened.layout.n_ctx_train
        return pad_up(n_ctx or min(n_ctx_train, DEFAULT_CTX if n_ctx is None else n_ctx_train), 256)

    _plan_only = False  # measure, then raise _Planned

    @contextlib.contextmanager
    def _loader(self, progress: Callable[[float, float], None] | None) -> Iterator[None]:
        original = bindings.llama_model_load_from_file

        def load(path: bytes, params: Any) -> Any:
            if path != self.model_path.encode() or hasattr(self, "_model"):
                return original(path, params)
            self._stack.callback(self.opened.close)  # after model and context: the stack is LIFO
            if not (self._logits_all or self.context_params.embeddings):
                # Only the last token's logits are ever read: without this llama.cpp reserves
                # graph memory for a whole batch of them (300 MB with a vocabulary of 150k).
                self.context_params.n_outputs_max = 1
            params = self.opened.model_params(params)
            self.opened.measure(params, self._planned_context(), self._logits_all)
            if self._plan_only:
                raise _Planned(self.opened)
            self.opened.divide()
            return self.opened.load(params, progress)

        with _LOADER_LOCK:
            bindings.llama_model_load_from_file = load
            try:
                yield
            finally:
                bindings.llama_model_load_from_file = original

    @classmethod
    def plan(cls, model_path: str | os.PathLike[str], **kwargs: Any) -> OpenModel:
        """What opening with the same arguments would find; no weight is read, nothing stays open.

        The result has ``needs`` and no ``budget``: whether they fit is the caller's question.
        """
        llama = cls.__new__(cls)
        llama._plan_only = True
        try:
            cls.__init__(llama, model_path, **kwargs)
        except _Planned as planned:
            return planned.opened
        raise AssertionError("a plan does not open its model")

    def _planned_context(self) -> Any:
        """The context parameters the base class is about to use."""
        params = llama_cpp.llama_context_params.from_buffer_copy(self.context_params)
        if params.embeddings:
            params.n_seq_max = min(self.n_batch, llama_cpp.llama_max_parallel_sequences())
            params.kv_unified = True
        return params

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """The base class's, which would end the process over a grammar that does not parse."""
        grammar = kwargs.get("grammar")
        if grammar is not None:
            texts = grammar._grammar.encode(), grammar._root.encode()
            with logs.capture() as log:
                sampler = llama_cpp.llama_sampler_init_grammar(self._model.vocab, *texts)
            if not sampler:
                raise ValueError(f"the grammar cannot be used: {log.reason()}")
            llama_cpp.llama_sampler_free(sampler)
        return super()._init_sampler(*args, **kwargs)

    def stats(self) -> dict[str, Any]:
        """Counters since opening or ``reset_stats``; the names are the same everywhere."""
        return self._timer.table()

    def reset_stats(self) -> None:
        self._timer.reset()

    @property
    def last_step(self) -> Step | None:
        """The newest step that was computed, for a timeline of it."""
        return self._timer.last_step

    @property
    def mode_line(self) -> str:
        """One line on what is in force: model, budget, reads, policy, device."""
        return self.opened.mode_line()
