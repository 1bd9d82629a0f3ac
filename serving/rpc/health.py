"""`grpc.health.v1.Health`: one status for all services, as one engine serves them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc
from grpc.aio import ServicerContext
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest as Request
from grpc_health.v1.health_pb2 import HealthCheckResponse as Response


class Health(health_pb2_grpc.HealthServicer):
    """Health service whose watches the server can end. A watch of grpcio's own service lasts as long as its client stays.

    Args:
        services: Full names of the services. The empty name, for the whole server, is added.
    """

    def __init__(self, services: Sequence[str]):
        self._services = frozenset(["", *services])
        self._down, self._ending = asyncio.Event(), asyncio.Event()

    def set_not_serving(self) -> None:
        """Report NOT_SERVING from now on. Final: neither a stopping server nor a dead engine comes back."""
        self._down.set()

    def end_watches(self) -> None:
        """End all watches, each after a last NOT_SERVING."""
        self._down.set()
        self._ending.set()

    async def Check(self, request: Request, context: ServicerContext) -> Response:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return Response(status=Response.NOT_SERVING if self._down.is_set() else Response.SERVING)

    async def Watch(self, request: Request, context: ServicerContext) -> AsyncIterator[Response]:
        if request.service not in self._services:
            yield Response(status=Response.SERVICE_UNKNOWN)  # the protocol asks for this instead of NOT_FOUND
        else:
            if not self._down.is_set():
                yield Response(status=Response.SERVING)
                await self._down.wait()
            yield Response(status=Response.NOT_SERVING)
        await self._ending.wait()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is about to stop")
