"""``moe_gguf.Llama``: llama_cpp.Llama whose routed experts live on disk and in slots.

Every method is the base class's. Only four things differ: how the model is opened, that each step
is metered and told to the plugin, what happens when a step fails, and ``stats()``.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp._internals as internals
import llama_cpp._logger
import llama_cpp.llama_chat_format as llama_chat_format
import llama_cpp.llama_cpp as bindings

from ..policies.base import Phase
from ..policies.presets import PolicyMaker
from . import arena as arenas
from . import logs, opening
from .arena import Arena, RouterReader
from .controller import Recorder
from .errors import UserError, option
from .grammar.grammar import Grammar, Processor, check_chat, longest_texts
from .handlers import LateFormatter
from .opening import Found, Loaded, check_adapter
from .options import Options
from .params import n_ctx_of
from .progress import Report
from .routers import read_routers
from .stats import Meter, Step
from .system import physical_cores
from .vocab import check_bias, guard, metadata

# llama_cpp.Llama has no hook for opening a model, so its loader function is replaced while one of
# ours is constructed. Other threads' stock models go on through the original.
_LOADER_LOCK = threading.Lock()

# What a forked child must neither use nor free: threads are not forked, and freeing waits for them.
_OPEN: weakref.WeakSet[Llama] = weakref.WeakSet()
_ABANDONED: list[contextlib.ExitStack] = []


class Llama(llama_cpp.Llama):
    """A Mixture-of-Experts GGUF inside a memory budget, with llama.cpp's own tokens.

    Takes every argument of llama_cpp.Llama and, by name, every field of ``Options``: ``memory``, a
    size ("4GiB", bytes) or "auto", covers the whole process; ``policy`` names what stays in memory
    (see ``moe_gguf.policies.presets``); ``reads`` is auto, direct or buffered; ``lanes`` the number
    of reader threads (None: measured); ``experts_used`` overrides how many experts each token uses
    (lossy); ``table_rows`` says where embedding tables are: resident in memory, on disk, or auto;
    ``warm`` fills the slots before the first token with what was popular in the runs that
    ``moe-gguf trace --save-routing`` recorded. Of a bundle with a low copy, ``low_share`` is the
    share of a prompt's votes whose experts, the least popular ones, are read low, and
    ``low_on_miss`` has generation read its misses low (both lossy, see
    ``moe_gguf.policies.precision``). ``n_ctx`` may also be None: the model's own, at most 4096.
    ``use_mmap``, ``use_mlock`` and ``n_gpu_layers`` have no meaning here.

    ``make_policy`` takes the place of a named policy; ``routers`` is where the native gates'
    routers come from; ``recorder`` hears of every route event; ``progress`` of the bytes read while
    opening.

    Raises UserError for files and budgets that cannot work, ExpertReadError from any method that
    computes when an expert cannot be read; the model stays usable after either a read error or
    an interrupt.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        make_policy: PolicyMaker | None = None,
        routers: RouterReader = read_routers,
        recorder: Recorder | None = None,
        progress: Report | None = None,
        n_ctx: int | None = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        use_mmap: bool = False,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()  # so that close() works if opening fails
        given: dict[str, Any] = {
            "make_policy": make_policy,
            "routers": routers,
            "recorder": recorder,
        }
        self._arguments = {
            "model_path": model_path,
            **given,
            "n_ctx": n_ctx,
            "n_threads": n_threads,
            "n_threads_batch": n_threads_batch,
            "verbose": verbose,
            **kwargs,
        }
        options = Options.taken_from(kwargs)
        _check_arguments(kwargs)
        llama_cpp._logger.set_verbose(verbose)
        if kwargs.get("lora_path"):
            options = _with_adapter(options)
        self.found, kwargs["kv_overrides"] = _found(
            Path(model_path), options, kwargs.get("kv_overrides")
        )
        if lora := kwargs.get("lora_path"):
            check_adapter(Path(lora), self.found.layout)
            kwargs["lora_path"] = _FilePath(os.fspath(lora))
        self._sampled: int | None = None
        self._grammar: Processor | None = None
        self._longest: list[str] | None = None  # texts of tokens, once a grammar asks
        n_threads = n_threads or physical_cores()
        kwargs["n_threads"], kwargs["n_threads_batch"] = n_threads, n_threads_batch or n_threads
        kwargs["n_ctx"], kwargs["verbose"] = n_ctx_of(self.found.layout, n_ctx), verbose
        try:
            with self._loader(progress) as loaded, logs.capture():
                super().__init__(_FilePath(os.fspath(model_path)), use_mmap=False, **kwargs)
            self.arena = arenas.start(loaded.model, progress=progress, **given)
        except BaseException:
            self.close()
            raise
        self._vocabulary = guard(self._model)
        loaded.after.append(self.arena.close)
        self.found = self.arena.found
        self._steps = _Steps(self.arena, self._ctx)
        self._finalizer = weakref.finalize(self, self._stack.close)  # lanes are joined at exit
        _OPEN.add(self)
        if verbose:
            print(self.mode_line, file=sys.stderr)

    def __getstate__(self) -> dict[str, Any]:
        """What it was opened with: a copy, or what is unpickled, opens the model once more."""
        return dict(self._arguments)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def abandon(self) -> None:
        """In a forked child: forget how to free anything. ``close`` and exit then do nothing, and
        computing raises UserError."""
        self._finalizer.detach()
        for stack in (
            self._stack,
            self._model._exit_stack,
            self._ctx._exit_stack,
            self._batch._exit_stack,
        ):
            _ABANDONED.append(stack.pop_all())

    @contextlib.contextmanager
    def _loader(self, progress: Report | None) -> Iterator[_Opening]:
        """While this is open, the base class's constructor opens the model our way."""
        original = bindings.llama_model_load_from_file
        opened = _Opening()

        def load(path: bytes, params: Any) -> Any:
            if path != self.model_path.encode() or hasattr(self, "_model"):
                return original(path, params)
            # The stack is LIFO: context and model go first, then the plugin, then what it used.
            self._stack.callback(opened.close_rest)
            n_outputs = self._limit_outputs()
            context_params = self._planned_context()
            binding, measured = opening.bound(self.found, params, context_params, n_outputs)
            self._stack.callback(binding.close)
            opened.model = opening.load(measured, binding, params, progress)
            return opened.model.model

        def tell(model: Any) -> dict[str, str]:
            return metadata(model.model)

        with _LOADER_LOCK, contextlib.ExitStack() as replaced:
            for owner, name, ours in (
                (bindings, "llama_model_load_from_file", load),
                (internals.LlamaModel, "metadata", tell),
                (llama_chat_format, "Jinja2ChatFormatter", LateFormatter),
            ):
                replaced.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, ours)
            yield opened

    def _limit_outputs(self) -> int:
        """Rows of logits that the base class keeps; llama.cpp is told where it is only one."""
        if not (self._logits_all or self.context_params.embeddings):
            # Only the last token's logits are ever read: without this llama.cpp reserves graph
            # memory for a whole batch of them (300 MB with a vocabulary of 150k).
            self.context_params.n_outputs_max = 1
        params = self.context_params
        return int(params.n_ctx + params.n_batch) if self._logits_all else 1

    def _planned_context(self) -> Any:
        """The context parameters the base class is about to use."""
        params = llama_cpp.llama_context_params.from_buffer_copy(self.context_params)
        if params.embeddings:
            params.n_seq_max = min(self.n_batch, llama_cpp.llama_max_parallel_sequences())
            params.kv_unified = True
        return params

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """The base class's; a grammar is applied by ours, which masks the same candidates."""
        given, self._grammar = kwargs.pop("grammar", None), None
        if given is not None:
            if self._longest is None:
                self._longest = longest_texts(self._vocabulary)
            self._grammar = Processor(
                Grammar(self._vocabulary, self._longest, given._grammar, given._root)
            )
            processors = [*(kwargs.get("logits_processor") or ()), self._grammar]
            kwargs["logits_processor"] = llama_cpp.LogitsProcessorList(processors)
        return super()._init_sampler(*args, **kwargs)

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        """The base class's."""
        check_bias(self._vocabulary, kwargs.get("logit_bias"))
        return super().create_completion(*args, **kwargs)

    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        """The base class's."""
        check_chat(kwargs)
        return super().create_chat_completion(*args, **kwargs)

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """The base class's."""
        self._sampled = int(super().sample(*args, **kwargs))
        if self._grammar is not None:
            self._grammar.accept(self._sampled)
        return self._sampled

    def eval(self, tokens: Sequence[int], phase: Phase | None = None) -> None:
        """The base class's; ``phase`` says what these tokens are.

        Left out, they are a continuation if they begin with what ``sample`` returned last, and a
        prompt otherwise.
        """
        self._vocabulary.check(tokens)
        sampled, self._sampled = self._sampled, None
        if phase is None:
            continues = sampled is not None and len(tokens) > 0 and tokens[0] == sampled
            phase = Phase.DECODE if continues else Phase.PREFILL
        self._steps.phase = phase
        try:
            super().eval(tokens)
        finally:
            self._steps.phase = Phase.PREFILL

    def interrupt(self, error: Exception) -> None:
        """From any thread: every step fails with ``error`` from now on, the running one too."""
        self.arena.interrupt(error)

    def stats(self) -> dict[str, Any]:
        """Counters since opening or ``reset_stats``; the names are the same everywhere."""
        return self._steps.meter.table()

    def reset_stats(self) -> None:
        self._steps.meter.reset()

    @property
    def last_step(self) -> Step | None:
        """The newest step that was computed, for a timeline of it."""
        return self._steps.meter.last_step

    @property
    def mode_line(self) -> str:
        """One line on what is in force: model, budget, reads, policy, device."""
        return self.arena.mode_line()


class _FilePath(str):
    """A path for C, of any bytes: the base class would have it in UTF-8."""

    def encode(self, *_: object) -> bytes:
        return os.fsencode(str(self))


def _abandon_all() -> None:
    for llama in list(_OPEN):
        llama.abandon()


os.register_at_fork(after_in_child=_abandon_all)


def _found(
    path: Path, options: Options, overrides: Mapping[str, Any] | None
) -> tuple[Found, dict[str, Any] | None]:
    """The model, and the overrides of its metadata; experts per token are the same in both."""
    found = opening.find(path, options)
    key = f"{found.layout.architecture}.expert_used_count"
    overrides = dict(overrides or {})
    asked = overrides.get(key)
    if type(asked) is int and asked != found.n_used:
        if options.experts_used is not None:
            raise UserError(
                f"{option('experts_used', options.experts_used)} and kv_overrides ask for "
                "different numbers of experts: give one of them"
            )
        found = opening.find(path, replace(options, experts_used=asked))
    if found.options.experts_used is not None:
        overrides[key] = found.n_used
    return found, overrides or None


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse what would be swallowed or have no meaning; the base class takes the rest."""
    unknown = set(arguments) - set(inspect.signature(llama_cpp.Llama.__init__).parameters)
    if unknown:  # the base class swallows these, and memmory="1GB" would mean auto
        raise TypeError(f"Llama has no argument {', '.join(sorted(unknown))}")
    if arguments.get("vocab_only"):
        raise UserError("vocab_only loads no experts: open the vocabulary with llama_cpp.Llama")


def _with_adapter(options: Options) -> Options:
    """An adapter's tensors go where those of the model are, and so cannot be a table's on disk."""
    if options.table_rows == "disk":
        raise UserError(
            f"an adapter needs the model's tables in memory: leave out lora_path or "
            f"{option('table_rows', 'disk')}"
        )
    return replace(options, table_rows="resident")


class _Opening:
    """What the loader makes while the base class's constructor runs.

    ``after``: what is closed once the plugin is.
    """

    def __init__(self) -> None:
        self.model: Loaded
        self.after: list[Callable[[], None]] = []

    def close_rest(self) -> None:
        for close in self.after:
            close()


class _Steps:
    """Takes the place of a context's two computing methods: meters steps and names their failures.

    Holds no reference to its Llama, which is freed when its last reference goes.
    """

    def __init__(self, arena: Arena, context: Any) -> None:
        self.meter = Meter(arena)
        self.phase = Phase.PREFILL  # of the steps to come
        self._arena = arena
        context.decode = self._metered(context.decode)
        context.encode = self._metered(context.encode)

    def _metered(self, compute: Callable[[Any], None]) -> Callable[[Any], None]:
        def step(batch: Any) -> None:
            raw = batch.batch
            sequences = [raw.seq_id[i][0] for i in range(raw.n_tokens)]
            tokens = Counter(sequences)
            ahead, n = self._arena.ahead, raw.n_tokens
            if ahead is not None and raw.token and raw.pos:  # no token: embeddings are given
                ahead.step(raw.token[:n], raw.pos[:n], sequences)
            with self.meter.step(self.phase, tokens):
                try:
                    compute(batch)
                except RuntimeError as error:
                    # llama_decode returned a code; a positive one is about the KV cache, not ours.
                    if "returned -" not in str(error):
                        raise
                    raise self._arena.recover() from None

        return step
