"""Opens a model's files: reads the layout, then validates it."""

from __future__ import annotations

from pathlib import Path

from .layout import ModelLayout
from .layout_bundle import read_bundle
from .layout_gguf import read_gguf
from .validate import validate

# --- reading ------------------------------------------------------------------------------------


def read_layout(path: Path) -> ModelLayout:
    """Lay out the model that starts in this file, or is this bundle; every fault is a UserError.

    What comes back was validated; whether llama.cpp survives it is for a trial to tell.
    """
    layout = read_bundle(path) if path.is_dir() else read_gguf(path)
    validate(layout)
    return layout
