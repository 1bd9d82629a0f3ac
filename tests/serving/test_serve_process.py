"""`chameleon-jax serve` as a process: stopped under load, killed and restarted.

Within the test process: settings that are checked before a model is loaded, and shutdown.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import typer

from chameleon_jax.checkpoints import huggingface
from chameleon_jax.models.runtime import compile_threads, jax_setup
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.serving import async_llm  # noqa: F401  # as in a server
from chameleon_jax.serving.cli.serve import _compilations_left
from chameleon_jax.serving.client import AsyncClient, Client
from chameleon_jax.serving.server import CLOSE_TIMEOUT_S, Server, listen
from chameleon_jax.serving.service.server_config import ServerConfig
from chameleon_jax.serving.telemetry.metrics import Metrics
from tests import reference_models as reference
from tests.serving.conftest import make_service
from tests.serving.server_process import TIMEOUT, Serve, servers

CONFIG = dataclasses.replace(reference.CONFIGS["gqa"], num_layers=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, as its programs are compiled in half the time of three."""
    directory = tmp_path_factory.mktemp("model") / "small"
    huggingface.save(reference.checkpoint(CONFIG), directory)
    reference.byte_tokenizer().save(directory)
    return directory


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters a0 and a1."""
    folder = tmp_path_factory.mktemp("adapters")
    for i, rank in enumerate((2, 8)):
        reference.save_adapter(folder / f"a{i}", CONFIG, rank, seed=i)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    with servers(tmp_path_factory.mktemp("logs")) as serve:
        yield serve


def body(tokens: int, stream: bool = False, model: str = "a1") -> dict:
    return {"model": model, "prompt": "love is", "max_tokens": tokens, "temperature": 0, "stream": stream}


def test_sigterm_under_load(served, model, adapters):
    with served(model, adapters, "--port", "0", "--grpc-port", "0", "--max-num-seqs", "2") as process:
        url = process.wait()
        target = re.search(r"gRPC, .*: (127\.0\.0\.1:\d+)", process.log)
        assert "small and 2 adapters" in process.log and target is not None
        with httpx.Client(base_url=url, timeout=TIMEOUT) as http, Client(target[1]) as grpc:
            expected = http.post("/v1/completions", json=body(100)).json()["choices"][0]["text"]
            assert grpc.generate("love is", params(100), lora_name="a1").text == expected
            streams = [contextlib.ExitStack() for _ in range(4)]
            responses = [s.enter_context(http.stream("POST", "/v1/completions", json=body(100, True))) for s in streams]
            assert {r.status_code for r in responses} == {200}
            process.send(signal.SIGTERM)
            while http.get("/health/ready").status_code == 200:
                pass
            assert http.post("/v1/completions", json=body(1)).status_code == 503
            assert http.get("/health/live").status_code == 200
            for response, stream in zip(responses, streams):
                lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
                assert lines[-1] == "[DONE]"
                assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == expected
                stream.close()
        assert process.ended() == 0


def test_every_program_is_compiled_before_the_first_request(served, model, tmp_path):
    small = ("--no-enable-lora", "--compile-programs", "ahead")
    with served(model, tmp_path, "--port", "0", "--grpc-port", "-1", *small) as process:
        url = process.wait()
        done, programs = map(int, re.findall(r"compiling programs: (\d+)/(\d+)", process.log)[-1])
        assert done == programs == 10  # a decode row, a tile of a prompt, six kinds of sampling, counting, and scoring
        for line in (
            r"weights of .* are read as float32, in \d+\.\d s",
            r"compiling 10 programs on \d+ threads: about \d+ s",
            r"10 programs are compiled, in \d+\.\d s",
            r"max_model_len is 128: as set",
            r"the pool has 200 pages: \d+ tokens of KV without adapters, \d+ MiB",
            r"\d+ compilations so far, of which \d+ were found in the cache",
            r"\d+ adapters are found and 0 registered, in \d+\.\d s",
            r"ready, in \d+\.\d s",
        ):
            assert re.search(line, process.log), line
        with httpx.Client(base_url=url, timeout=TIMEOUT) as http:
            assert http.post("/v1/completions", json=body(8, model="small")).status_code == 200
            scored = body(8, model="small") | {"prompt_logprobs": 2}
            assert http.post("/v1/completions", json=scored).status_code == 200
            adjusted = body(8, model="small") | {"presence_penalty": 1, "logit_bias": {"5": 1}, "allowed_token_ids": [5, 6, 7]}
            assert http.post("/v1/completions", json=adjusted).status_code == 200
            assert 'compilations_total{phase="serving"} 0.0' in http.get("/metrics").text


def test_requests_are_served_while_programs_are_compiled(served, model, adapters):
    with served(model, adapters, "--port", "0", "--grpc-port", "-1", "--compile-programs", "background") as process:
        with httpx.Client(base_url=process.wait(), timeout=TIMEOUT) as http:
            while True:
                assert http.post("/v1/completions", json=body(8)).status_code == 200
                ready = http.get("/health/ready").json()
                assert ready["status"] == "ready" and 0 < ready["programs"]["compiled"] <= ready["programs"]["total"]
                if ready["programs"]["compiled"] == ready["programs"]["total"]:
                    break
            metrics = http.get("/metrics").text
        assert re.search(r'compilations_total{phase="background"} [1-9]', metrics)
        assert 'compilations_total{phase="serving"} 0.0' in metrics
        process.send(signal.SIGTERM)
        assert process.ended() == 0
        numbers = [re.search(text, process.log) for text in (r"(\d+) programs are compiled, in", r"(\d+) programs are left")]
        assert sum(int(found[1]) for found in numbers if found) == ready["programs"]["total"] > 10, process.log
        assert re.search(r"all programs are compiled, after \d", process.log)


SLOW_COMPILATION = """
import threading, time
from chameleon_jax.models.runtime import programs
run = programs.Job.run
programs.Job.run = lambda job: time.sleep(600) if threading.current_thread().name.startswith("compile-") else run(job)
"""


@pytest.mark.parametrize("wrong", [False, True])
def test_a_server_ends_while_a_program_is_compiled(served, model, tmp_path, wrong):
    """Told to stop, or by an adapter that it cannot read."""
    options = ["--port", "0", "--grpc-port", "-1", "--compile-programs", "background"]
    if wrong:
        (tmp_path / "adapter_config.json").write_text("{}")
        options += ["--lora-modules", f"wrong={tmp_path}"]
    with served(model, tmp_path, *options, code=SLOW_COMPILATION) as process:
        assert process._ready.wait(TIMEOUT)
        if not wrong:
            process.send(signal.SIGTERM)
        assert process.ended() == wrong, process.log


@pytest.mark.parametrize(
    ("error", "code"), [(None, 0), (typer.Exit(1), 1), (RuntimeError("a bug"), None), (KeyboardInterrupt(), None)]
)
def test_an_error_that_is_not_reported_is_never_an_exit_code(monkeypatch, error, code):
    """A process that ended early with code 0 would hide it."""
    codes: list[int] = []
    monkeypatch.setattr(compile_threads, "is_compiling", lambda: True)
    monkeypatch.setattr(jax_setup, "close_compilation_cache", lambda: None)
    monkeypatch.setattr("os._exit", codes.append)
    with contextlib.nullcontext() if error is None else pytest.raises(type(error)), _compilations_left():
        if error is not None:
            raise error
    assert codes == ([] if code is None else [code])


def test_killed_started_again_and_told_to_stop_twice(served, model, adapters):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    texts = []
    for last in (False, True):
        with served(model, adapters, "--port", port, "--grpc-port", "-1") as process:
            assert process._ready.wait(TIMEOUT)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT) as http:
                texts.append(http.post("/v1/completions", json=body(32)).json()["choices"][0]["text"])
                with http.stream("POST", "/v1/completions", json=body(100, True)) as response:
                    assert response.status_code == 200
                    if not last:
                        process.send(signal.SIGKILL)
                        assert process.ended() == -signal.SIGKILL
                        continue
                    process.send(signal.SIGINT)
                    while "stopping" not in process.log:
                        pass
                    process.send(signal.SIGINT)
                    assert process.ended() in (0, 128 + signal.SIGINT)  # 0 if it was done before the second signal
    assert texts[0] == texts[1]


def test_a_port_that_is_taken_is_found_before_the_model_is_loaded(served, model, adapters):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with served(model, adapters, "--port", port) as process:
            assert process.ended() == 1
            assert f"cannot listen on 127.0.0.1:{port}" in process.log and "compiling" not in process.log


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--port", "70000"], "port is 70000"),
        (["--lora-modules", "x=/nowhere", "--port", "0", "--grpc-port", "0"], "/nowhere"),
        (["--adapter-dir", "/nowhere", "--port", "0"], "adapter_dir is '/nowhere'"),
    ],
)
def test_wrong_options_end_with_one_line(model, adapters, options, match):
    command = [sys.executable, "-m", "chameleon_jax.serving.cli", "serve", model, "--adapter-dir", adapters, *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 1
    assert match in result.stderr.replace("\n", "") and "Traceback" not in result.stderr
    assert "compiling" not in result.stderr  # found before the model is loaded


def params(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens)


# -- in this process ------------------------------------------------------------------------------------------------------


def test_a_port_of_grpc_that_is_taken_is_found_by_listening():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"grpc_port is {port}: cannot listen on 127.0.0.1:{port}: Address already in use"):
            listen(ServerConfig(port=0, grpc_port=port))


def test_listening_leaves_a_port_of_grpc_that_is_free():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with listen(ServerConfig(port=0, grpc_port=port)):
        socket.create_server(("127.0.0.1", port)).close()


def test_a_host_that_does_not_exist_is_named(monkeypatch):
    def getaddrinfo(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(OSError, match="host is 'nosuchhost': .*Name or service not known; allowed: an address or a name"):
        listen(ServerConfig(host="nosuchhost"))


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Make PEM files: two keys, the certificate of the first, the first key encrypted, a text. One file is missing."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    folder = tmp_path_factory.mktemp("pems")
    files = {name: str(folder / f"{name}.pem") for name in ("cert", "key", "other", "encrypted", "text", "missing")}
    openssl = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=localhost"]
    for key, cert in (("other", "cert"), ("key", "cert")):
        command = [*openssl, "-nodes", "-keyout", files[key], "-out", files[cert]]
        subprocess.run(command, check=True, capture_output=True)
    command = ["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", files["key"], "-out", files["encrypted"]]
    subprocess.run(command, check=True, capture_output=True)
    Path(files["text"]).write_text("no certificate")
    return files


def test_a_certificate_with_its_key_is_taken(pems):
    listen(ServerConfig(port=0, grpc_port=None, tls_cert=pems["cert"], tls_key=pems["key"])).close()


@pytest.mark.parametrize(
    ("cert", "key", "match"),
    [
        ("missing", "key", "tls_cert is '.*missing.pem': No such file"),
        ("cert", "missing", "tls_key is '.*missing.pem': No such file"),
        ("cert", "other", "tls_cert is '.*cert.pem' and tls_key is '.*other.pem': .*mismatch"),
        ("cert", "encrypted", "tls_key is '.*encrypted.pem': .*; allowed: .* not encrypted"),
        ("text", "key", "tls_cert is '.*text.pem' and"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_found_by_listening(pems, cert, key, match):
    with pytest.raises(OSError, match=match):
        listen(ServerConfig(port=0, grpc_port=None, tls_cert=pems[cert], tls_key=pems[key]))


@pytest.fixture
def service(shared_llm, adapter_dir):
    observers = list(shared_llm.observers)
    yield make_service(shared_llm, adapter_dir)
    shared_llm.observers[:] = observers
    shared_llm.draining = False


def test_http_that_ends_by_itself_ends_the_server_with_an_error(service):
    async def main() -> None:
        server = Server(service, listen(service.config), Metrics())
        await server.start()
        server._http.should_exit = True
        await asyncio.wait_for(server.run(), TIMEOUT)

    with pytest.raises(OSError, match="HTTP ended without being stopped"):
        asyncio.run(main())


def test_an_idle_server_ends_without_waiting_for_connections_that_are_open(service):
    async def main() -> bool:
        server = Server(service, listen(service.config), Metrics())
        await server.start()
        running = asyncio.create_task(server.run())
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as http,
            AsyncClient(f"127.0.0.1:{server.grpc_port}") as grpc,
        ):
            assert (await http.get("/health")).status_code == 200
            await grpc.generate("love is", params(1))
            server.stop()
            return await asyncio.wait_for(running, CLOSE_TIMEOUT_S)

    assert asyncio.run(main())
