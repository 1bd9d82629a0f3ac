"""Defaults of a model's generation_config.json, from the file to requests of every kind."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil

import grpc
import httpx
import pytest
from typer.testing import CliRunner

from chameleon_jax import LLM, AsyncLLM, SamplingParams
from chameleon_jax.serving.cli import app
from chameleon_jax.serving.client import Client
from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages
from chameleon_jax.serving.rpc import chameleon_v1_pb2_grpc as stubs
from chameleon_jax.serving.sampling_defaults import SamplingDefaults, generation_file
from chameleon_jax.serving.service.server_config import ServerConfig
from tests.serving.async_calls import TIMEOUT, run
from tests.serving.running import running

SMALL = dict(dtype="float32", max_model_len=64, max_num_seqs=2, max_num_batched_tokens=32, num_pages=60, enable_lora=False)
GENERATION = {
    "temperature": 0.25,
    "top_k": 7,
    "top_p": 0.75,
    "min_p": 0.125,
    "max_new_tokens": 5,
    "do_sample": False,
    "eos_token_id": 255,
}
EXPECTED = {"temperature": 0.25, "top_k": 7, "top_p": 0.75, "min_p": 0.125, "max_tokens": 5}


def write(directory, **config):
    directory.mkdir(exist_ok=True)
    file = directory / "generation_config.json"
    file.write_text(json.dumps(config))
    return file


@pytest.fixture(scope="module")
def model(text_model, tmp_path_factory):
    """With sampling defaults."""
    directory = tmp_path_factory.mktemp("defaults") / "model"
    shutil.copytree(text_model, directory)
    write(directory, **GENERATION)
    return directory


def test_values_of_the_file(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = write(tmp_path, **GENERATION, repetition_penalty=1.25, max_length=20, pad_token_id=0)
    assert SamplingDefaults.read(file).values == EXPECTED | {"repetition_penalty": 1.25}
    assert [r.levelname for r in caplog.records] == ["INFO"]
    values = "temperature 0.25, top_p 0.75, top_k 7, min_p 0.125, repetition_penalty 1.25, max_tokens 5"
    assert f"sampling defaults of {file}: {values}" in caplog.text


@pytest.mark.parametrize("config", [{}, {"do_sample": True, "eos_token_id": 3}, {"temperature": None, "top_k": None}])
def test_a_file_without_any_says_nothing(config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert SamplingDefaults.read(write(tmp_path, **config)).params() == SamplingParams()
    assert not caplog.records


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temperature", "hot", "a number"),
        ("temperature", -1, "0 to 100"),
        ("temperature", True, "a number"),
        ("temperature", float("nan"), "0 to 100"),
        ("temperature", 10**400, "0 to 100"),
        ("temperature", [0.5], "a number"),
        ("top_p", 0, "above 0, at most 1"),
        ("top_p", 1.5, "above 0, at most 1"),
        ("top_p", float("inf"), "above 0, at most 1"),
        ("top_k", 50.0, "an integer"),
        ("top_k", -2, "-1 or 0 (all), or 1 and more"),
        ("top_k", 2**31, "-1 or 0 (all), or 1 and more"),
        ("top_k", False, "a number"),
        ("min_p", {}, "a number"),
        ("min_p", 2, "0 to 1"),
        ("repetition_penalty", 0, "above 0, finite"),
        ("repetition_penalty", "x", "a number"),
        ("repetition_penalty", [1], "a number"),
        ("max_new_tokens", 0, "1 or more"),
        ("max_new_tokens", "many", "an integer"),
    ],
)
def test_a_value_that_cannot_be_served_is_one_warning_and_not_used(field, value, allowed, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    good = {"top_p": 0.5} if field != "top_p" else {"top_k": 3}
    file = write(tmp_path, **good, **{field: value})
    assert SamplingDefaults.read(file).values == good
    [warning] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith(f"{file}: {field} is {str(value)[:8] if not isinstance(value, str) else repr(value)}")
    assert warning.endswith(f"is not used; allowed: {allowed}") and len(warning) < 400


@pytest.mark.parametrize("source", ["", "nowhere", "EMPTY", "FILE"])
def test_a_directory_without_the_file_is_refused(source, tmp_path):
    source = {"EMPTY": str(tmp_path), "FILE": __file__}.get(source, source)
    with pytest.raises(
        ValueError, match=r"generation_config is .*; allowed: auto, none, or a directory with generation_config"
    ):
        generation_file(source)
    with pytest.raises(ValueError, match="generation_config is"):
        LLM("tiny", load_format="dummy", generation_config=source)


def test_max_tokens_fit_behind_the_prompt():
    params = SamplingParams(max_tokens=50, temperature=0.5, stop=["x"])
    assert params.fit(10, 64) is params
    assert params.fit(60, 64) == SamplingParams(max_tokens=4, temperature=0.5, stop=["x"])
    assert params.fit(64, 64).max_tokens == params.fit(99, 64).max_tokens == 1
    with pytest.raises(ValueError, match="min_tokens is 9; allowed: 0 to max_tokens"):
        SamplingParams(max_tokens=16, min_tokens=9).fit(60, 64)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("auto", EXPECTED), ("none", {}), ("vllm", {}), ("OTHER", {"temperature": 0.5, "max_tokens": 3000})],
)
def test_prompts_without_parameters_have_the_models(make_llm, model, tmp_path, monkeypatch, source, expected):
    write(tmp_path, temperature=0.5, max_new_tokens=3000)
    with make_llm(model, **SMALL, generation_config=str(tmp_path) if source == "OTHER" else source) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(**expected)
        asked = []
        submit = llm.engine.submit
        record = lambda ids, params, *rest, **named: (asked.append(params), submit(ids, params, *rest, **named))[1]  # noqa: E731
        monkeypatch.setattr(llm.engine, "submit", record)
        mine = SamplingParams(max_tokens=2)
        llm.generate(["love", "x" * 61])
        llm.generate(["love", "hate"], [mine, None])
        llm.chat([{"role": "user", "content": "hello"}])
        llm.generate("love", mine)
        whole = SamplingParams(**expected)
        most = min(whole.max_tokens, 60)
        assert [p.max_tokens for p in asked] == [most, 3, 2, most, min(whole.max_tokens, 64 - 22), 2]
        assert asked[2] == asked[5] == mine  # as it is
        assert all(p.temperature == whole.temperature and p.top_k == whole.top_k for p in (asked[0], asked[1], asked[4]))


def test_dummy_weights_have_the_defaults_of_their_directory(make_llm, model):
    with make_llm(model, load_format="dummy", **SMALL) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(**EXPECTED)


@pytest.fixture(scope="module")
def served(engines, model):
    """A server over the model, and the parameters that its engine was given."""
    asked: list[SamplingParams] = []
    with (
        engines.borrow(model, **SMALL) as engine,
        contextlib.closing(AsyncLLM(engine)) as llm,
        pytest.MonkeyPatch.context() as patch,
    ):
        submit = engine.submit
        patch.setattr(engine, "submit", lambda ids, params, *rest: (asked.append(params), submit(ids, params, *rest))[1])
        with running(llm, ServerConfig(port=0, grpc_port=0)) as server:
            yield server, llm, asked


CHAT = {"messages": [{"role": "user", "content": "hi"}]}
NULLS = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "max_tokens"))
GIVEN = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_tokens": 8}


@pytest.mark.parametrize(("path", "body"), [("completions", {"prompt": "love"}), ("chat/completions", CHAT)])
def test_http_requests_have_the_models_defaults_where_they_say_nothing(served, path, body):
    server, _, asked = served
    for fields, expected in [
        ({}, EXPECTED),
        (NULLS, EXPECTED),
        (GIVEN, GIVEN),
        ({"temperature": 1}, EXPECTED | {"temperature": 1}),
        ({"max_tokens": 9, "top_k": 0}, EXPECTED | {"max_tokens": 9, "top_k": 0}),
        ({"n": 2, "seed": 3}, EXPECTED | {"seed": 4}),
        ({"stream": True}, EXPECTED),
        ({"min_tokens": 4}, EXPECTED | {"min_tokens": 4}),
    ]:
        response = httpx.post(f"{server.url}/v1/{path}", json=body | fields, timeout=TIMEOUT)
        assert response.status_code == 200, response.text
        assert asked[-1] == SamplingParams(**expected), fields


def test_max_tokens_that_nobody_asked_for_are_cut_to_the_context(served):
    server, llm, asked = served
    post = lambda path, body: httpx.post(f"{server.url}/v1/{path}", json=body, timeout=TIMEOUT)  # noqa: E731
    assert post("completions", {"prompt": ["x" * 62, "xyz"]}).status_code == 200
    assert sorted(p.max_tokens for p in asked[-2:]) == [2, 5]
    response = post("completions", {"prompt": "x" * 62, "max_tokens": 5})
    assert response.status_code == 400 and "62 + 5 tokens; allowed: 64" in response.text
    assert "prompt has 66 tokens; allowed: 64" in post("completions", {"prompt": "x" * 66}).text
    with Client(server.target) as client:
        assert client.generate("x" * 62).completion_tokens <= 2 and asked[-1].max_tokens == 2
    assert run(_last(llm, "x" * 62)).finished and asked[-1].max_tokens == 2


async def _last(llm, prompt, params=None):
    return [output async for output in llm.generate(prompt, params)][-1]


def test_grpc_requests_have_the_models_defaults_where_they_say_nothing(served):
    server, _, asked = served
    with grpc.insecure_channel(server.target) as channel:
        inference = stubs.InferenceStub(channel)
        for fields, expected in [
            ({}, EXPECTED),
            ({"stop": ["x"]}, EXPECTED | {"stop": ["x"]}),
            (GIVEN, GIVEN),
            ({"temperature": 0.0}, EXPECTED | {"temperature": 0.0}),
            ({"top_k": 0}, EXPECTED | {"top_k": 0}),
            ({"max_tokens": 9}, EXPECTED | {"max_tokens": 9}),
        ]:
            inference.Generate(messages.GenerateRequest(text="love", sampling=messages.SamplingParams(**fields)))
            assert asked[-1] == SamplingParams(**expected), fields
        list(inference.GenerateStream(messages.GenerateRequest(text="love")))
        assert asked[-1] == SamplingParams(**EXPECTED)
    with Client(server.target) as client:
        client.generate("love")
        assert asked[-1] == SamplingParams(**EXPECTED)
        client.generate("love", SamplingParams(max_tokens=3))
        assert asked[-1] == SamplingParams(max_tokens=3)  # as it is


def test_async_requests_have_the_models_defaults_where_they_say_nothing(served):
    _, llm, asked = served
    run(_last(llm, "love"))
    assert asked[-1] == SamplingParams(**EXPECTED) == llm.get_default_sampling_params()
    run(_last(llm, "love", SamplingParams(max_tokens=3)))
    assert asked[-1] == SamplingParams(max_tokens=3)


def test_generate_from_the_command_line(model, tmp_path, monkeypatch):

    from chameleon_jax.serving import llm

    asked = []
    generate = llm.LLM.generate
    monkeypatch.setattr(
        llm.LLM,
        "generate",
        lambda self, p, params, *a, **named: (asked.append(params), generate(self, p, params, *a, **named))[1],
    )
    plain = {"temperature": 0.0, "max_tokens": 128}
    for options, expected in [
        (["--chat", "--temperature", 0, "--top-k", 0, "--max-model-len", 40], EXPECTED | {"temperature": 0, "top_k": 0}),
        (["--generation-config", "none", "--min-p", 0.5, "--max-model-len", 40], plain | {"min_p": 0.5, "max_tokens": 35}),
    ]:
        result = CliRunner().invoke(app, ["generate", str(model), "--prompt", "hello", *map(str, options)])
        assert result.exit_code == 0, result.output
        assert asked[-1] == SamplingParams(**expected), options
    result = CliRunner().invoke(app, ["generate", str(model), "--prompt", "x", "--generation-config", str(tmp_path)])
    assert result.exit_code == 1 and "generation_config is" in result.output and "Traceback" not in result.output
