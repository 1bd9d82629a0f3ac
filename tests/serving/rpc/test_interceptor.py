"""Texts of errors, and records of calls in the access log."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from types import SimpleNamespace

import grpc
import pytest

from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages
from chameleon_jax.serving.rpc import chameleon_v1_pb2_grpc as stubs
from chameleon_jax.serving.rpc.interceptor import RpcInterceptor
from chameleon_jax.serving.service.server_config import ServerConfig
from tests.serving.conftest import make_service
from tests.serving.rpc.calls import Code, asked, refused
from tests.serving.running import TIMEOUT, running

OWN_ID = re.compile("rpc-[0-9a-f]{32}")


@pytest.fixture
def logged(caplog):
    """Find the access-log records of a method. Waits for them, as some are written after the answer."""
    caplog.set_level(logging.INFO, "chameleon_jax.access")

    def find(method: str) -> list[logging.LogRecord]:
        end = time.monotonic() + TIMEOUT
        while not (found := [record for record in caplog.records if getattr(record, "method", None) == method]):
            assert time.monotonic() < end
            time.sleep(0.01)
        return found

    return find


@pytest.mark.parametrize("error", [ValueError, KeyError])
@pytest.mark.parametrize(("text", "short"), [("x", "x" * 1000), ("é", "é" * 500), ("😀", "😀" * 250), ("\n", "\n" * 1000)])
def test_long_texts_are_cut(inference, shared_llm, monkeypatch, error, text, short):
    async def fails(*args, **kwargs):
        raise error(text * 100_000)

    monkeypatch.setattr(shared_llm, "open_all", fails)
    for method in (inference.Generate, inference.GenerateStream):
        found = refused(method, asked())
        assert found.code() is (Code.INVALID_ARGUMENT if error is ValueError else Code.NOT_FOUND)
        assert found.details() == short + "…"


@pytest.mark.parametrize("given", ["", "mine-1"])
def test_the_log_has_the_id_of_the_request(inference, logged, given):
    request = asked(2)
    request.request_id = given
    answered = inference.Generate(request, timeout=TIMEOUT)
    (record,) = logged("Generate")
    assert record.request_id == answered.request_id and record.status == "OK" and record.completion_tokens == 2
    assert answered.request_id == given if given else OWN_ID.fullmatch(answered.request_id)


@pytest.mark.parametrize("given", ["x" * 129, "x" * 100_000, "a\nb", "é", ""])
def test_invalid_ids_are_not_logged(shared_llm, logged, given):
    config = ServerConfig(port=0, grpc_port=0, api_keys=("key",))
    with running(shared_llm, config) as server, grpc.insecure_channel(server.target) as channel:
        control = stubs.ControlStub(channel)
        request = messages.AbortRequest(request_id=given)
        assert refused(control.Abort, request).code() is Code.UNAUTHENTICATED
        assert not control.Abort(request, timeout=TIMEOUT, metadata=(("authorization", "Bearer key"),)).aborted
    assert [bool(OWN_ID.fullmatch(record.request_id)) for record in logged("Abort")] == [True, True]


def test_clients_that_leave_are_logged(server, shared_llm, logged, monkeypatch):
    collect = shared_llm.engine.loop.executor.collect
    monkeypatch.setattr(shared_llm.engine.loop.executor, "collect", lambda handle: (time.sleep(0.05), collect(handle))[1])
    with grpc.insecure_channel(server.target) as channel:
        inference = stubs.InferenceStub(channel)
        stream = inference.GenerateStream(asked(100), timeout=TIMEOUT)
        next(stream)
        call = inference.Generate.future(asked(100), timeout=TIMEOUT)
        while asyncio.run(shared_llm.stats(max_age=0)).running < 2:
            assert not call.done()
    for method in ("GenerateStream", "Generate"):
        (record,) = logged(method)
        assert record.status == "CANCELLED"


def test_a_client_that_leaves_between_two_messages_is_logged(shared_llm, adapter_dir, logged):
    async def answers(request, context):
        yield "a message"
        yield "another"

    async def main():
        interceptor = RpcInterceptor(make_service(shared_llm, adapter_dir))
        details = SimpleNamespace(method="/chameleon.v1.Inference/GenerateStream")

        async def continuation(details):
            return grpc.unary_stream_rpc_method_handler(answers)

        handler = await interceptor.intercept_service(continuation, details)
        stream = handler.unary_stream(asked(), SimpleNamespace(invocation_metadata=tuple))
        assert await anext(stream) == "a message"
        await stream.aclose()

    asyncio.run(main())
    assert logged("GenerateStream")[0].status == "CANCELLED"
