"""Errors as OpenAI's clients expect them: a status, and a body that says what is wrong and where."""

from __future__ import annotations

import contextlib
import json
import re
import reprlib
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from chameleon_jax.errors import (
    DeadlineExceeded,
    Draining,
    EngineDead,
    Forbidden,
    QueueFull,
    RequestFailed,
    ServingError,
    Unauthenticated,
)

RETRY_AFTER_S = 1
MAX_MESSAGE_LEN = 1000
"""Characters of an error's message: it may quote the request, or come from a chat template."""

STATUS: dict[type[ServingError], int] = {
    Unauthenticated: 401,
    Forbidden: 403,
    QueueFull: 429,
    RequestFailed: 503,  # another server may have what this one cannot load
    Draining: 503,
    EngineDead: 503,
    DeadlineExceeded: 504,
}
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """`param`: the field that is wrong, where one is; `code`: the kind of error, where a client may want to know."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


class ApiError(HTTPException):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(status, message, headers=_headers(status))
        self.body = error_body(status, message, param, code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message[:MAX_MESSAGE_LEN], "type": kind, "param": param, "code": code}}


def api_error(error: Exception) -> ApiError:
    """What a caller is told of an error that the service raised; what is no such error is raised again."""
    if isinstance(error, ServingError):
        return ApiError(STATUS[type(error)], str(error), code=type(error).__name__)
    if isinstance(error, KeyError):
        return ApiError(404, str(error.args[0]), param="model", code="model_not_found")
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    raise error


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Around calls of the service: what they raise is the caller's answer."""
    try:
        yield
    except (ServingError, KeyError, ValueError) as error:
        raise api_error(error) from error


def error_response(status: int, body: dict[str, Any]) -> Response:
    return Response(json.dumps(body), status, headers=_headers(status), media_type="application/json")


_PLACES = re.compile(r"body|query|path|header|str|(list\[|constrained-|function-).*")
"""Parts of pydantic's paths that are no field: where a value was, and which of several types it was tried as."""


def add_error_handlers(app: FastAPI) -> None:
    """Has every error that FastAPI itself finds answered in the same way."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> Response:
        body = error.body if isinstance(error, ApiError) else error_body(error.status_code, str(error.detail))
        response = error_response(error.status_code, body)
        if error.headers and "allow" in {name.lower() for name in error.headers}:
            response.headers["allow"] = error.headers["Allow"]
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if isinstance(error.body, bytes):  # FastAPI has not read it as JSON
            return _other_type(request.headers.get("content-type"))
        found = max(error.errors(), key=lambda found: len(found["loc"]))  # where several types were tried, the closest
        path = [str(part) for part in found["loc"] if not _PLACES.fullmatch(str(part))]
        unknown = found["type"] == "extra_forbidden"
        field = ".".join([*path, found["ctx"]["field"]] if unknown else path)[:200] or "the body"
        if unknown:
            message = f"{field} is not a field of this request, or not one that is supported"
        elif found["type"] == "json_invalid":
            message = f"the body is not JSON: {found.get('ctx', {}).get('error', '')}"
        elif found["type"] == "missing":
            message = f"{field} is missing or null"
        else:
            message = f"{field} is {reprlib.repr(found.get('input'))}; {found['msg'].removeprefix('Value error, ')}"
        return error_response(400, error_body(400, message, param=field))


def _other_type(content_type: str | None) -> Response:
    given = "missing" if content_type is None else f"{content_type[:100]!r}"
    message = f"content-type is {given}; allowed: application/json (curl: -H 'content-type: application/json')"
    return error_response(415, error_body(415, message, param="content-type"))


def _headers(status: int) -> dict[str, str] | None:
    if status in (429, 503):
        return {"Retry-After": str(RETRY_AFTER_S)}
    return {"WWW-Authenticate": "Bearer"} if status == 401 else None
