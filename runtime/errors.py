"""The two exceptions a user of moe-gguf meets, and how they quote the system."""

from __future__ import annotations


class UserError(Exception):
    """Unusable input: one sentence that names the cause and the mend; the CLI exits with 2."""


class ExpertReadError(OSError):
    """An expert could not be read while a layer waited for it (EIO, short read, truncated file).

    The step that needed it failed; no slot holds half an expert, and the model stays usable.
    """


def reason(error: Exception) -> str:
    """What the system says, for the middle of a sentence."""
    return (getattr(error, "strerror", None) or str(error)).lower()
