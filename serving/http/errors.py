"""Errors as OpenAI's clients expect them: a status, and a body that names the problem and the field."""

from __future__ import annotations

import contextlib
import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from chameleon_jax.errors import InvalidValue, ServingError
from chameleon_jax.serving.service.statuses import REPORTED_ERRORS, RETRY_AFTER_S, message_of, status_of

MAX_MESSAGE_LEN = 1000
"""Characters of an error's message, which may quote the request or come from a chat template."""

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """Error of OpenAI's API. `param` is the field at fault, `code` the kind of error; either may be null."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


class ApiError(HTTPException):
    """Error to answer a request with."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(status, message, headers=_headers(status))
        self.body = error_body(status, message, param, code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message[:MAX_MESSAGE_LEN], "type": kind, "param": param, "code": code}}


def api_error(error: Exception, names: Mapping[str, str] | None = None) -> ApiError:
    """Answer for an error of one of `REPORTED_ERRORS`. Args: names: see `translate_errors`."""
    if isinstance(error, KeyError):
        return ApiError(404, message_of(error), param="model", code="model_not_found")
    code = type(error).__name__ if isinstance(error, ServingError) else None
    param = (names or {}).get(error.field) if isinstance(error, InvalidValue) else None
    return ApiError(status_of(error).http, message_of(error), param, code)


@contextlib.contextmanager
def translate_errors(names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Raise errors of the service as `ApiError`.

    Args:
        names: Names that the request has for the engine's fields.
    """
    try:
        yield
    except REPORTED_ERRORS as error:
        raise api_error(error, names) from error


def error_response(status: int, body: dict[str, Any]) -> Response:
    return Response(json.dumps(body), status, headers=_headers(status), media_type="application/json")


_PLACES = re.compile(r"body|query|path|header|str|(list\[|constrained-|function-).*")
"""Parts of pydantic's error paths that name no field: the value's origin, and which of several types was tried."""


def add_error_handlers(app: FastAPI) -> None:
    """Answer errors that FastAPI finds, such as invalid bodies, in the same form."""

    @app.exception_handler(StarletteHTTPException)
    async def answer_http_error(request: Request, error: StarletteHTTPException) -> Response:
        detail = _unserved(request) if error.status_code == 404 else str(error.detail)
        body = error.body if isinstance(error, ApiError) else error_body(error.status_code, detail)
        response = error_response(error.status_code, body)
        if error.headers and "allow" in {name.lower() for name in error.headers}:
            response.headers["allow"] = error.headers["Allow"]
        return response

    @app.exception_handler(RequestValidationError)
    async def answer_invalid_request(request: Request, error: RequestValidationError) -> Response:
        if isinstance(error.body, bytes):  # FastAPI parses only bodies of type application/json
            return _wrong_content_type(request.headers.get("content-type"))
        found = max(error.errors(), key=lambda found: len(found["loc"]))  # of several types tried, the closest match
        path = [str(part) for part in found["loc"] if not _PLACES.fullmatch(str(part))]
        unknown = found["type"] == "extra_forbidden"
        field = ".".join([*path, found["ctx"]["field"]] if unknown else path)[:200] or "the body"
        if unknown:
            message = f"{field} is not a field of this request, or is not supported"
        elif found["type"] == "json_invalid":
            message = f"the body is not JSON: {found.get('ctx', {}).get('error', '')}"
        elif found["type"] == "missing":
            message = f"{field} is missing or null"
        else:
            message = f"{field} is {reprlib.repr(found.get('input'))}; {found['msg'].removeprefix('Value error, ')}"
        return error_response(400, error_body(400, message, param=field))


def _unserved(request: Request) -> str:
    return f"{request.url.path[:200]} is not served; allowed: {', '.join(request.app.openapi()['paths'])}"


def _wrong_content_type(content_type: str | None) -> Response:
    given = "missing" if content_type is None else f"{content_type[:100]!r}"
    message = f"content-type is {given}; allowed: application/json (curl: -H 'content-type: application/json')"
    return error_response(415, error_body(415, message, param="content-type"))


def _headers(status: int) -> dict[str, str] | None:
    if status in (429, 503):
        return {"Retry-After": str(RETRY_AFTER_S)}
    return {"WWW-Authenticate": "Bearer"} if status == 401 else None
