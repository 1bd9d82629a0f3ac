"""Bodies that are invalid, too large or of another content type."""

from __future__ import annotations

import contextlib
import json

import httpx
import pytest

from tests.serving.http.plain import BODY, error_of


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "body"),
        (b"{", "JSON"),
        (b"[]", "[]"),
        (b'"x"', "'x'"),
        (b"null", ""),
        (b'{"prompt": "\xff"}', "body"),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b'{"prompt": NaN}', "prompt"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"prompt": "x", "temperature": Infinity}', "temperature"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}", ""),
        (b'{"prompt": "x", "top_k": 99999999999999999999}', "top_k"),
        (b'{"prompt": "x", "max_tokens": true}', "max_tokens"),
        (b'{"prompt": "x", "max_tokens": "4"}', "max_tokens"),
        (b'{"prompt": "x", "nonsense": 1}', "nonsense is not a field"),
        (b'{"prompt": "x", "' + b"nonsense" * 1000 + b'": 1}', "nonsense"),
        (b'{"prompt": "x", "\\ud800": 1}', "is not a field"),
        (b'{"prompt": "x", "stream": true, "stream_options": {"nonsense": 1}}', "stream_options.nonsense is not a field"),
        (b'{"prompt": []}', "prompt"),
        (b'{"prompt": [[]]}', "prompt"),
        (b'{"prompt": [1, "a"]}', "prompt"),
        (b'{"prompt": [256]}', "256"),
        (b'{"prompt": [-1]}', "-1"),
        (b'{"prompt": ["a"' + b', "a"' * 20 + b"]}", "21"),
        (b'{"prompt": ""}', "empty"),
        (b'{"prompt": {"a": 1}}', "prompt"),
        (b"[" * 100_000, ""),
        (b'{"prompt": ' + b"[" * 100_000, ""),
    ],
)
def test_invalid_bodies(http, content, match):
    response = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400 and match in error_of(response)["message"]
    assert len(response.content) < 3000


@pytest.mark.parametrize(
    ("content_type", "named"),
    [
        (None, "content-type is missing"),
        ("", "content-type is ''"),
        ("application/x-www-form-urlencoded", "content-type is 'application/x-www-form-urlencoded'"),  # curl -d
        ("text/plain; charset=utf-8", "content-type is 'text/plain; charset=utf-8'"),
        ("multipart/form-data; boundary=x", "multipart/form-data"),
        ("application/jsonl", "application/jsonl"),
        ("x" * 1000, "content-type is 'xxx"),
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
)
def test_bodies_of_other_content_types(http, path, content_type, named):
    headers = {} if content_type is None else {"content-type": content_type}
    response = http.post(path, content=json.dumps(BODY), headers=headers)
    error = error_of(response)
    assert response.status_code == 415 and error["param"] == "content-type" and len(response.content) < 500
    assert named in error["message"] and "allowed: application/json" in error["message"]


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
        "application/x+json",
    ],
)
def test_types_of_bodies_that_are_json(http, content_type):
    response = http.post("/v1/completions", content=json.dumps(BODY), headers={"content-type": content_type})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("field", "value"), [("n", "%s"), ("max_tokens", "%s"), ("seed", "%s"), ("prompt", "[%s]"), ("stop_token_ids", "[%s]")]
)
def test_errors_are_short(http, field, value):
    body = json.dumps(BODY | {field: "here"}).replace('"here"', value % ("9" * 4000))  # almost as many digits as Python parses
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and len(error_of(response)["message"]) <= 1000


def test_large_bodies(http, server):
    most = server.service.config.max_body_bytes
    response = http.post("/v1/completions", content=b" " * (most + 1))
    assert response.status_code == 413 and str(most) in error_of(response)["message"]
    assert response.headers["connection"] == "close"

    def pieces():
        for _ in range(most // 65536 + 2):
            yield b" " * 65536

    with contextlib.suppress(httpx.WriteError):  # the answer may arrive before the client has sent everything
        assert http.post("/v1/completions", content=pieces()).status_code == 413  # no content-length
    prompt = json.dumps(BODY | {"prompt": "x" * (most - 200)}).encode()
    response = http.post("/v1/completions", content=prompt, headers={"content-type": "application/json"})
    assert response.status_code == 400 and "characters" in error_of(response)["message"]


def test_encoded_bodies_are_refused(http):
    response = http.post("/v1/completions", content=b"\x1f\x8b" + b"\0" * 50, headers={"content-encoding": "gzip"})
    assert response.status_code == 415 and "identity" in error_of(response)["message"]
