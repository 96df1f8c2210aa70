"""Why a request is not answered, as a value with the form that OpenAI's clients read.

The boundary between exceptions and answers is ``refusal_of``; whoever sends the answer knows how.
"""

from __future__ import annotations

from typing import Any

from ..errors import UserError

OUR_FAULT = 500


class Refusal(Exception):
    """A request cannot be answered: one sentence, and the field it is about."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        code: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
        self.kind = kind

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        what = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": what}


def refusal_of(error: BaseException) -> Refusal:
    """What became of a request that raised this."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UserError):
        return Refusal(str(error), getattr(error, "param", None))
    text = str(error) or type(error).__name__
    return Refusal(text, status=OUR_FAULT, kind="server_error")
