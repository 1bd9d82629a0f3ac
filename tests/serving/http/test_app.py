"""Deadlines, full queues, shutdown, keys and clients that disconnect, over plain HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time

import httpx
import pytest

from chameleon_jax.checkpoints.chat_template import ChatTemplate
from chameleon_jax.errors import EngineDead, QueueFull
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.serving.client import Client
from chameleon_jax.serving.service.server_config import ServerConfig
from tests.serving.http.plain import BODY, error_of
from tests.serving.running import TIMEOUT, running


def settled(llm) -> None:
    async def main():
        while (stats := await llm.stats(max_age=0)).running or stats.waiting:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), TIMEOUT))


def test_health_and_version(http):
    assert [http.get(path).status_code for path in ("/health", "/health/live", "/health/ready", "/version")] == [200] * 4


def test_a_server_without_a_chat_template_says_so_at_the_start(shared_llm, monkeypatch, caplog):
    broken = ChatTemplate("a\n{% for", {}, "chat_template.jinja")
    monkeypatch.setattr(shared_llm.tokenizer, "chat_template", broken)
    with running(shared_llm, ServerConfig(port=0, grpc_port=None)) as server:
        assert "chat completions are refused" in caplog.text and "chat_template.jinja, line 2" in caplog.text
        with httpx.Client(base_url=server.url, timeout=TIMEOUT) as http:
            assert http.post("/v1/completions", json=BODY).status_code == 200
            response = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
            assert response.status_code == 400 and "chat_template.jinja, line 2" in error_of(response)["message"]


def test_the_document_is_complete(http):
    document = http.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert {"200", "4XX", "5XX"} <= set(operation["responses"]) and "422" not in operation["responses"], path
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health/live"} <= set(document["paths"])
    assert http.get("/docs").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("GET", "/../etc/passwd", 404)],
)
def test_routes_that_are_not_there(http, method, path, status):
    response = http.request(method, path)
    assert response.status_code == status and error_of(response)


def test_long_template_errors_are_shortened(http, shared_llm, monkeypatch):
    monkeypatch.setattr(shared_llm.tokenizer, "chat_template", ChatTemplate("{{ raise_exception(messages[0].content) }}", {}))
    response = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * 5000}]})
    message = error_of(response)["message"]
    assert response.status_code == 400 and message.startswith("messages: the chat template refuses") and len(message) <= 1000


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-123", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False)]
)
def test_request_ids(http, given, kept):
    response = http.post("/v1/completions", json=BODY, headers={"x-request-id": given})
    assert (response.headers["x-request-id"] == given) is kept
    assert response.json()["id"].startswith(f"cmpl-{response.headers['x-request-id']}-")
    assert http.get("/nothing").headers["x-request-id"]


def test_one_request_id_may_be_given_to_several_at_a_time(server):
    async def main():
        async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT, headers={"x-request-id": "same"}) as http:
            answers = await asyncio.gather(*[http.post("/v1/completions", json=BODY | {"max_tokens": 50}) for _ in range(8)])
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["id"] for answer in answers}) == 8

    asyncio.run(main())


def test_the_access_log_has_model_and_token_counts(http, caplog):
    caplog.set_level(logging.INFO, "chameleon_jax.access")
    http.post("/v1/completions", json=BODY | {"model": "a1"}, headers={"x-request-id": "mine"})
    deadline = time.monotonic() + TIMEOUT
    while not (found := [r for r in caplog.records if getattr(r, "request_id", "") == "mine"]):
        assert time.monotonic() < deadline
    said = vars(found[0])
    assert (said["method"], said["path"], said["status"], said["model"]) == ("POST", "/v1/completions", 200, "a1")
    assert (said["prompt_tokens"], said["completion_tokens"]) == (7, 4) and said["seconds"] >= 0
    assert "love" not in str(said)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "1e400"])
def test_timeouts_that_are_wrong(http, value):
    response = http.post("/v1/completions", json=BODY, headers={"x-request-timeout": value})
    assert response.status_code == 400 and "x-request-timeout" in error_of(response)["message"]


def test_a_deadline(http, shared_llm):
    body = BODY | {"max_tokens": 100}
    response = http.post("/v1/completions", json=body, headers={"x-request-timeout": "0.001"})
    assert response.status_code == 504 and "longer than 0.001 s" in error_of(response)["message"]
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}, headers={"x-request-timeout": "0.001"}) as stream:
        assert stream.status_code in (200, 504)  # the deadline passes within the stream, or before it
        assert "longer than 0.001 s" in stream.read().decode()
    settled(shared_llm)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away(server, shared_llm, stream):
    """All its requests end in the engine."""
    begun = asyncio.run(shared_llm.stats(max_age=0)).loop.generation_tokens
    body = json.dumps(BODY | {"max_tokens": 100, "n": 4, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", server.server.port)) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        while asyncio.run(shared_llm.stats(max_age=0)).loop.generation_tokens == begun:
            pass
        if stream:
            assert connection.recv(20).startswith(b"HTTP/1.1 200")
    settled(shared_llm)
    assert asyncio.run(shared_llm.stats(max_age=0)).loop.generation_tokens < begun + 400
    assert shared_llm._streams == {}


def test_a_full_queue(http, shared_llm, monkeypatch):
    async def full(*args, **kwargs):
        raise QueueFull("3 requests wait (max_queue_len)")

    monkeypatch.setattr(shared_llm, "open_all", full)
    response = http.post("/v1/completions", json=BODY)
    assert response.status_code == 429 and int(response.headers["retry-after"]) > 0
    assert error_of(response)["type"] == "rate_limit_error"


def test_draining(http, shared_llm, monkeypatch):
    monkeypatch.setattr(shared_llm, "draining", True)
    for response in (
        http.get("/health"),
        http.get("/health/ready"),
        http.post("/v1/completions", json=BODY),
        http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "a0"}),
    ):
        assert response.status_code == 503 and response.headers["retry-after"] and error_of(response)["type"] == "server_error"
    assert http.get("/health/live").status_code == 200


def test_a_dead_engine(http, shared_llm, monkeypatch):
    monkeypatch.setattr(shared_llm._thread, "error", EngineDead("the device failed again: lost"))
    for path in ("/health", "/health/live", "/health/ready"):
        response = http.get(path)
        assert response.status_code == 503 and "lost" in error_of(response)["message"]
    for stream in (False, True):
        assert http.post("/v1/completions", json=BODY | {"stream": stream}).status_code == 503
    assert http.get("/v1/models").status_code == 503 and http.get("/metrics").status_code == 200


def test_unexpected_errors_hide_their_details(http, shared_llm, monkeypatch, caplog):
    async def broken(*args, **kwargs):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(shared_llm, "open_all", broken)
    response = http.post("/v1/completions", json=BODY, headers={"x-request-id": "mine"})
    assert response.status_code == 500 and "secret" not in response.text and response.headers["x-request-id"] == "mine"
    assert "secret" in caplog.text


def test_loading_keeps_a_pin_and_may_refuse_a_name_that_exists(http, shared_llm):
    def load(path: str, **fields):
        return http.post("/v1/load_lora_adapter", json={"lora_name": "policy", "lora_path": path} | fields)

    def is_pinned() -> bool:
        content = shared_llm.engine.adapters.get("policy").content_hash
        return shared_llm.engine.loop.cache.entry(content).pinned

    for path, fields, pinned in [
        ("a0", {}, False),
        ("a0", {"pinned": True}, True),
        ("a1", {}, True),
        ("a2", {"pinned": None, "load_inplace": True}, True),
        ("a1", {"pinned": False}, False),
        ("a1", {"load_inplace": False}, False),
    ]:
        assert load(path, **fields).status_code == 200 and is_pinned() is pinned
    response = load("a2", load_inplace=False)
    assert response.status_code == 400 and "lora_name is 'policy', which has other content" in error_of(response)["message"]
    assert load("a1").json()["already_loaded"]
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "policy"}).status_code == 200


def test_keys(shared_llm, adapter_dir):
    config = ServerConfig(
        port=0, grpc_port=None, api_keys=("user-key",), admin_keys=("admin-key",), adapter_dirs=(str(adapter_dir),)
    )
    load = {"lora_name": "keyed", "lora_path": "a0"}
    with running(shared_llm, config) as server, httpx.Client(base_url=server.url, timeout=TIMEOUT) as http:

        def statuses(key: str | None) -> list[int]:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            return [
                http.get("/v1/models", headers=headers).status_code,
                http.post("/v1/completions", json=BODY, headers=headers).status_code,
                http.post("/v1/chat/completions", json={}, headers=headers).status_code,
                http.get("/status.json", headers=headers).status_code,
                http.post("/v1/load_lora_adapter", json=load, headers=headers).status_code,
                http.post("/v1/unload_lora_adapter", json={"lora_name": "keyed"}, headers=headers).status_code,
            ]

        assert statuses(None) == statuses("wrong") == [401] * 6
        assert statuses("user-key") == [200, 200, 400, 200, 403, 403]
        assert statuses("admin-key") == [200, 200, 400, 200, 200, 200]
        assert http.get("/v1/models").headers["www-authenticate"] == "Bearer"
        assert [http.get(path).status_code for path in ("/health", "/version", "/metrics", "/")] == [200] * 4


def test_several_names_of_the_base_model(shared_llm):
    config = ServerConfig(port=0, grpc_port=0, served_model_name=("first", "second"))
    with (
        running(shared_llm, config) as server,
        httpx.Client(base_url=server.url, timeout=TIMEOUT) as http,
        Client(server.target) as grpc,
    ):
        cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
        assert cards["first"]["parent"] is cards["second"]["parent"] is None and cards["second"]["root"] == "first"
        assert http.get("/v1/models/second").status_code == 200
        answers = [
            http.post("/v1/completions", json=BODY | model).json() for model in ({"model": "first"}, {"model": "second"}, {})
        ]
        assert [answer["model"] for answer in answers] == ["first"] * 3
        texts = {answer["choices"][0]["text"] for answer in answers}
        texts.add(grpc.generate(BODY["prompt"], SamplingParams(temperature=0, max_tokens=4), lora_name="second").text)
        assert len(texts) == 1
        assert grpc.get_model_info().model_name == "first"
        assert 'vllm:num_requests_running{engine="0",model_name="first"}' in http.get("/metrics").text


def raw(server, request: bytes) -> bytes:
    """Send bytes and return all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.server.port), timeout=TIMEOUT) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_keys_come_before_bodies(shared_llm):
    """Without a valid key, no body is read."""
    config = ServerConfig(port=0, grpc_port=None, api_keys=("user-key",), admin_keys=("admin-key",))
    with running(shared_llm, config) as server:
        paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
        posts = [path for path, operations in paths.items() if "post" in operations]
        assert len(posts) == 6
        for path in posts:
            head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n"
            answer = raw(server, head.encode() + b"\r\n{")
            assert (
                answer.startswith(b"HTTP/1.1 401") and b"www-authenticate: Bearer" in answer and b"connection: close" in answer
            )
            if path.endswith("lora_adapter"):
                answer = raw(server, head.encode() + b"authorization: Bearer user-key\r\n\r\n{")
                assert answer.startswith(b"HTTP/1.1 403")


def test_connections_above_the_limit_are_refused(shared_llm):
    config = ServerConfig(port=0, grpc_port=None, max_connections=2)
    with running(shared_llm, config) as server, contextlib.ExitStack() as stack:
        inside = [stack.enter_context(httpx.Client(base_url=server.url, timeout=TIMEOUT)) for _ in range(2)]
        assert [client.get("/v1/models").status_code for client in inside] == [200] * 2
        response = httpx.get(f"{server.url}/v1/models")
        assert response.status_code == 503 and error_of(response)["type"] == "server_error"
        assert response.headers["retry-after"] and response.headers["connection"] == "close"
        for path in ("/health", "/health/live", "/health/ready"):
            response = httpx.get(f"{server.url}{path}")
            assert response.status_code == 200 and response.headers["connection"] == "close"
        assert [client.get("/v1/models").status_code for client in inside] == [200] * 2
        inside[0].close()
        deadline = time.monotonic() + TIMEOUT
        while httpx.get(f"{server.url}/v1/models").status_code != 200:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("path", ["../a0", "/etc", "a0/../../a0", "\0", "a9", "~", "a0\n"])
def test_adapters_outside_of_the_directories(http, path):
    response = http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
    assert response.status_code == 400 and "may be loaded" in error_of(response)["message"]
    assert "x" not in [model["id"] for model in http.get("/v1/models").json()["data"]]
