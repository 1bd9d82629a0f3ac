"""The overhead benchmark on a small model: it asks all three ways for the same, and its table adds up."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest

from benchmarks.overhead.clients import http_client
from benchmarks.overhead.overhead import bare, make_requests, measure, table
from benchmarks.overhead.paced import pace
from chameleon_jax.serving.async_llm import AsyncLLM
from chameleon_jax.serving.service.server_config import ServerConfig
from chameleon_jax.serving.service.service import Service
from tests import reference_models as reference


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    reference.save_adapter(folder / "a", reference.CONFIGS["gqa"], 8)
    return folder


@pytest.fixture(scope="module")
def llm(engines, text_model):
    with engines.borrow(text_model, max_num_seqs=4, num_pages=200) as engine, contextlib.closing(AsyncLLM(engine)) as llm:
        yield llm


def test_three_ways_for_the_same_requests(llm, adapters):
    async def main():
        service = Service(llm, ServerConfig(port=0, grpc_port=0, adapter_dirs=(str(adapters),)))
        await service.load_named({})
        requests = make_requests(10, ["gqa", "a"], 6, 256)
        before = (await llm.stats(max_age=0)).loop.generation_tokens
        outcomes = await measure(llm, service, requests, concurrency=4, passes=1)
        assert (await llm.stats(max_age=0)).loop.generation_tokens - before == 3 * 3 * 10 * 6
        return outcomes

    closed, opened = asyncio.run(main())
    rows = {row["through"]: row for row in table(closed, opened, 60)}
    assert set(rows) == set(closed) == set(opened) == {"bare loop", "http", "grpc"}
    for (outcome,) in (*closed.values(), *opened.values()):
        assert len(outcome["ttft"]) == 10 and all(0 < t < outcome["seconds"] for t in outcome["ttft"])
    for kind in closed:
        assert rows[kind]["output tokens/s"] == round(60 / closed[kind][0]["seconds"], 1)
        assert rows[kind]["TTFT P50, ms"] == round(1e3 * float(np.median(opened[kind][0]["ttft"])), 1)
    assert rows["bare loop"]["of the bare loop"] == "1.000" and rows["bare loop"]["more, ms"] == 0


@pytest.mark.parametrize(
    ("sent", "match"),
    [
        (b'data: {"error": {"message": "the engine is dead"}}\n\n', "the engine is dead"),
        (b'data: {"choices": []}\n\n', "the stream broke off"),
    ],
)
def test_a_stream_that_fails_is_not_measured(sent, match):
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"%x\r\n%b\r\n" % (len(sent), sent))
        writer.close()

    async def main():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            ask = http_client(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
            async for _ in ask({"lora": "a", "prompt_token_ids": [1], "max_tokens": 1}):
                pass

    with pytest.raises(RuntimeError, match=match):
        asyncio.run(main())


def test_a_device_that_is_only_waited_for(llm, adapters):
    """The paced executor takes the place of the device until the next restart, so this test is the last."""
    requests = make_requests(10, ["gqa", "a"], 6, 256)
    timed = [request | {"at": 0.01 * i} for i, request in enumerate(requests)]

    async def main():
        if "a" not in await llm.list_loras():
            await llm.add_lora("a", str(adapters / "a"))
        await llm.call(lambda engine: pace(engine, 0.005))
        closed = await llm.call(lambda engine: bare(engine, requests, 4, "gqa"))
        return closed, await llm.call(lambda engine: bare(engine, timed, 10, "gqa"))

    closed, opened = asyncio.run(main())
    assert closed["seconds"] > 3 * 6 * 0.005  # ten requests, four at a time: three rounds of six tokens
    assert len(opened["ttft"]) == 10 and min(opened["ttft"]) >= 0.005 and opened["seconds"] > 0.09
