"""Errors in OpenAI's form: a status and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    500: "server_error",
    501: "not_implemented_error",
    503: "overloaded_error",
}
_log = logging.getLogger(__name__)


class ApiError(Exception):
    """What a client is told.

    Attributes:
        status: of HTTP.
        message: one line that says what to do.
        param: the field that is meant.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def document(self) -> dict[str, Any]:
        """The body of the response."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.document, self.status, self.headers)


def overloaded(message: str, retry_after: float) -> ApiError:
    """503: try again in `retry_after` seconds."""
    seconds = str(max(1, round(retry_after)))
    return ApiError(503, message, code="overloaded", headers={"Retry-After": seconds})


async def show_api_error(request: Request, error: Exception) -> JSONResponse:
    """Handler of `ApiError`."""
    del request
    assert isinstance(error, ApiError)
    return error.response()


async def show_http_error(request: Request, error: Exception) -> JSONResponse:
    """Handler of the framework's own errors: unknown routes and methods."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        paths = (getattr(route, "path", "") for route in request.app.routes)
        advice = "this server has " + ", ".join(path for path in paths if "{" not in path)
    else:
        allowed = (error.headers or {}).get("Allow", "another method")  # in any order
        advice = "use " + " or ".join(sorted(allowed.split(", ")))
    message = f"{request.method} {request.url.path}: {error.detail}; {advice}"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def show_bug(request: Request, error: Exception) -> JSONResponse:
    """Handler of everything else: the log has the traceback, the client does not."""
    del request
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log has the cause").response()
