"""The gRPC server: the services of chameleon.v1, health and reflection on one port."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages
from chameleon_jax.serving.rpc import chameleon_v1_pb2_grpc as stubs
from chameleon_jax.serving.rpc.control import Control
from chameleon_jax.serving.rpc.health import Health
from chameleon_jax.serving.rpc.inference import Inference
from chameleon_jax.serving.rpc.interceptor import RpcInterceptor
from chameleon_jax.serving.service.server_config import ServerConfig
from chameleon_jax.serving.service.service import Service

SERVICES = tuple(service.full_name for service in messages.DESCRIPTOR.services_by_name.values())
HEALTH_POLL_S = 0.25


class RpcServer:
    """The gRPC server.

    Attributes:
        port: Bound port. 0 until `start` returns.
    """

    def __init__(self, service: Service):
        self.port = 0
        self._service = service
        self._health = Health(SERVICES)
        self._server: grpc.aio.Server | None = None
        self._watchdog: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen and answer calls. Raises OSError for a port that is taken or a certificate that cannot be read."""
        config = self._service.config
        self._server = server = grpc.aio.server(interceptors=[RpcInterceptor(self._service)], options=_options(config))
        stubs.add_InferenceServicer_to_server(Inference(self._service), server)
        stubs.add_ControlServicer_to_server(Control(self._service), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"{host}:{config.grpc_port}"
        try:
            if config.tls_cert is None or config.tls_key is None:
                self.port = server.add_insecure_port(address)
            else:
                pair = (Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes())
                self.port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except RuntimeError as error:
            text = f"cannot listen on {address} for gRPC"
            if config.tls_cert is not None:  # grpc reports one error for all three
                text += f", or tls_cert {config.tls_cert!r} and tls_key {config.tls_key!r} are no pair"
            raise OSError(text) from error
        await server.start()
        self._watchdog = asyncio.create_task(self._watch_engine())

    async def set_not_serving(self) -> None:
        """Report NOT_SERVING in health checks. Calls are still answered."""
        self._health.set_not_serving()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls and end the server. Args: grace_s: time for running calls to finish, in seconds."""
        if self._watchdog is not None:
            self._watchdog.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watchdog
        self._health.end_watches()
        if self._server is not None:
            await self._server.stop(grace_s)

    async def _watch_engine(self) -> None:
        while self._service.llm.error is None:
            await asyncio.sleep(HEALTH_POLL_S)
        await self.set_not_serving()


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    """Channel options. Pings find clients that are gone; clients may ping every 10 s, even without a running call."""
    return [
        ("grpc.max_receive_message_length", config.max_body_bytes),
        ("grpc.max_metadata_size", config.max_header_bytes),
        ("grpc.max_concurrent_streams", config.max_connections),
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]
