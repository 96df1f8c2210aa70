"""Why a request is not answered, as a value with the forms that clients read.

The boundary between exceptions and answers is ``refusal_of``; whoever sends the answer knows how.
"""

from __future__ import annotations

from typing import Any

from ..engine.request import EngineClosed
from ..errors import RequestError, UserError

OUR_FAULT = 500

# What kind of error a status is, to OpenAI's clients.
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    501: "not_supported_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class Refusal(Exception):
    """A request cannot be answered: one sentence, and the field it is about.

    ``retry_s`` is when to ask again, where that helps.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        code: str | None = None,
        status: int = 400,
        retry_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
        self.retry_s = retry_s

    @property
    def kind(self) -> str:
        ours = "server_error" if self.status >= OUR_FAULT else "invalid_request_error"
        return _KINDS.get(self.status, ours)

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        what = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": what}


def refusal_of(error: BaseException) -> Refusal:
    """What became of a request that raised this."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestError):
        return Refusal(str(error), error.param)
    if isinstance(error, UserError):
        return Refusal(str(error))
    if isinstance(error, EngineClosed):
        return Refusal("the server is stopping", status=503)
    return Refusal(str(error) or type(error).__name__, status=OUR_FAULT)
