"""Interceptor around every call: API keys, undecodable messages, errors as status codes, and the access log."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc.aio import ServicerContext

from chameleon_jax.serving.service.service import REQUEST_ID, Service
from chameleon_jax.serving.service.statuses import REPORTED_ERRORS, RETRY_AFTER_S, message_of, status_of
from chameleon_jax.serving.telemetry import trace_context

logger = logging.getLogger(__name__)
access = logging.getLogger("chameleon_jax.access")

MAX_DETAILS_BYTES = 1000
"""Bytes of an error's text, which may quote the request. It travels in a trailer, where a byte may take three, and clients
refuse trailers from 8 KiB on."""

PACKAGE = "/chameleon.v1."
ADMIN_METHODS = ("LoadLora", "UnloadLora")

access_fields: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("access_fields")
"""Fields of the access-log record of the current call."""


class _Undecodable:
    """Stands for a request whose bytes are no message of the expected type."""


class RpcInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of chameleon.v1. Health and reflection pass unchanged and need no key."""

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
        decode = _tolerant(handler.request_deserializer)
        if handler.response_streaming:

            async def stream(request: Any, context: ServicerContext) -> AsyncIterator[Any]:
                async with (
                    self._call(name, request, context),
                    contextlib.aclosing(handler.unary_stream(request, context)) as out,
                ):
                    async for message in out:
                        yield message

            return grpc.unary_stream_rpc_method_handler(stream, decode, handler.response_serializer)

        async def unary(request: Any, context: ServicerContext) -> Any:
            async with self._call(name, request, context):
                return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(unary, decode, handler.response_serializer)

    @contextlib.asynccontextmanager
    async def _call(self, name: str, request: Any, context: ServicerContext) -> AsyncIterator[None]:
        """Check access before a call, turn its errors into status codes, and log it."""
        metadata = {str(key): _as_text(value) for key, value in context.invocation_metadata() or ()}
        trace_context.receive(metadata)
        given = getattr(request, "request_id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"rpc-{uuid.uuid4().hex}"
        fields: dict[str, Any] = {"request_id": request_id, "method": name}
        access_fields.set(fields)
        begin, code = time.monotonic(), grpc.StatusCode.OK
        try:
            try:
                self._service.check_access(metadata.get("authorization"), admin=name in ADMIN_METHODS)
                if isinstance(request, _Undecodable):
                    raise ValueError("the message cannot be parsed; allowed: a request message of chameleon.v1")
                yield
            except REPORTED_ERRORS as error:
                code = status_of(error).grpc
                retry = code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
                trailers = (("retry-after", str(RETRY_AFTER_S)),) if retry else ()
                await context.abort(code, _shortened(message_of(error)), trailers)
            except grpc.aio.AbortError:
                raise
            except (asyncio.CancelledError, GeneratorExit):  # the client left while it waited, or between two messages
                code = grpc.StatusCode.CANCELLED
                raise
            except Exception:
                code = grpc.StatusCode.INTERNAL
                logger.exception("call failed", extra={"request_id": request_id})
                await context.abort(code, "internal error")
        finally:
            access.info("call", extra={**fields, "status": code.name, "seconds": round(time.monotonic() - begin, 4)})


def _tolerant(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Decode bad bytes as `_Undecodable`: grpc would report an internal error of the server for a fault of the client."""

    def decode_or_mark(data: bytes) -> Any:
        try:
            return decode(data)
        except Exception:  # its type depends on protobuf's implementation
            return _Undecodable()

    return decode_or_mark


def _shortened(text: str) -> str:
    data = text.encode(errors="replace")
    return text if len(data) <= MAX_DETAILS_BYTES else data[:MAX_DETAILS_BYTES].decode(errors="ignore") + "…"


def _as_text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
