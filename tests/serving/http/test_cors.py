"""Pages of other origins in a browser: preflights, answers, streams and errors."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from chameleon_jax.serving.service.server_config import ServerConfig
from tests.serving.http.plain import BODY
from tests.serving.running import TIMEOUT, running

ORIGIN = "https://app.example"
KEY = {"authorization": "Bearer key"}


@pytest.fixture(scope="module")
def browser(shared_llm) -> Iterator[httpx.Client]:
    """Sends what a page of an allowed origin does."""
    config = ServerConfig(port=0, grpc_port=None, api_keys=("key",), allowed_origins=(ORIGIN,), max_body_bytes=4096)
    with (
        running(shared_llm, config) as server,
        httpx.Client(base_url=server.url, timeout=TIMEOUT, headers={"origin": ORIGIN}) as client,
    ):
        yield client


def preflight(client: httpx.Client, **headers: str) -> httpx.Response:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    return client.options("/v1/completions", headers=asked | headers)


def test_a_preflight_needs_no_key(browser):
    response = preflight(browser)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "authorization" in response.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in response.headers


def test_a_preflight_of_another_origin_is_refused(browser):
    response = preflight(browser, origin="https://other.example")
    assert response.status_code == 400 and "access-control-allow-origin" not in response.headers


def test_answers_and_streams_can_be_read(browser):
    response = browser.post("/v1/completions", json=BODY, headers=KEY)
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == ORIGIN
    assert response.headers["access-control-expose-headers"] == "x-request-id, retry-after"
    with browser.stream("POST", "/v1/completions", json=BODY | {"stream": True}, headers=KEY) as stream:
        assert stream.headers["access-control-allow-origin"] == ORIGIN
        assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/v1/completions", BODY, {}, 401),
        ("/v1/completions", BODY | {"model": "a9"}, KEY, 404),
        ("/nothing", BODY, KEY, 404),
        ("/v1/completions", BODY | {"prompt": "x" * 5000}, KEY, 413),
        ("/v1/completions", BODY | {"max_tokens": -1}, KEY, 400),
    ],
)
def test_errors_can_be_read(browser, path, body, headers, status):
    response = browser.post(path, json=body, headers=headers)
    assert response.status_code == status and response.json()["error"]["message"]
    assert response.headers["access-control-allow-origin"] == ORIGIN


def test_unexpected_errors_can_be_read(browser, shared_llm, monkeypatch):
    async def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(shared_llm, "open_all", broken)
    response = browser.post("/v1/completions", json=BODY, headers=KEY)
    assert response.status_code == 500 and response.headers["access-control-allow-origin"] == ORIGIN


def test_no_page_of_another_origin_reads_answers_unless_allowed(http):
    response = http.post("/v1/completions", json=BODY, headers={"origin": ORIGIN})
    assert response.status_code == 200 and "access-control-allow-origin" not in response.headers
    assert preflight(http, origin=ORIGIN).status_code == 405
