"""Requests that are too large, too slow or never end, and clients that do not read, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import uvicorn
import uvloop

from chameleon_jax.serving.http import connection, lingering

LIMIT = 4096
LARGE = 16 << 20
"""Bytes, more than the buffers of both ends hold."""


async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def early(scope, receive, send):
    """Application that answers before it reads anything."""
    await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


class Patient:
    """Application that begins its answer, and ends it when `end` is set or the client disconnects."""

    def __init__(self):
        self.begun, self.end, self.gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, scope, receive, send):
        while (message := await receive()).get("more_body"):
            pass
        if message["type"] == "http.request":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
            self.begun.set()
            gone = asyncio.ensure_future(receive())
            ended = asyncio.ensure_future(self.end.wait())
            await asyncio.wait({gone, ended}, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            ended.cancel()
            if self.end.is_set():
                await send({"type": "http.response.body", "body": b"last"})
                return
        self.gone.set()


class Silent(uvicorn.Server):
    port: int

    @contextlib.contextmanager
    def capture_signals(self):
        yield

    async def main_loop(self) -> None:  # uvicorn's own looks at `should_exit` every 0.1 s
        await self.on_tick(0)
        while not self.should_exit:
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(app) -> AsyncIterator[Silent]:
    """Run a server. Its `port` is the bound one."""
    settings = connection.uvicorn_settings(LIMIT, 100)
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1, **settings)
    server = Silent(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    server.port = server.servers[0].sockets[0].getsockname()[1]
    yield server
    server.should_exit = True
    await task


@contextlib.asynccontextmanager
async def connected(server: Silent) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    yield reader, writer
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def without_connections(server: Silent) -> None:
    while server.server_state.connections or server.server_state.tasks:
        await asyncio.sleep(0.005)


def run(main: Callable[[], Awaitable[None]], **kwargs) -> None:
    with asyncio.Runner(**kwargs) as runner:
        runner.run(asyncio.wait_for(main(), 20))


def talk(*pieces: bytes, pause: float = 0.0) -> bytes:
    """Send pieces over one connection and return all that comes back until the server closes."""
    answers = []

    async def main() -> None:
        async with serving(app) as server, connected(server) as (reader, writer):
            answer = asyncio.create_task(reader.read())
            for piece in pieces:
                if not answer.done():  # otherwise the server has closed the connection
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(pause)
            answers.append(await answer)

    run(main)
    return answers[0]


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
        b"POST /x HTTP/1.1\r\nhost: a\r\na: " + b"x" * 3 * LIMIT,  # never ends
        b"POST /" + b"x" * 3 * LIMIT,
    ],
)
@pytest.mark.parametrize("pieces", [1, 40])
def test_a_large_head_is_refused(head, pieces):
    size = -(-len(head) // pieces)
    answer = talk(*[head[i : i + size] for i in range(0, len(head), size)], pause=0.005)
    assert answer.startswith(b"HTTP/1.1 431") and answer.count(b"HTTP/1.1") == 1


def test_invalid_http_is_refused():
    assert talk(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n").startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("pieces", [[], [b"POST /x HTTP/1.1\r\nhost: a\r\n"], [request(close=False), b"POST /y"]])
def test_a_late_head_closes_the_connection(monkeypatch, pieces):
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)
    answer = talk(*pieces, pause=0.05)  # returns, since the server closes
    assert answer.count(b"HTTP/1.1 200") == (len(pieces) == 2)


def test_the_next_head_may_be_in_pieces_with_the_end_of_a_body():
    large = request(body=b"x" * 5 * LIMIT, close=False)
    assert talk(large + request()[:40], request()[40:], pause=0.02).count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("pieces", [[b"\r\n"], [request(close=False), b"\r\n"]])
def test_line_ends_alone_time_out(monkeypatch, pieces):
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)
    assert talk(*pieces, pause=0.05).count(b"HTTP/1.1") == len(pieces) - 1


CHUNKED = b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"


def test_chunks():
    assert talk(CHUNKED + b"3\r\nabc\r\n0\r\n\r\n" + request()).count(b"HTTP/1.1 200") == 2
    assert talk(CHUNKED, *[b"1\r\nx\r\n"] * LIMIT, b"0\r\n\r\n" + request()).count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize(
    "rest",
    [
        [b"3\r\nabc\r\n0\r\nx-request-id: smuggled\r\n\r\n"],
        [b"3\r\nabc\r\n0\r\na: " + b"x" * LIMIT, *[b"x" * LIMIT] * 50],  # never ends
        [b"3\r\nabc\r\n0\r\n", *[b"a: x\r\n" * 100] * 50],
        [b"3;", *[b"x" * LIMIT] * 50],
        [b"3", *[b" " * LIMIT] * 50],
        [b"3\r\nabc\r\n", *[b"1;a=" + b"x" * 1000 + b"\r\nx\r\n"] * 50],
    ],
)
def test_framing_of_a_chunked_body_is_bounded(rest):
    answer = talk(CHUNKED, *rest, request(), pause=0.002)
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_early_answer_is_not_lost(loop_factory):
    async def main(app, head: bytes):
        async with serving(app) as server:
            async with connected(server) as (reader, writer):
                writer.write(b"POST /x HTTP/1.1\r\nhost: a\r\n" + head + b"\r\n\r\n")
                await reader.readuntil(b"HTTP/1.1 ")
                for _ in range(LARGE >> 16):  # raises if the connection is reset
                    writer.write(b"fff8\r\n" + b"x" * 0xFFF8 + b"\r\n")
                    await writer.drain()
                answer = await reader.read()
                assert answer[:3] in (b"413", b"431") and b"\r\nconnection: close\r\n" in answer
                assert answer.endswith((b"no", b"}}"))
            await without_connections(server)

    run(lambda: main(early, b"content-length: %d" % (2 * LARGE)), loop_factory=loop_factory)
    run(lambda: main(early, b"transfer-encoding: chunked"), loop_factory=loop_factory)
    run(lambda: main(app, b"a: " + b"x" * LIMIT), loop_factory=loop_factory)


@pytest.mark.parametrize("end", ["LINGER_S", "LINGER_BYTES"])
def test_an_early_answer_to_a_client_that_does_not_end(monkeypatch, end):
    monkeypatch.setattr(lingering, end, {"LINGER_S": 0.2, "LINGER_BYTES": 1 << 20}[end])

    async def main():
        async with serving(early) as server, connected(server) as (reader, writer):
            writer.write(b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (1 << 40))
            assert (await reader.read()).endswith(b"no")
            with contextlib.suppress(ConnectionError):
                while end == "LINGER_BYTES":
                    writer.write(b"x" * 65536)
                    await writer.drain()
            await without_connections(server)

    run(main)


def test_a_late_body_is_refused(monkeypatch):
    monkeypatch.setattr(connection, "BODY_TIMEOUT_S", 0.2)
    for start in (b"content-length: 9\r\n\r\nx", b"transfer-encoding: chunked\r\n\r\n9\r\n"):
        answer = talk(b"POST /x HTTP/1.1\r\nhost: a\r\n" + start)
        assert answer.startswith(b"HTTP/1.1 408") and b"0.2 s" in answer and b"connection: close" in answer
        assert answer.count(b"HTTP/1.1") == 1


def test_a_received_body_may_be_answered_slowly(monkeypatch):
    """Slowly: later than both timeouts, also while an unread body waits behind it."""
    monkeypatch.setattr(connection, "BODY_TIMEOUT_S", 0.2)
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)

    async def main():
        for rest in (b"", request(body=b"x" * 100, close=False)[:-1]):
            patient = Patient()
            async with serving(patient) as server, connected(server) as (reader, writer):
                writer.write(request(body=b"x", close=False) + rest)
                await patient.begun.wait()
                await asyncio.sleep(0.5)
                patient.end.set()
                assert b"last" in await reader.readuntil(b"last")

    run(main)


@pytest.mark.parametrize(
    "second", [b"POST /x HTTP/1.1\r\na: " + b"x" * LIMIT + b"\r\n\r\n", b"POST /" + b"x" * LIMIT, b"\0\r\n\r\n", b"POST /y"]
)
def test_answers_never_interleave(monkeypatch, second):
    async def main():
        patient = Patient()
        async with serving(patient) as server, connected(server) as (reader, writer):
            writer.write(request(close=False))
            await patient.begun.wait()
            monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.1)
            writer.write(second)
            await asyncio.sleep(0.2)
            patient.end.set()
            answer = await reader.read()  # returns, since the server closes
            assert answer.endswith(b"5\r\nfirst\r\n4\r\nlast\r\n0\r\n\r\n") and answer.count(b"HTTP/1.1") == 1

    run(main)


def test_a_client_that_goes_away_with_requests_in_line():
    async def main():
        patient = Patient()
        async with serving(patient) as server:
            async with connected(server) as (_, writer):
                writer.write(request(close=False))
                await patient.begun.wait()
                writer.write(request(close=False) * 2)
                await asyncio.sleep(0.05)
                writer.transport.abort()
            for protocol in server.server_state.connections:  # without reads, only a write would reveal that the socket is dead
                protocol.transport.abort()
            await patient.gone.wait()
            await without_connections(server)

    run(main)


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("whole", [False, True])
def test_a_client_that_does_not_read(monkeypatch, loop_factory, whole):
    monkeypatch.setattr(lingering, "WRITE_TIMEOUT_S", 0.2)
    gone = asyncio.Event()

    async def endless(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if whole:
            await send({"type": "http.response.body", "body": b"x" * LARGE})
        else:
            writing = asyncio.ensure_future(write(send))
            while (await receive())["type"] != "http.disconnect":
                pass
            writing.cancel()
        gone.set()

    async def write(send):
        while True:
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})

    async def main():
        async with serving(endless) as server, connected(server) as (_, writer):
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(request())
            await gone.wait()
            await without_connections(server)

    run(main, loop_factory=loop_factory)


class FakeTransport:
    def __init__(self):
        self.num_waiting, self.closed, self.aborted = 0, False, False

    def write(self, data: bytes) -> None:
        self.num_waiting += len(data)

    def get_write_buffer_size(self) -> int:
        return self.num_waiting

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True


class FakeLoop:
    """Event loop whose timers run when `later` is called."""

    def __init__(self):
        self.timers: list[tuple[asyncio.TimerHandle, Callable]] = []

    def call_later(self, seconds, callback):
        self.timers.append((handle := asyncio.Handle(callback, (), self), callback))
        return handle

    def get_debug(self) -> bool:
        return False

    def later(self) -> None:
        timers, self.timers = self.timers, []
        for handle, callback in timers:
            if not handle.cancelled():
                callback()


@pytest.mark.parametrize("closing", [False, True])
def test_a_client_that_reads_slowly(closing):
    """The connection lasts as long as the client reads something, even if more is written meanwhile."""
    transport, loop = FakeTransport(), FakeLoop()
    lingering = connection.LingeringTransport(transport, loop, lambda: False)
    lingering.write(b"x" * 100)
    lingering.watch_writes()
    for _ in range(3):
        transport.num_waiting -= 10
        loop.later()
    lingering.on_writable()
    lingering.write(b"x" * 100)
    if closing:
        lingering.close()
    else:
        lingering.watch_writes()
    transport.num_waiting -= 10
    loop.later()
    assert not transport.aborted
    loop.later()
    assert transport.aborted
