"""The typed clients: the same behaviour, sync and async, and retries while the server is unavailable."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import re
import socket
import subprocess
import sys
import threading
import time

import grpc
import pytest

from chameleon_jax.errors import (
    DeadlineExceeded,
    DuplicateRequest,
    Forbidden,
    QueueFull,
    RequestFailed,
    Unauthenticated,
    Unavailable,
)
from chameleon_jax.sampling_params import SamplingParams, StructuredOutputsParams
from chameleon_jax.serving.client import AsyncClient, Client
from chameleon_jax.serving.client.channel import Attempts
from chameleon_jax.serving.service.server_config import ServerConfig
from tests.serving.running import TIMEOUT, running

GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=1)
LONG = SamplingParams(temperature=0, max_tokens=100)


@pytest.fixture
def client(server):
    with Client(server.target, timeout=TIMEOUT) as client:
        yield client


def test_clients_import_no_engine():
    code = "import sys, chameleon_jax.serving.client; assert not {'jax', 'flax', 'fastapi', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=TIMEOUT)


def test_structured_outputs_and_adjusted_logits_by_both_clients(served):
    """The text is that of the Python API."""
    bias = {served.llm.tokenizer.backend.token_to_id("▁Paris"): 4.0}
    asked = [
        {"structured_outputs": StructuredOutputsParams(json={"enum": ["Paris", 7]})},
        {"structured_outputs": StructuredOutputsParams(regex="[0-9]{3}-[a-c]{2}")},
        {"structured_outputs": StructuredOutputsParams(choice=["red", "deep sea blue"])},
        {"structured_outputs": StructuredOutputsParams(grammar='start: "(" start ")" | "x"')},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.5, "logit_bias": bias},
        {"allowed_token_ids": list(range(5, 30))},
    ]
    params = [SamplingParams(seed=1, max_tokens=20, **fields) for fields in asked]

    async def main() -> tuple[list[str], list[str]]:
        async with AsyncClient(served.target, timeout=TIMEOUT) as client:
            texts = [(await client.generate("The capital of", one)).text for one in params]
        own = [[output async for output in served.llm.generate("The capital of", one)][-1].outputs[0].text for one in params]
        return texts, own

    texts = [served.rpc.generate("The capital of", one).text for one in params]
    assert (texts, texts) == asyncio.run(main())
    assert texts[0] in ('"Paris"', "7") and texts[2] in ("red", "deep sea blue") and set(texts[3]) <= set("(x)")
    assert re.fullmatch("[0-9]{3}-[a-c]{2}", texts[1]) and len(set(texts)) == len(texts)


def test_a_language_that_cannot_be_compiled_is_an_invalid_argument(served):
    wrong = SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "objct"}))
    with pytest.raises(ValueError, match="structured_outputs: json is .* it cannot be compiled: Invalid type: objct"):
        served.rpc.generate("x", wrong)


def test_prompt_logprobs(client):
    asked = dataclasses.replace(GREEDY, prompt_logprobs=2)
    whole = client.generate("love is", asked, lora_name="a1")
    *parts, last = client.stream("love is", asked, lora_name="a1")
    assert whole.prompt_logprobs == last.prompt_logprobs and all(part.prompt_logprobs is None for part in parts)
    first, *rest = whole.prompt_logprobs
    assert first is None and [next(iter(p.values())).decoded_token for p in rest] == list("ove is")
    assert all(2 <= len(position) <= 3 for position in rest)
    assert client.generate("love is", GREEDY, lora_name="a1").prompt_logprobs is None


def test_sync_and_async_clients_agree(server, client):
    whole = client.generate("love is", GREEDY, lora_name="a1")
    parts = list(client.stream("love is", GREEDY, lora_name="a1", request_id="mine"))
    assert "".join(part.text for part in parts) == whole.text and {part.request_id for part in parts} == {"mine"}
    assert [p for part in parts for p in part.logprobs] == whole.logprobs and len(whole.logprobs) == 12
    assert (parts[-1].finish_reason, parts[-1].completion_tokens, whole.prompt_tokens) == ("length", 12, 7)
    assert all(part.finish_reason is None for part in parts[:-1]) and whole.total_s >= whole.first_token_s > 0

    async def main():
        async with AsyncClient(server.target, timeout=TIMEOUT) as other:
            assert (await other.generate("love is", GREEDY, lora_name="a1")).token_ids == whole.token_ids
            assert "".join([part.text async for part in other.stream("love is", GREEDY, lora_name="a1")]) == whole.text
            assert await other.get_load() == client.get_load()
            assert [lora.content_hash for lora in await other.list_loras()] == [
                lora.content_hash for lora in client.list_loras()
            ]
            assert not await other.load_lora("live", "a0") and await other.load_lora("live", "a0")
            assert not await other.load_lora("live", "a1", pinned=True) and not client.load_lora("live", "a2")
            assert [lora.pinned for lora in client.list_loras() if "live" in lora.lora_names] == [True]
            for load in (other.load_lora, functools.partial(asyncio.to_thread, client.load_lora)):
                with pytest.raises(ValueError, match="lora_name is 'live', which has other content"):
                    await load("live", "a0", load_inplace=False)  # type: ignore[call-arg]
            await other.unload_lora("live")
            assert await other.get_model_info() == client.get_model_info() and await other.is_serving()
            assert not await other.abort("nobody")
            with pytest.raises(KeyError, match="live"):
                await other.unload_lora("live")

    asyncio.run(main())
    assert client.is_serving() and not client.abort("nobody")


def test_token_ids_and_reasons_to_stop(client, shared_llm):
    ids = shared_llm.tokenizer.encode("love is")
    whole = client.generate(ids, GREEDY)
    assert whole.text == client.generate("love is", GREEDY).text and client.generate("x").completion_tokens == 16
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[whole.token_ids[3]])
    assert client.generate(ids, params).stop_reason == whole.token_ids[3]
    assert (
        client.generate(ids, SamplingParams(temperature=0, max_tokens=12, stop=whole.text[4:6])).stop_reason == whole.text[4:6]
    )


@pytest.mark.parametrize(
    ("ask", "error", "match"),
    [
        (lambda c: c.generate(""), ValueError, "prompt is empty"),
        (lambda c: c.generate([]), ValueError, "prompt is empty"),
        (lambda c: c.generate([-1]), ValueError, "-1|range"),
        (lambda c: c.generate("x", lora_name="nobody"), KeyError, "nobody"),
        (lambda c: list(c.stream("x", lora_name="nobody")), KeyError, "nobody"),
        (lambda c: c.load_lora("x", "/etc"), ValueError, "may be loaded"),
        (lambda c: c.generate("x", SamplingParams(seed=2**63)), ValueError, "range|9223372036854775808"),
        (lambda c: c.generate("love is", LONG, timeout=0.001), DeadlineExceeded, "(?i)deadline|longer"),
    ],
)
def test_errors_are_those_of_the_python_api(client, ask, error, match):
    with pytest.raises(error, match=match):
        ask(client)


def test_leaving_a_stream_ends_the_request(server, client, shared_llm):
    stream = client.stream("love is", LONG)
    next(stream)
    stream.close()

    async def main():
        async with AsyncClient(server.target, timeout=TIMEOUT) as other:
            async with contextlib.aclosing(other.stream("love is", LONG)) as stream:
                await anext(stream)
            while (await shared_llm.stats(max_age=0)).running:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), TIMEOUT))


class Flaky(grpc.GenericRpcHandler):
    """Handler that fails its first calls, after `first` messages each, and answers later ones with a message or a code."""

    def __init__(
        self,
        code: grpc.StatusCode,
        failures: int,
        first: int = 0,
        retry_after: str | None = None,
        then: grpc.StatusCode | None = None,
    ):
        self.calls, self._code, self._failures, self._first, self._retry_after = 0, code, failures, first, retry_after
        self._then = then

    def service(self, details):
        return grpc.unary_stream_rpc_method_handler(self._answer)

    def _answer(self, request, context):
        self.calls += 1
        yield from [b""] * self._first
        if self.calls <= self._failures:
            if self._retry_after is not None:
                context.set_trailing_metadata((("retry-after", self._retry_after),))
            context.abort(self._code, "for a test")
        if self._then is not None:
            context.abort(self._then, "for a test")
        yield b""


@contextlib.contextmanager
def served(handler, port: int = 0):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads, handlers=[handler])
        port = server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


def both(target: str, **options) -> list:
    """Read one stream with each client."""

    async def stream():
        async with AsyncClient(target, **options) as client:
            return [part async for part in client.stream("x")]

    with Client(target, **options) as client:
        return [list(client.stream("x")), asyncio.run(stream())]


def test_unavailable_calls_are_retried():
    for failures in (0, 2):
        flaky = Flaky(grpc.StatusCode.UNAVAILABLE, failures)
        with served(flaky) as target, Client(target, timeout=TIMEOUT, retries=2) as client:
            assert len(list(client.stream("x"))) == 1 and flaky.calls == failures + 1
    flaky = Flaky(grpc.StatusCode.UNAVAILABLE, 10**9, retry_after="0")
    with served(flaky) as target:
        with pytest.raises(Unavailable, match="for a test"):
            both(target, timeout=TIMEOUT, retries=2)
        assert flaky.calls == 3


@pytest.mark.parametrize(
    ("code", "retry_after", "error"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "0", QueueFull),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, None, ValueError),
        (grpc.StatusCode.ABORTED, None, RequestFailed),
        (grpc.StatusCode.ALREADY_EXISTS, None, DuplicateRequest),
        (grpc.StatusCode.UNAUTHENTICATED, None, Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, None, Forbidden),
    ],
)
def test_other_errors_are_not_retried(code, retry_after, error):
    flaky = Flaky(code, 1, retry_after=retry_after)
    with served(flaky) as target, Client(target, timeout=TIMEOUT) as client, pytest.raises(error):
        list(client.stream("x"))
    assert flaky.calls == 1


def test_streams_are_not_retried_after_their_first_part():
    flaky = Flaky(grpc.StatusCode.UNAVAILABLE, 1, first=1)
    with served(flaky) as target, Client(target, timeout=TIMEOUT) as client:
        stream = client.stream("x")
        next(stream)
        with pytest.raises(Unavailable):
            next(stream)
    assert flaky.calls == 1


def test_too_large_messages_are_value_errors(server, client):
    prompt = "x" * (server.service.config.max_body_bytes + 1)
    with pytest.raises(ValueError, match="larger"):
        client.generate(prompt)

    async def main():
        async with AsyncClient(server.target, timeout=TIMEOUT) as other:
            await other.generate(prompt)

    with pytest.raises(ValueError, match="larger"):
        asyncio.run(main())


def unload(target: str, **options) -> None:
    with Client(target, timeout=TIMEOUT, **options) as client:
        client.unload_lora("x")


def unload_async(target: str, **options) -> None:
    async def main():
        async with AsyncClient(target, timeout=TIMEOUT, **options) as client:
            await client.unload_lora("x")

    asyncio.run(main())


@pytest.mark.parametrize("unload", [unload, unload_async])
def test_unloading_accepts_that_an_earlier_attempt_succeeded(unload):
    flaky = Flaky(grpc.StatusCode.UNAVAILABLE, 1, retry_after="0", then=grpc.StatusCode.NOT_FOUND)
    with served(flaky) as target:
        unload(target)
        assert flaky.calls == 2
        with pytest.raises(KeyError):
            unload(target)
        assert flaky.calls == 3


@pytest.mark.parametrize("unload", [unload, unload_async])
def test_a_server_that_starts_after_the_first_attempt_is_reached(monkeypatch, unload):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    flaky = Flaky(grpc.StatusCode.UNAVAILABLE, 0)
    with contextlib.ExitStack() as stack:

        def pause_or_raise(attempts, error, pause_or_raise=Attempts.pause_or_raise):
            if not attempts.again:
                stack.enter_context(served(flaky, port))
            return pause_or_raise(attempts, error)

        monkeypatch.setattr(Attempts, "pause_or_raise", pause_or_raise)
        unload(f"127.0.0.1:{port}", retries=2)
        assert flaky.calls == 1


def test_calls_wait_for_a_server_that_starts_later(shared_llm, adapter_dir):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with Client(f"127.0.0.1:{port}", retries=0, timeout=TIMEOUT) as client, pytest.raises(Unavailable):
        client.get_load()
    answers = []

    def ask():
        with Client(f"127.0.0.1:{port}", retries=50, timeout=TIMEOUT) as client:
            answers.append(client.generate("love is", GREEDY).completion_tokens)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.3)
    with running(shared_llm, ServerConfig(port=0, grpc_port=port)):
        asking.join(TIMEOUT)
    assert answers == [12]


def test_attempts_end_with_the_timeout():
    class Lost(grpc.RpcError):
        def code(self):
            return grpc.StatusCode.UNAVAILABLE

        def details(self):
            return "lost"

        def trailing_metadata(self):
            return (("retry-after", "3"),)

    with pytest.raises(Unavailable, match="lost"):
        Attempts(5, timeout=1.0).pause_or_raise(Lost())  # the timeout would have passed by then
    assert Attempts(5, timeout=None).pause_or_raise(Lost()) >= 1.5
    with pytest.raises(Unavailable, match="lost"):
        Attempts(0, timeout=None).pause_or_raise(Lost())
