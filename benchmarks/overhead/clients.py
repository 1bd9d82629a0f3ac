"""Lean clients in a process of their own, whose work is on the machine too.

`benchmarks.overhead.overhead` starts it: `python -m benchmarks.overhead.clients TASK.json RESULT.json`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import uvloop

from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages
from chameleon_jax.serving.rpc import chameleon_v1_pb2_grpc as stubs


def http_client(target: str) -> Callable[[dict], AsyncIterator[None]]:
    """Make a client that yields once for each event of a stream.

    Connections are kept alive, and made as they are needed: a server closes idle ones.
    """
    host, _, port = target.partition(":")
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(request: dict) -> AsyncIterator[None]:
        reader, writer = idle.pop() if idle else await asyncio.open_connection(host, int(port))
        fields = {"model": request["lora"], "prompt": request["prompt_token_ids"], "max_tokens": request["max_tokens"]}
        body = json.dumps({**fields, "temperature": 0, "ignore_eos": True, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {target}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(status.decode())
        while (line := await reader.readline()) != b"0\r\n":  # the end of a chunked body
            if line.startswith(b'data: {"error"') or not line:
                writer.close()
                raise RuntimeError(line.decode() or "the stream broke off")
            if line.startswith(b"data: {"):
                yield
        await reader.readline()
        idle.append((reader, writer))

    return ask


def grpc_client(stub: stubs.InferenceStub) -> Callable[[dict], AsyncIterator[None]]:
    async def ask(request: dict) -> AsyncIterator[None]:
        sampling = messages.SamplingParams(max_tokens=request["max_tokens"], temperature=0, ignore_eos=True)
        tokens = messages.TokenIds(ids=request["prompt_token_ids"])
        message = messages.GenerateRequest(token_ids=tokens, sampling=sampling, lora_name=request["lora"])
        async for _ in stub.GenerateStream(message):
            yield

    return ask


async def main(protocol: str, target: str, requests: list[dict], concurrency: int) -> dict:
    waiting = iter(requests)
    ttft: list[float] = []

    async def client(ask: Callable[[dict], AsyncIterator[None]]) -> None:
        for request in waiting:
            due, first = time.monotonic(), None
            if "at" in request:
                due = begin + request["at"]
                await asyncio.sleep(due - time.monotonic())
            async for _ in ask(request):
                if first is None:
                    first = time.monotonic()
            assert first is not None
            ttft.append(first - due)

    async with grpc.aio.insecure_channel(target) as channel:
        stub = stubs.InferenceStub(channel)
        ask = http_client(target) if protocol == "http" else grpc_client(stub)
        begin = time.monotonic()
        await asyncio.gather(*[client(ask) for _ in range(concurrency)])
        seconds = time.monotonic() - begin
    return {"seconds": seconds, "ttft": ttft}


if __name__ == "__main__":
    task, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(uvloop.run(main(**json.loads(task.read_text())))))
