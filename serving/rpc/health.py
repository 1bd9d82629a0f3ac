"""`grpc.health.v1.Health`: the same of every service, as one engine is behind them all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """In place of grpcio's own, whose Watch ends only with its client, so that a server would have to wait for that.

    Args:
        services: full names; "" is the whole server.
    """

    def __init__(self, services: Sequence[str]):
        self._services = frozenset(["", *services])
        self._down, self._ending = asyncio.Event(), asyncio.Event()

    def set_not_serving(self) -> None:
        """For good: a server that is about to stop, or whose device is lost, does not come back."""
        self._down.set()

    def end_watches(self) -> None:
        """Each has said NOT_SERVING by its end."""
        self._down.set()
        self._ending.set()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return Response(status=Response.NOT_SERVING if self._down.is_set() else Response.SERVING)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        if request.service not in self._services:
            yield Response(status=Response.SERVICE_UNKNOWN)  # and not NOT_FOUND, says the protocol
        else:
            if not self._down.is_set():
                yield Response(status=Response.SERVING)
                await self._down.wait()
            yield Response(status=Response.NOT_SERVING)
        await self._ending.wait()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is about to stop")
