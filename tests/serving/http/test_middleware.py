"""HEAD requests, and their line in the access log."""

from __future__ import annotations

import json
import logging
import socket
import time

import pytest

from tests.serving.running import TIMEOUT


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/health/live",
        "/health/ready",
        "/version",
        "/metrics",
        "/v1/models",
        "/v1/models/a1",
        "/",
        "/status.json",
        "/docs",
    ],
)
def test_head_is_get_without_the_body(http, path):
    got, head = http.get(path), http.head(path)
    assert head.status_code == got.status_code == 200 and head.content == b"" and got.content
    assert head.headers["content-type"] == got.headers["content-type"]
    if path not in ("/metrics", "/status.json"):  # their contents change
        assert head.headers["content-length"] == got.headers["content-length"]


@pytest.mark.parametrize(("path", "status"), [("/nothing", 404), ("/v1/completions", 405), ("/v1/models/a9", 404)])
def test_head_of_errors(http, path, status):
    head, got = http.head(path), http.get(path)
    assert head.status_code == got.status_code == status and head.content == b""
    assert head.headers.get("allow") == got.headers.get("allow")


def test_head_reports_readiness(http, shared_llm, monkeypatch):
    monkeypatch.setattr(shared_llm, "draining", True)
    assert (http.head("/health").status_code, http.head("/health/live").status_code) == (503, 200)


def test_a_connection_goes_on_after_head(server):
    """Check that no byte of a body is sent, which a client would take for the next answer."""
    with socket.create_connection(("127.0.0.1", server.server.port), timeout=TIMEOUT) as connection:
        paths = ["/health", "/metrics", "/nothing", "/v1/models", "/docs"]
        asked = "".join(f"HEAD {path} HTTP/1.1\r\nhost: a\r\n\r\n" for path in paths)
        connection.sendall(f"{asked}GET /version HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode())
        *heads, body = b"".join(iter(lambda: connection.recv(65536), b"")).decode().split("\r\n\r\n")
    statuses = [head.split(" ", 2)[1] for head in heads]
    assert statuses == ["200", "200", "404", "200", "200", "200"] and all(head.startswith("HTTP/1.1 ") for head in heads)
    assert all("content-length: " in head for head in heads) and json.loads(body)["version"]


def test_head_requests_are_logged_as_head(http, caplog):
    caplog.set_level(logging.INFO, "chameleon_jax.access")
    http.head("/health", headers={"x-request-id": "head"})
    deadline = time.monotonic() + TIMEOUT
    while not (found := [r for r in caplog.records if getattr(r, "request_id", "") == "head"]):
        assert time.monotonic() < deadline
    assert (found[0].method, found[0].path, found[0].status) == ("HEAD", "/health", 200)
