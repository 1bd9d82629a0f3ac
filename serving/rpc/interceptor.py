"""What every call passes first and last: keys, messages that are none, errors as status codes, and the access log."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from chameleon_jax.errors import (
    DeadlineExceeded,
    Draining,
    DuplicateRequest,
    EngineDead,
    Forbidden,
    QueueFull,
    RequestFailed,
    ServingError,
    Unauthenticated,
)
from chameleon_jax.serving.service.service import Service

logger = logging.getLogger(__name__)
access = logging.getLogger("chameleon_jax.access")

CODES: dict[type[Exception], grpc.StatusCode] = {
    DuplicateRequest: grpc.StatusCode.ALREADY_EXISTS,  # a ValueError too
    ValueError: grpc.StatusCode.INVALID_ARGUMENT,
    KeyError: grpc.StatusCode.NOT_FOUND,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Draining: grpc.StatusCode.UNAVAILABLE,
    EngineDead: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    RequestFailed: grpc.StatusCode.ABORTED,  # the call as a whole may be tried again, the same server may fail it again
}
RETRY_AFTER = (("retry-after", "1"),)
"""Seconds, with RESOURCE_EXHAUSTED and UNAVAILABLE."""

MAX_DETAILS = 1000
"""Bytes of an error's text. It may quote what the client sent, travels in a trailer, where a byte may need three, and clients
refuse trailers from 8 KiB on."""

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""What a client may call its request."""

PACKAGE = "/chameleon.v1."
ADMIN = ("LoadLora", "UnloadLora")

notes: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("notes")
"""What the access log is to say of the call under way."""


class _NoMessage:
    """In place of a message whose bytes are none."""


class Edge(grpc.aio.ServerInterceptor):
    """Wraps the methods of this project's services; health and reflection pass as they are, and are open to all."""

    def __init__(self, service: Service):
        self._service = service

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(PACKAGE):
            return handler
        name = method.rpartition("/")[2]
        parse = _tolerant(handler.request_deserializer)
        if handler.response_streaming:

            async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
                async with (
                    self._call(name, request, context),
                    contextlib.aclosing(handler.unary_stream(request, context)) as out,
                ):
                    async for message in out:
                        yield message

            return grpc.unary_stream_rpc_method_handler(stream, parse, handler.response_serializer)

        async def unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._call(name, request, context):
                return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(unary, parse, handler.response_serializer)

    @contextlib.asynccontextmanager
    async def _call(self, name: str, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        metadata = {str(key): value for key, value in context.invocation_metadata() or ()}
        given = getattr(request, "request_id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"rpc-{uuid.uuid4().hex}"
        log: dict[str, Any] = {"request_id": request_id, "method": name}
        notes.set(log)
        begin, status = time.monotonic(), grpc.StatusCode.OK
        try:
            try:
                self._service.check_access(_text(metadata.get("authorization")), admin=name in ADMIN)
                if isinstance(request, _NoMessage):
                    raise ValueError("the message cannot be parsed; allowed: that of chameleon.v1")
                yield
            except (ServingError, ValueError, KeyError) as error:
                status = next(code for kind, code in CODES.items() if isinstance(error, kind))
                text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
                retry = status in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
                await context.abort(status, _shortened(text), RETRY_AFTER if retry else ())
            except grpc.aio.AbortError:
                raise
            except (asyncio.CancelledError, GeneratorExit):  # the client is gone: while it waited, or between two messages
                status = grpc.StatusCode.CANCELLED
                raise
            except Exception:
                status = grpc.StatusCode.INTERNAL
                logger.exception("a call failed", extra={"request_id": request_id})
                await context.abort(status, "internal error")
        finally:
            access.info("call", extra={**log, "status": status.name, "seconds": round(time.monotonic() - begin, 4)})


def _tolerant(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """grpc calls what cannot be parsed an internal error; it is the client's."""

    def tolerant(data: bytes) -> Any:
        try:
            return parse(data)
        except Exception:  # of protobuf's implementation
            return _NoMessage()

    return tolerant


def _shortened(text: str) -> str:
    data = text.encode(errors="replace")
    return text if len(data) <= MAX_DETAILS else data[:MAX_DETAILS].decode(errors="ignore") + "…"


def _text(value: str | bytes | None) -> str | None:
    return value.decode("latin-1") if isinstance(value, bytes) else value
