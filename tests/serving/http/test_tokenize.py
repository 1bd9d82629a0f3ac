"""Prompts and conversations as token ids, and back."""

from __future__ import annotations

import asyncio

import httpx
import huggingface_hub
import pytest

from chameleon_jax.checkpoints.chat_template import ChatTemplate
from chameleon_jax.serving.service.server_config import ServerConfig
from tests import reference_models as reference
from tests.serving.conftest import CONFIG
from tests.serving.http.plain import error_of
from tests.serving.running import TIMEOUT, running

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = "user: hi\nassistant:"


def test_a_prompt_and_back(http, shared_llm):
    answer = http.post("/tokenize", json={"model": "a1", "prompt": "héllo", "return_token_strs": True}).json()
    ids = shared_llm.tokenizer.encode("héllo")
    names = [shared_llm.tokenizer.token(i) for i in ids]
    assert answer == {"count": 6, "max_model_len": 128, "tokens": ids, "token_strs": names}
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "héllo"}


def test_an_adapter_that_a_request_would_load_is_not_loaded(shared_llm, tmp_path, monkeypatch):
    """Its tokens are the base model's. Neither a hub nor a store is asked."""
    reference.save_adapter(tmp_path / "team" / "late", CONFIG, 4, seed=90)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: 1 / 0)
    allowed = dict(adapter_dirs=(str(tmp_path),), hub_adapters=("org/bard",), adapter_urls=("nostore://bucket",))
    config = ServerConfig(port=0, grpc_port=None, **allowed)
    with running(shared_llm, config) as server, httpx.Client(base_url=server.url, timeout=TIMEOUT) as http:

        def ask(model: str) -> list[int]:
            tokens = http.post("/tokenize", json={"model": model, "prompt": "hi"})
            text = http.post("/detokenize", json={"model": model, "tokens": [104, 105]})
            return [tokens.status_code, text.status_code]

        before = asyncio.run(shared_llm.list_loras())
        for model in ("team/late", "org/bard", "nostore://bucket/x"):
            assert ask(model) == [200, 200]
        for model in ("team/none", "org/other", "nostore://other/x", "../late"):
            assert ask(model) == [404, 404]
        assert asyncio.run(shared_llm.list_loras()) == before


def test_a_conversation(http, shared_llm):
    answer = http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert answer["tokens"] == shared_llm.tokenizer.encode(CHAT) and answer["token_strs"] is None
    continued = {"messages": MESSAGES, "add_generation_prompt": False, "continue_final_message": True}
    assert http.post("/tokenize", json=continued).json()["count"] == len("user: hi")


def test_special_tokens(served):
    """By default they are around a prompt, and not around a conversation, whose template adds them."""
    url = str(served.openai.base_url).removesuffix("/v1/")
    tokenizer = served.llm.tokenizer
    with httpx.Client(base_url=url, timeout=TIMEOUT) as http:
        for given in ({"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}):
            with_bos, without, default = (
                http.post("/tokenize", json=given | {"add_special_tokens": wanted}).json()["tokens"]
                for wanted in (True, False, None)
            )
            assert with_bos == [tokenizer.bos_token_id, *without]
            assert default == (with_bos if "prompt" in given else without)
        assert http.post("/detokenize", json={"tokens": [tokenizer.bos_token_id]}).json()["prompt"] == "<s>"


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/tokenize", {}, 400, "prompt is missing; allowed: either prompt or messages"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, 400, "given together with messages"),
        ("/tokenize", {"prompt": "x", "model": "nothing"}, 404, "'nothing' does not exist"),
        ("/tokenize", {"prompt": "x", "nonsense": 1}, 400, "nonsense"),
        ("/tokenize", {"messages": MESSAGES, "continue_final_message": True}, 400, "continue_final_message is set"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, 400, "--trust-request-chat-template"),
        ("/detokenize", {"tokens": [1, 256]}, 400, "tokens.1 is 256; allowed: 0 to 255"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0 is -1"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens.0 is 'a'"),
        ("/detokenize", {}, 400, "tokens is missing"),
    ],
)
def test_wrong_requests_name_the_field(http, path, body, status, error):
    response = http.post(path, json=body)
    assert response.status_code == status and error in error_of(response)["message"]


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/v1/responses", "/pooling", "/score", "/v1/score", "/rerank", "/v2/rerank"]
)
def test_routes_that_are_not_served_say_which_are(http, path):
    response = http.post(path, json={})
    error = error_of(response)
    assert response.status_code == 404 and error["type"] == "not_found_error"
    assert error["message"].startswith(f"{path} is not served; allowed: ") and "/v1/chat/completions" in error["message"]


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {}), ("/v1/chat/completions", {"max_tokens": 1})])
def test_templates_of_operator_and_client(shared_llm, monkeypatch, path, body):
    """A client's template goes before the operator's, and the operator's before the model's."""
    monkeypatch.setattr(shared_llm.tokenizer, "chat_template", ChatTemplate(None, {}))
    config = ServerConfig(port=0, grpc_port=None, chat_template="{{ messages[0].content }}!", trust_request_chat_template=True)
    with running(shared_llm, config) as server, httpx.Client(base_url=server.url, timeout=TIMEOUT) as http:

        def length(**fields: object) -> int:
            answer = http.post(path, json={"messages": MESSAGES, **body, **fields}).json()
            return answer["count"] if "count" in answer else answer["usage"]["prompt_tokens"]

        assert length() == len("hi!")
        assert length(chat_template="{{ messages[0].role }}") == len("user")
        assert length(chat_template="{{ documents[0].text }}", documents=[{"text": "long text"}]) == len("long text")
        thinking = "{{ reasoning_effort }}{{ enable_thinking }}"
        assert length(chat_template=thinking, reasoning_effort="none") == len("noneFalse")
        assert length(chat_template=thinking, reasoning_effort="high") == len("highTrue")
        given = {"enable_thinking": False}
        assert length(chat_template=thinking, reasoning_effort="high", chat_template_kwargs=given) == len("highFalse")
        broken = http.post(path, json={"messages": MESSAGES, "chat_template": "\n{%"})
        assert broken.status_code == 400 and "chat_template of the request, line 2" in error_of(broken)["message"]


def test_a_continued_message_keeps_its_role(client):
    extra = {"add_generation_prompt": False, "continue_final_message": True}
    asked = dict(model="gqa", messages=MESSAGES, max_tokens=1, extra_body=extra)
    assert client.chat.completions.create(**asked).choices[0].message.role == "user"
    assert next(iter(client.chat.completions.create(**asked, stream=True))).choices[0].delta.role == "user"
