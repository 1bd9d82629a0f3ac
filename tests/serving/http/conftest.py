"""HTTP clients of the server."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.serving.running import TIMEOUT, Running


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=TIMEOUT) as client:
        yield client


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT) as client:
        yield client


@pytest.fixture
def no_spaces(served) -> dict[str, int]:
    """A bias against whitespace, which a random model would write without an end wherever JSON allows it."""
    backend = served.llm.tokenizer.backend
    return {
        str(i): -100 for i in range(backend.get_vocab_size()) if not backend.decode([backend.token_to_id("a"), i])[1:].strip()
    }
