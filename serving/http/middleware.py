"""What every HTTP request passes first and last: its id, its size, room for it, its line in the access log, and errors nobody
expected."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chameleon_jax.serving.http.errors import ApiError

logger = logging.getLogger(__name__)
access = logging.getLogger("chameleon_jax.access")

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Edge:
    """ASGI middleware. `scope["state"]` gets `request_id`, and a dict `log` for what the access log is to say."""

    def __init__(self, app: ASGIApp, max_body_bytes: int):
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"], state["log"] = request_id, {}
        begin, status, num_bytes = time.monotonic(), 0, 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._too_large()
            return message

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            refused = self._refused(scope, headers)
            if refused is not None:
                await _answer(named, refused)
            else:
                await self._app(scope, counted, named)
        except Exception:
            logger.exception("a request failed", extra={"request_id": request_id})
            if status == 0:
                await _answer(named, ApiError(500, "internal error"))
        finally:
            seconds = round(time.monotonic() - begin, 4)
            extra = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            access.info("request", extra={**extra, "seconds": seconds, **state["log"]})

    def _refused(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        if scope["state"].get("above_limit") and not scope["path"].startswith("/health"):
            return ApiError(503, "the server has as many connections as it serves; try again")
        encoding = headers.get(b"content-encoding", b"identity").lower()
        if encoding != b"identity":
            return ApiError(415, f"content-encoding is {encoding[:40]!r}; allowed: identity", param="content-encoding")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is too large; allowed: {self._max_body_bytes} bytes")


async def _answer(send: Send, error: ApiError) -> None:
    content = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), **(error.headers or {})}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status_code, "headers": raw})
    await send({"type": "http.response.body", "body": content})
