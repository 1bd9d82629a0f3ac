"""Server that answers each completion at once with events made ahead, to measure the limit of a load generator.

`python -m tests.serving.cli.dummy_server PORT EVENTS` serves from a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable
from typing import Any

Answer = Callable[[dict[str, Any]], bytes]
"""Makes the bytes of an HTTP answer to the body of a request."""


def stream_of(events: list[dict[str, Any] | str], end: bytes = b"0\r\n\r\n") -> bytes:
    """Make an answer of server-sent events, each a chunk."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    lines = [f"data: {e if isinstance(e, str) else json.dumps(e)}\n\n".encode() for e in events]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in lines) + end


def completion(num_tokens: int) -> bytes:
    """Make a streamed completion of some tokens, with its usage."""
    tokens = [{"choices": [{"index": 0, "text": " word", "finish_reason": None}]} for _ in range(num_tokens)]
    usage = {"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": num_tokens}}
    return stream_of([*tokens, usage, "[DONE]"])


def plain(status: int, body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(text), text)


class Connection(asyncio.Protocol):
    """Requests of one connection, one after the other."""

    def __init__(self, answer: Answer):
        self._answer = answer
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, separator, body = self._data.partition(b"\r\n\r\n")
        length = int((re.search(rb"content-length: (\d+)", head) or [0, 0])[1])
        if not separator or len(body) < length:
            return
        self._data = b""
        self._transport.write(self._answer(json.loads(body or b"{}")))


async def start(answer: Answer, port: int = 0) -> asyncio.Server:
    return await asyncio.get_running_loop().create_server(lambda: Connection(answer), "127.0.0.1", port)


if __name__ == "__main__":
    import uvloop

    async def main(port: int, num_tokens: int) -> None:
        answer = completion(num_tokens)
        await (await start(lambda body: answer, port)).serve_forever()

    uvloop.run(main(*map(int, sys.argv[1:])))
