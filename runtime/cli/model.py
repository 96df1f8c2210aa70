"""What a MODEL argument names, and opening it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import cache, child
from ..errors import UserError
from .terminal import debugging, note, quieten, warn

if TYPE_CHECKING:
    from ..llama import Llama


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
    """Open MODEL with the shared options and say on stderr what is in force."""
    from ..llama import Llama
    from ..progress import bar

    quieten()
    path = resolve(str(model))
    with bar(f"loading {path.name}") as progress:
        llama = Llama(path, recorder=recorder, progress=progress, verbose=debugging(), **options)
    if not debugging():  # a verbose model has said it
        note(llama.mode_line)
    note(llama.arena.budget.table())
    if warning := llama.arena.budget.warning():
        warn(warning)
    if llama.found.options.warm:
        note(llama.arena.warm_line())
    if llama.n_ctx() > (trained := llama.found.layout.n_ctx_train):
        warn(f"this model was trained for a context of {trained} tokens only")
    return llama
