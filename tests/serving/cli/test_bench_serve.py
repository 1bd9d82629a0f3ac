"""`bench serve` against a server that answers as the test says, and against this package's server."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from chameleon_jax.serving.cli import app
from chameleon_jax.serving.cli.bench_client import _Connection
from chameleon_jax.serving.cli.bench_serve import spread
from chameleon_jax.serving.cli.bench_workload import TOKEN_IDS, WorkloadSpec, draw
from tests.serving.cli import dummy_server
from tests.serving.cli.dummy_server import Answer, completion, plain, stream_of


@contextlib.contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """Run a dummy server in a thread. Yields its address."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(dummy_server.start(answer))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        server.close()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def bench(url: str, *options: object) -> Any:
    lengths = ["--random-input-len", "3", "--random-output-len", "4"]
    return CliRunner().invoke(app, ["bench", "serve", "--base-url", url, *lengths, *map(str, options)])


def test_requests_and_figures(tmp_path):
    asked: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> bytes:
        if not body:
            return plain(200, {"data": [{"id": "org/base"}]})
        asked.append(body)
        return completion(4)

    options = ["--num-prompts", 12, "--max-concurrency", 3, "--ignore-eos", "--temperature", 0, "--extra-body", '{"min_p": 0}']
    options += ["--metric-percentiles", "50,99.9", "--save-detailed", "--result-dir", tmp_path, "--json"]
    with answering(answer) as url:
        result = bench(url, *options)
    assert result.exit_code == 0, result.output
    assert len(asked) == 13  # one alone before the others
    common = {"model": "org/base", "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
    for body in asked:
        assert len(body["prompt"]) == 3 and all(TOKEN_IDS[0] <= token < TOKEN_IDS[1] for token in body["prompt"])
        assert {**common, "ignore_eos": True, "temperature": 0, "min_p": 0}.items() <= body.items()
    report = json.loads(result.stdout.splitlines()[0])
    [file] = tmp_path.glob("infqps-base-*.json")
    assert report.items() <= json.loads(file.read_text()).items()
    figures = ("completed", "failed", "total_input_tokens", "total_output_tokens")
    assert [report[name] for name in figures] == [12, 0, 96, 48]
    for name in ("ttft", "tpot", "itl", "e2el"):
        assert 0 <= report[f"p50_{name}_ms"] == report[f"median_{name}_ms"] <= report[f"p99.9_{name}_ms"]
    assert report["mean_e2el_ms"] >= report["mean_ttft_ms"] > 0
    assert report["output_throughput"] == pytest.approx(48 / report["duration"])
    details = json.loads(file.read_text())
    assert details["generated_texts"] == [" word" * 4] * 12 and [len(gaps) for gaps in details["itls"]] == [3] * 12


def test_conversations_adapters_and_keys():
    asked: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> bytes:
        asked.append(body)
        deltas = [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}]
        return stream_of([*({"choices": [{"delta": delta}]} for delta in deltas), "[DONE]"])

    options = ["--endpoint", "/v1/chat/completions", "--num-prompts", 9, "--lora-assignment", "round-robin", "--json"]
    with answering(answer) as url:
        result = bench(url, *options, "--model", "m", "--lora-modules", "a", "b", "c")
    report = json.loads(result.stdout.splitlines()[0])
    assert [body["model"] for body in asked[1:4]] == ["a", "b", "c"] and report["requests_by_model"] == {"a": 3, "b": 3, "c": 3}
    assert len(asked[0]["messages"][0]["content"].split()) == 3
    assert report["total_output_tokens"] == 18  # no usage was sent, and the event of the role is no token


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (plain(404, {"error": "no model m"}), 'the first request failed: status 404: {"error": "no model m"}'),
        (stream_of([{"error": {"message": "queue full"}}]), "queue full"),
        (stream_of(["[DONE]"]), "the answer has no event with text"),
        (stream_of(["{broken"]), "allowed: a completion of OpenAI's API"),
        (b"not HTTP\r\n\r\n", "the answer is not HTTP"),
    ],
)
def test_a_failed_first_request_ends_the_run_with_the_reason(first, message):
    with answering(lambda body: first) as url:
        result = bench(url, "--model", "m")
    assert result.exit_code == 1 and message in " ".join(result.output.split())


def test_a_request_on_a_connection_that_was_closed_at_once_fails():
    async def ask() -> None:
        connection = _Connection()
        connection.connection_made(SimpleNamespace(close=lambda: None))
        connection.connection_lost(None)
        await asyncio.wait_for(connection.ask(b"", lambda status, data: None), 5)

    with pytest.raises(ConnectionResetError, match="the server closed the connection"):
        asyncio.run(ask())


def test_failures_are_counted_and_their_reasons_printed():
    answers = iter([completion(4), completion(4), plain(503, {"error": "overloaded"}), completion(4)])
    with answering(lambda body: next(answers)) as url:
        result = bench(url, "--model", "m", "--num-prompts", 3, "--max-concurrency", 1)
    assert result.exit_code == 0 and "Successful requests: 2 Failed requests: 1" in " ".join(result.output.split())
    assert "failed: status 503" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-prompts", 0], "num_prompts is 0; allowed: 1 or more"),
        (["--request-rate", 0], "request_rate is 0.0; allowed: above 0"),
        (["--lora-assignment", "zipf"], "allowed: random, round-robin"),
        (["--lora-assignment", "round-robin", "--lora-zipf-exponent", 1], "allowed: 0 where lora_assignment is 'round-robin'"),
        (["--percentile-metrics", "ttft,tbt"], "percentile_metrics is 'ttft,tbt'; allowed: ttft, tpot, itl, e2el"),
        (["--metric-percentiles", "p99"], "metric_percentiles is 'p99'"),
        (["--max-concurrency", 0], "max_concurrency is 0"),
        (["--endpoint", "v1/completions"], "endpoint is 'v1/completions'; allowed: a path, as /v1/completions"),
        ([], "127.0.0.1:9 cannot be reached"),
        (["--base-url", "http://a:port"], "base_url is 'http://a:port'; allowed: http://host:port"),
        (["--extra-body", "[]"], "extra_body is '[]'; allowed: a JSON object"),
        (["--header", "x"], "header is 'x'; allowed: name=value"),
        (["--tokenizer", "/nowhere"], "tokenizer is '/nowhere'"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    result = bench("http://127.0.0.1:9", "--model", "m", *options)
    assert result.exit_code == 1 and message in " ".join(result.output.split())


def test_an_option_takes_the_values_that_follow_it():
    assert spread(["--o", "a", "b", "--p", "c", "d"], "--o") == ["--o", "a", "--o", "b", "--p", "c", "d"]
    assert spread(["--o=a", "b"], "--o") == ["--o=a", "--o", "b"]


def test_workloads_have_their_rate_and_popularity():
    spec = WorkloadSpec(num_prompts=4000, random_input_len=10, random_range_ratio=0.5, request_rate=8, lora_zipf_exponent=1)
    workload = draw(spec, ["a", "b", "c"], None, False)
    assert workload == draw(spec, ["a", "b", "c"], None, False)
    assert workload.arrival_s[-1] == pytest.approx(500) and list(workload.arrival_s) == sorted(workload.arrival_s)
    assert set(workload.input_lens) == set(range(5, 16))
    shares = collections.Counter(workload.models)
    assert [shares[name] / 4000 for name in "abc"] == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.03)


def test_against_the_server(server, text_model):
    options = ["--num-prompts", 6, "--ignore-eos", "--tokenizer", text_model, "--lora-modules", "a0", "a1", "--json"]
    result = bench(server.url, *options, "--request-rate", 50)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[0])
    assert (report["completed"], report["total_output_tokens"]) == (6, 24)
