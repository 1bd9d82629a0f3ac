"""Heads of requests that are too large or never end, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import uvicorn

from chameleon_jax.serving.http import connection

LIMIT = 4096


async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


class Silent(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):
        yield


def talk(*pieces: bytes, pause: float = 0.0) -> bytes:
    """Sends the pieces over one connection, ends it, and returns everything that came back."""

    async def main() -> bytes:
        config = uvicorn.Config(app, port=0, log_config=None, access_log=False, **connection.uvicorn_settings(LIMIT))
        server = Silent(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answer = asyncio.create_task(reader.read())
        for piece in pieces:
            if not answer.done():  # else the server has closed
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause)
        await asyncio.wait([answer], timeout=20)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        server.should_exit = True
        await serving
        return answer.result()

    return asyncio.run(main())


def request(headers: bytes = b"", body: bytes = b"", close: bool = True) -> bytes:
    end = b"connection: close\r\n" if close else b""
    return b"POST /x HTTP/1.1\r\nhost: a\r\n" + headers + end + b"content-length: %d\r\n\r\n" % len(body) + body


def test_a_plain_request():
    assert talk(request()).startswith(b"HTTP/1.1 200")


def test_a_large_body_is_not_a_large_head():
    assert talk(request(body=b"x" * 5 * LIMIT)).startswith(b"HTTP/1.1 200")
    body = request(body=b"x" * LIMIT, close=False)
    assert talk(body, body[:60], body[60:-100], body[-100:] + request(), pause=0.02).count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize(
    "head",
    [
        request(b"a: " + b"x" * LIMIT + b"\r\n"),
        request(b"".join(b"a%d: x\r\n" % i for i in range(LIMIT // 4))),
        request().replace(b"/x", b"/" + b"x" * LIMIT),
        b"POST /x HTTP/1.1\r\nhost: a\r\na: " + b"x" * 3 * LIMIT,  # no end
        b"POST /" + b"x" * 3 * LIMIT,
    ],
)
@pytest.mark.parametrize("pieces", [1, 40])
def test_a_large_head_is_refused(head, pieces):
    size = -(-len(head) // pieces)
    answer = talk(*[head[i : i + size] for i in range(0, len(head), size)], pause=0.005)
    assert answer.startswith(b"HTTP/1.1 431") and answer.count(b"HTTP/1.1") == 1


def test_what_is_no_http():
    assert talk(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n").startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("pieces", [[], [b"POST /x HTTP/1.1\r\nhost: a\r\n"], [request(close=False), b"POST /y"]])
def test_a_head_that_does_not_come(monkeypatch, pieces):
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)
    answer = talk(*pieces, pause=0.05)  # returns, since the server closes
    assert answer.count(b"HTTP/1.1 200") == (len(pieces) == 2)
