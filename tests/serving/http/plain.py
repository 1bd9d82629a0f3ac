"""Body of a plain request, and parsing of errors."""

from __future__ import annotations

import httpx

BODY = {"prompt": "love is", "max_tokens": 4, "temperature": 0}


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error
