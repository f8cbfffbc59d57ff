"""What went wrong, as clients read it: OpenAI's error object, never the text of a stranger's exception."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from specgen.errors import (
    ContextLengthExceeded,
    EngineClosed,
    InvalidRequest,
    OutOfPages,
    Overloaded,
    RequestFailed,
    SpecgenError,
)

_LONGEST = 1000
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,}")


class ErrorBody(msgspec.Struct):
    """OpenAI's error object. `code` is a word that programs may rely on, else the HTTP status."""

    message: str
    type: str
    param: str | None
    code: str | int


class ErrorAnswer(msgspec.Struct):
    """What every answer but 2xx holds, and the last event of a stream that failed."""

    error: ErrorBody


class ApiError(Exception):
    """An answer that is an error. `retry`: seconds after which to ask again; None: it would not help."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry = retry
        self.body = ErrorBody(_clean(message), type or _type(status), param, code or status)

    @property
    def headers(self) -> Mapping[str, str]:
        """Whether and when a client should try again; OpenAI's clients look at both."""
        if self.retry is None:
            return {"x-should-retry": "false"}
        return {"Retry-After": str(max(1, round(self.retry)))}

    def response(self) -> web.Response:
        """The answer."""
        headers = dict(self.headers) | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
        answer = web.json_response(body=self.encoded(), status=self.status, headers=headers)
        if self.status == 408:
            # What is left of the request may still be on its way.
            answer.force_close()
        return answer

    def encoded(self) -> bytes:
        """The error object as JSON."""
        return msgspec.json.encode(ErrorAnswer(self.body))


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it stands."""
    return ApiError(400, message, param=param, code=code)


def api_error(error: BaseException) -> ApiError:
    """The error that a client gets for an exception."""
    match error:
        case ApiError():
            return error
        case web.HTTPException():
            return ApiError(error.status, _HTTP.get(error.status, error.reason))
        case ContextLengthExceeded():
            return invalid(str(error), "messages" if error.param is None else error.param, "context_length_exceeded")
        case InvalidRequest():
            return invalid(str(error), error.param)
        case RecursionError():
            # Nothing here recurses but over what a request holds.
            return invalid("the request is nested too deeply")
        case EngineClosed():
            return ApiError(503, "the engine is closed", code="engine_closed", retry=None)
        case Overloaded():
            return ApiError(503, f"the server is busy: {error}", code="overloaded", retry=1)
        case RequestFailed():
            return _failed(error)
        case SpecgenError():
            return ApiError(500, f"the request failed: {type(error).__name__}", code="request_failed")
    return ApiError(500, "an internal error; the server's log has it under this answer's x-request-id", code="internal")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception says that there is no memory left, on the device or the host."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _failed(error: RequestFailed) -> ApiError:
    cause = error.__cause__
    if is_out_of_memory(cause):
        return ApiError(503, "there was not enough memory for this request", code="out_of_memory", retry=1)
    if isinstance(cause, EngineClosed):
        return api_error(cause)
    if isinstance(cause, SpecgenError):
        # What it asks for cannot be: too long for the KV pool, or every token is banned.
        return invalid(
            str(cause), code="context_length_exceeded" if isinstance(cause, OutOfPages) else "request_failed"
        )
    where = f" in {error.part}" if error.part else ""
    what = f" ({type(cause).__name__})" if cause is not None else ""
    return ApiError(500, f"the request failed on the way{where}{what}", code="request_failed")


_HTTP: Mapping[int, str] = {
    404: "there is no such path; /openapi.json lists those that there are",
    405: "this path has another method; /openapi.json tells which",
    413: "the body is too large",
    417: "the header Expect asks for what there is not; choices: 100-continue",
}
_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def _type(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def _clean(message: str) -> str:
    """A message that leaks no address and stays short, whatever a request had in it."""
    text: Any = _ADDRESS.sub("0x…", message)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
