"""What a MODEL argument names, and opening it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .. import cache, child
from ..errors import UserError
from .terminal import debugging, note, quieten, warn

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..llama import Llama
    from ..progress import Report

M = TypeVar("M", "Llama", "Engine")


def resolve(model: str) -> Path:
    """The file a MODEL argument names."""
    if model == "demo":
        return _demo()
    if model.startswith("hf:"):
        raise UserError("hf: models are not supported yet: download the GGUF and give its path")
    return Path(model)


def checkpoint(source: str) -> Path:
    """The file or folder a SRC argument names."""
    if not source.startswith("hf:"):
        return resolve(source)
    from ...converters.hf.hub import download

    return download(source)


def _demo() -> Path:
    """The demo model, carved by a child: the memory that takes must not count in this process."""
    command = child.command("moe_gguf", "carve-demo", str(cache.folder()))
    done = subprocess.run(command, cwd=child.FOLDER, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:  # it has told why
        sys.exit(done.returncode)
    return Path(done.stdout.rstrip("\n"))


def open_llama(model: str | Path, *, recorder: Any = None, **options: Any) -> Llama:
    """Open MODEL with the shared options as llama_cpp's class, and say what is in force."""
    from ..llama import Llama

    return _opened(Llama, model, recorder=recorder, **options)


def open_engine(model: str | Path, *, recorder: Any = None, **options: Any) -> Engine:
    """Open MODEL with the shared options, for one sequence at a time, whose state is not kept, and
    no conversations unless they say otherwise, and say what is in force. ``watch`` hears of the
    progress too."""
    from ..engine.engine import Engine

    single = {"parallel": 1, "score_rows": 1, "kept": 0, "chat": False}
    return _opened(Engine, model, recorder=recorder, **{**single, **options})


def _opened(
    kind: Callable[..., M], model: str | Path, *, watch: Report | None = None, **options: Any
) -> M:
    from ..progress import bar

    quieten()
    path = resolve(str(model))
    with bar(f"loading {path.name}") as report:

        def progress(done: float, total: float) -> None:
            report(done, total)
            if watch is not None:
                watch(done, total)

        opened = kind(path, progress=progress, verbose=debugging(), **options)
    if not debugging():  # a verbose model has said it
        note(opened.mode_line)
    note(opened.arena.budget.table())
    if warning := opened.arena.budget.warning():
        warn(warning)
    if opened.found.options.warm:
        note(opened.arena.warm_line())
    n_ctx = opened.n_ctx() if callable(opened.n_ctx) else opened.n_ctx
    if n_ctx > (trained := opened.found.layout.n_ctx_train):
        warn(f"this model was trained for a context of {trained} tokens only")
    return opened
