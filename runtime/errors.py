"""The exceptions a user of moe-gguf meets, and how their sentences name options and quote the
system.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# Around an option in a sentence. Private-use characters: no text of a user's has them by accident.
_OPEN, _CLOSE = "\ue000", "\ue001"
_MENTION = re.compile(f"{_OPEN}(\\w+)(?:=([^{_CLOSE}]*))?{_CLOSE}")

Spelling = Callable[[str, str | None], str]  # (option, value or None) -> what is shown


def option(name: str, value: object = None) -> str:
    """An option in a sentence; whoever shows the sentence spells it.

    The command line says ``--low-share 0.25``, Python ``low_share=0.25``, without a value
    ``--low-share`` and ``low_share``.
    """
    return f"{_OPEN}{name}{'' if value is None else f'={value}'}{_CLOSE}"


def as_argument(name: str, value: str | None) -> str:
    """How Python says it."""
    return name if value is None else f"{name}={value}"


def spell(text: str, spelling: Spelling = as_argument) -> str:
    """A sentence as it is shown, its options spelled."""
    return _MENTION.sub(lambda match: spelling(match[1], match[2]), text)


class UserError(Exception):
    """Unusable input: one sentence that names the cause and the mend; the CLI exits with 2.

    Options in it are written with ``option``; ``str`` spells them as Python's arguments.
    """

    def __str__(self) -> str:
        return self.spelled(as_argument)

    def spelled(self, spelling: Spelling) -> str:
        return spell(super().__str__(), spelling)


class RequestError(UserError, ValueError):
    """A request to an open model that cannot be computed as it is asked; the model stays usable.

    Also a ValueError, as which llama_cpp's own methods raise what is wrong with arguments.
    ``param`` is the field of a client's request that is to be mended, if it is one.
    """

    def __init__(self, sentence: str, param: str | None = None) -> None:
        super().__init__(sentence)
        self.param = param


class ExpertReadError(OSError):
    """An expert could not be read while a layer waited for it (EIO, short read, truncated file).

    The step that needed it failed; no slot holds half an expert, and the model stays usable.
    """


def reason(error: Exception) -> str:
    """What the system says, for the middle of a sentence."""
    return (getattr(error, "strerror", None) or str(error)).lower()
