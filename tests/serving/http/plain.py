"""A request in plain HTTP, and the error in an answer."""

from __future__ import annotations

import httpx

BODY = {"prompt": "love is", "max_tokens": 4, "temperature": 0}


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error
