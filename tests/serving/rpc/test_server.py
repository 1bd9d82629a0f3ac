"""Start, health and shutdown of the gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chameleon_jax import SamplingParams
from chameleon_jax.errors import EngineDead
from chameleon_jax.serving.client import Client
from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages
from chameleon_jax.serving.rpc import chameleon_v1_pb2_grpc as stubs
from chameleon_jax.serving.rpc.server import RpcServer
from chameleon_jax.serving.service.server_config import ServerConfig
from tests.serving.conftest import make_service
from tests.serving.rpc.calls import PROMPT, Code, refused
from tests.serving.running import TIMEOUT, running

Status = health_pb2.HealthCheckResponse


def test_health_and_its_end(shared_llm, adapter_dir, monkeypatch):
    with running(shared_llm, ServerConfig(port=0, grpc_port=0)) as server, grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        names = ("", "chameleon.v1.Inference", "chameleon.v1.Control")

        def statuses() -> set[int]:
            return {health.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT).status for name in names}

        assert statuses() == {Status.SERVING}
        assert refused(health.Check, health_pb2.HealthCheckRequest(service="other")).code() is Code.NOT_FOUND
        with monkeypatch.context() as patch:
            patch.setattr(shared_llm._thread, "error", EngineDead("the device is lost"))
            while statuses() != {Status.NOT_SERVING}:
                time.sleep(0.01)
            assert refused(stubs.ControlStub(channel).GetLoad, messages.GetLoadRequest()).code() is Code.UNAVAILABLE


@pytest.mark.parametrize(
    ("service", "first"), [("", Status.SERVING), ("chameleon.v1.Control", Status.SERVING), ("other", Status.SERVICE_UNKNOWN)]
)
def test_shutdown_ends_watches(shared_llm, service, first):
    with contextlib.ExitStack() as stack:
        with running(shared_llm, ServerConfig(port=0, grpc_port=0)) as server:
            health = health_pb2_grpc.HealthStub(stack.enter_context(grpc.insecure_channel(server.target)))
            watch = health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT)
            assert next(watch).status == first
        if first == Status.SERVING:
            assert next(watch).status == Status.NOT_SERVING
        with pytest.raises(grpc.RpcError) as error:
            next(watch)
        assert error.value.code() is Code.UNAVAILABLE and "about to stop" in error.value.details()


def test_running_calls_are_answered_at_shutdown(shared_llm, monkeypatch):
    begun = threading.Event()

    async def slow(name):
        begun.set()
        await asyncio.sleep(0.3)

    monkeypatch.setattr(shared_llm, "remove_lora", slow)
    with contextlib.ExitStack() as stack:
        with running(shared_llm, ServerConfig(port=0, grpc_port=0)) as server:
            control = stubs.ControlStub(stack.enter_context(grpc.insecure_channel(server.target)))
            call = control.UnloadLora.future(messages.UnloadLoraRequest(lora_name="x"), timeout=TIMEOUT)
            assert begun.wait(TIMEOUT)
        assert call.result() == messages.UnloadLoraResponse()


def test_a_port_that_is_taken(shared_llm, adapter_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = make_service(shared_llm, adapter_dir, grpc_port=port)
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port} for gRPC$"):
            asyncio.run(RpcServer(service).start())


def test_an_invalid_certificate_is_refused(shared_llm, adapter_dir, tmp_path):
    cert = tmp_path / "cert.pem"
    cert.write_text("nothing")
    service = make_service(shared_llm, adapter_dir, tls_cert=str(cert), tls_key=str(cert))
    with pytest.raises(OSError, match="tls_cert .*cert.pem.* tls_key .*cert.pem"):
        asyncio.run(RpcServer(service).start())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_tls(shared_llm, tmp_path):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(cert), "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command, *names], check=True, capture_output=True)
    config = ServerConfig(port=0, grpc_port=0, tls_cert=str(cert), tls_key=str(key))
    with running(shared_llm, config) as server:
        with Client(server.target, tls=cert, timeout=TIMEOUT) as client:
            assert client.generate(PROMPT, SamplingParams(max_tokens=3)).completion_tokens == 3
        trusted = ssl.create_default_context(cafile=str(cert))
        assert httpx.get(f"{server.url}/health", verify=trusted, timeout=TIMEOUT).status_code == 200
