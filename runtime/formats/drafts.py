"""Which layers are in the file and not in the graph: draft layers (NextN, multi-token prediction).

They stand behind the model's own layers, guess the token after next, and are passed over by
llama.cpp unless it is asked for them: it neither reads nor computes them. So they take no slots,
no memory and no guesses, and remain readable where they lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .gguf_header import GgufHeader

_LAYER = re.compile(r"blk\.(\d+)\.")


def first_draft(metadata: GgufHeader, architecture: str, names: Iterable[str]) -> int | None:
    """The number of the first draft layer, None where there is none.

    The key alone is not believed: without the tensors that tie a draft to the model, one
    architecture (deepseek4) takes all of its layers for the model's own.
    """
    n_layers = metadata.get(f"{architecture}.block_count")
    n_drafts = metadata.get(f"{architecture}.nextn_predict_layers")
    if type(n_layers) is not int or type(n_drafts) is not int or not 0 < n_drafts < n_layers:
        return None
    first = n_layers - n_drafts
    return first if any(name.startswith(f"blk.{first}.nextn.") for name in names) else None


def is_draft(name: str, first: int | None) -> bool:
    """Whether a tensor belongs to a draft layer, given the first of them."""
    match = _LAYER.match(name)
    return first is not None and match is not None and int(match[1]) >= first
