"""ASGI middleware around every request: its id, limits, access log and unexpected errors; and HEAD answered as GET."""

from __future__ import annotations

import logging
import time
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chameleon_jax.serving.http.errors import ApiError, error_response
from chameleon_jax.serving.service.service import REQUEST_ID
from chameleon_jax.serving.telemetry import trace_context

logger = logging.getLogger(__name__)
access = logging.getLogger("chameleon_jax.access")


class RequestMiddleware:
    """Refuse requests above the server's limits, answer unexpected errors, and log each request once.

    Sets `request_id` in `scope["state"]`, and `log`, a dict whose entries become fields of the access-log record.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int):
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._max_body_bytes)
        trace_context.receive(Headers(scope=scope))
        state = scope.setdefault("state", {})
        state["request_id"], state["log"] = exchange.request_id, {}
        begin = time.monotonic()
        try:
            refusal = exchange.refusal()
            if refusal is not None:
                await exchange.answer(refusal)
            else:
                await self._app(scope, exchange.receive, exchange.send)
        except Exception:
            logger.exception("request failed", extra={"request_id": exchange.request_id})
            if exchange.status == 0:
                await exchange.answer(ApiError(500, "internal error"))
        finally:
            seconds = round(time.monotonic() - begin, 4)
            fields = {"request_id": exchange.request_id, "method": scope["method"], "path": scope["path"]}
            access.info("request", extra={**fields, "status": exchange.status, "seconds": seconds, **state["log"]})


class _Exchange:
    """One request and its response, measured as their messages pass.

    Attributes:
        request_id: Client's own id where it is valid, else a new one.
        status: Status sent. 0 until then.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body_bytes: int):
        self._scope, self._receive, self._send = scope, receive, send
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._max_body_bytes = max_body_bytes
        self._num_bytes = 0
        given = self._headers.get(b"x-request-id", b"").decode("latin-1")
        self.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.status = 0

    def refusal(self) -> ApiError | None:
        """Error known from the request's head alone."""
        if self._scope["state"].get("above_limit") and not self._scope["path"].startswith("/health"):
            return ApiError(503, "too many connections; retry later")
        encoding = self._headers.get(b"content-encoding", b"identity").lower()
        if encoding != b"identity":
            return ApiError(415, f"content-encoding is {encoding[:40]!r}; allowed: identity", param="content-encoding")
        length = self._headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            return self._too_large()
        return None

    async def receive(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_body_bytes:
            raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
        await self._send(message)

    async def answer(self, error: ApiError) -> None:
        await error_response(error.status_code, error.body)(self._scope, self._receive, self.send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is too large; allowed: {self._max_body_bytes} bytes")


class HeadAsGet:
    """Answer HEAD, which load balancers use for health checks, wherever GET is answered: the same head without a body."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, send_without_body)
