"""What a server tells its operator on stderr: failures that are not a client's, and calls."""

from __future__ import annotations

import sys
import traceback

from ..api.refusal import OUR_FAULT, Refusal
from ..errors import UserError
from ..text import LINE_LIMIT, shown

_EXPECTED = (UserError, OSError, RuntimeError, Refusal)


def note(text: str) -> None:
    print(shown(f"moe-gguf: {text}", LINE_LIMIT), file=sys.stderr, flush=True)


def failed(error: BaseException, refusal: Refusal) -> None:
    """Tell of a failure that is ours; one that nobody foresaw with where it happened."""
    if refusal.status != OUR_FAULT:
        return
    where = ""
    if not isinstance(error, _EXPECTED):
        frame = traceback.extract_tb(error.__traceback__)[-1:]
        where = "".join(f" ({one.filename}:{one.lineno})" for one in frame)
    note(f"error: {type(error).__name__}: {error}{where}")
