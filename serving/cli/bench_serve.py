"""`bench serve`: load on any server of OpenAI's API, with the options of `vllm bench serve`."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option
from typer.core import TyperCommand

from chameleon_jax.checks import require
from chameleon_jax.serving.cli.options import console, errors, fields_of

if TYPE_CHECKING:
    from chameleon_jax.serving.cli.bench_client import HttpClient

KEY = "OPENAI_API_KEY"


class ServeCommand(TyperCommand):
    """Command whose --lora-modules takes several names, as for vLLM."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args, "--lora-modules"))


def spread(args: Sequence[str], option: str) -> list[str]:
    """Repeat an option before each of the values that follow it: `--o a b` and `--o=a b` give both to `--o`."""
    result: list[str] = []
    follows = False
    for i, arg in enumerate(args):
        if arg.startswith("-"):
            follows = arg.partition("=")[0] == option
        elif follows and args[i - 1] != option:
            result.append(option)
        result.append(arg)
    return result


def serve(
    base_url: Annotated[str, Option(help="Address of the server.")] = "http://127.0.0.1:8000",
    endpoint: Annotated[str, Option(help="Path; /v1/chat/completions sends conversations.")] = "/v1/completions",
    model: Annotated[str | None, Option(help="Model to ask (default: the first that the server lists).")] = None,
    tokenizer: Annotated[
        str | None,
        Option(
            help="Directory with tokenizer.json, or hub id: prompts are random tokens as text "
            "(default: random token ids; words for conversations)."
        ),
    ] = None,
    num_prompts: Annotated[int, Option(help="Requests.")] = 1000,
    random_input_len: Annotated[int, Option(help="Tokens of a prompt.")] = 1024,
    random_output_len: Annotated[int, Option(help="Tokens of an output.")] = 128,
    random_range_ratio: Annotated[float, Option(help="Lengths vary by this share of themselves, 0 or more, below 1.")] = 0.0,
    request_rate: Annotated[float, Option(help="Requests a second; inf sends all at once.")] = math.inf,
    burstiness: Annotated[float, Option(help="1 is a Poisson process, below is burstier, above is more even.")] = 1.0,
    max_concurrency: Annotated[int | None, Option(help="Requests in flight at most (default: no limit).")] = None,
    lora_modules: Annotated[
        list[str] | None, Option("--lora-modules", help="Adapters to ask instead of the model, as --lora-modules a b c.")
    ] = None,
    lora_assignment: Annotated[str, Option(help="Choice of the adapter of a request: random or round-robin.")] = "random",
    lora_zipf_exponent: Annotated[
        float, Option(help="Popularity of the k-th adapter is k to the power of minus this; 0: equal shares.")
    ] = 0.0,
    seed: Annotated[int, Option(help="Seed of the workload.")] = 0,
    ignore_eos: Annotated[bool, Option("--ignore-eos", help="Ask for outputs of full length.")] = False,
    temperature: Annotated[float | None, Option(help="Temperature (default: the server's).")] = None,
    extra_body: Annotated[str | None, Option(help="JSON object of further fields of every request.")] = None,
    header: Annotated[list[str] | None, Option(help="Header as name=value. Repeat for several.")] = None,
    api_key: Annotated[str | None, Option(envvar=KEY, help="Key of the server.")] = None,
    percentile_metrics: Annotated[str, Option(help="Figures to report, comma-separated.")] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, Option(help="Percentiles to report of each, comma-separated.")] = "99",
    save_result: Annotated[bool, Option("--save-result", help="Write the result to a JSON file.")] = False,
    save_detailed: Annotated[bool, Option("--save-detailed", help="Write every request's figures too.")] = False,
    result_dir: Annotated[Path, Option(help="Directory of the file.")] = Path("."),
    result_filename: Annotated[str | None, Option(help="Name of the file (default: from rate, model and time).")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of text.")] = False,
    disable_tqdm: Annotated[bool, Option("--disable-tqdm", help="Show no progress bar.")] = False,
) -> None:
    """Measure any server of OpenAI's API.

    Example: chameleon-jax bench serve --num-prompts 200 --request-rate 4 --random-input-len 128 --random-output-len 32

    The first request is sent alone before the others, and not counted.
    """
    flags = locals()
    import uvloop
    from tqdm import tqdm

    from chameleon_jax.serving.cli import bench_report, bench_workload
    from chameleon_jax.serving.cli.bench_client import HttpClient
    from chameleon_jax.serving.cli.bench_load import Answer, Load

    with errors():
        spec = bench_workload.WorkloadSpec(**fields_of(bench_workload.WorkloadSpec, flags))
        metrics = bench_report.parse_metrics(percentile_metrics)
        percentiles = bench_report.parse_percentiles(metric_percentiles)
        is_path = endpoint.startswith("/") and endpoint.isascii() and endpoint.isprintable() and " " not in endpoint
        require(is_path, "endpoint", endpoint, "a path, as /v1/completions")
        require(max_concurrency is None or max_concurrency >= 1, "max_concurrency", max_concurrency, "1 or more")
        fields = _fields(extra_body) | ({"ignore_eos": True} if ignore_eos else {})
        fields |= {} if temperature is None else {"temperature": temperature}
        backend = None if tokenizer is None else bench_workload.load_tokenizer(tokenizer)
        load = Load(HttpClient(base_url, _headers(header or (), api_key)), endpoint, fields, max_concurrency)

        async def measure() -> tuple[str, bench_workload.Workload, list[Answer], float]:
            try:  # an event loop whose connections are open may never close
                name = model or await _first_model(load.client)
                workload = bench_workload.draw(spec, lora_modules or [name], backend, load.is_chat)
                await load.try_first(workload)
                with tqdm(total=num_prompts, desc="Requests", disable=disable_tqdm or not sys.stderr.isatty()) as bar:
                    answers, seconds = await load.run(workload, bar.update)
            finally:
                load.client.close()
            return name, workload, answers, seconds

        date = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        name, workload, answers, seconds = uvloop.run(measure())
        about: dict[str, Any] = {"date": date, "base_url": base_url, "endpoint": endpoint, "model_id": name}
        about |= {"tokenizer_id": tokenizer, "max_concurrency": max_concurrency} | dataclasses.asdict(spec)
        about["request_rate"] = rate = "inf" if math.isinf(request_rate) else request_rate  # JSON has no infinity
        summary = bench_report.summarise(answers, workload.models, seconds, metrics, percentiles)
        print(json.dumps(about | summary) if as_json else bench_report.format_table(summary, metrics))
        for error in dict.fromkeys(answer.error for answer in answers if answer.error is not None):
            console.print(f"failed: {error}", soft_wrap=True)
        if save_result or save_detailed:
            details = bench_report.details(answers, workload.models) if save_detailed else {}
            _save(about | summary | details, result_dir, result_filename or f"{rate}qps-{Path(name).name}-{date}.json")
    if not summary["completed"]:
        raise typer.Exit(1)


def _save(result: Mapping[str, Any], directory: Path, name: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(json.dumps(result, indent=1), encoding="utf-8")
    console.print(f"wrote {directory / name}")


def _fields(extra_body: str | None) -> dict[str, Any]:
    try:
        fields = json.loads(extra_body or "{}")
    except ValueError:
        fields = None
    require(isinstance(fields, dict), "extra_body", extra_body, "a JSON object")
    return dict(fields)


def _headers(given: Sequence[str], api_key: str | None) -> dict[str, str]:
    headers = {"content-type": "application/json", "user-agent": "chameleon-jax"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    for header in given:
        name, separator, value = header.partition("=")
        require(bool(separator and name) and header.isprintable(), "header", header, "name=value")
        headers[name.lower()] = value
    return headers


async def _first_model(client: HttpClient) -> str:
    """Ask the server for its first model. Raises ValueError."""
    parts: list[bytes] = []
    status = await client.request("GET", "/v1/models", b"", lambda status, data: parts.append(data))
    try:
        return str(json.loads(b"".join(parts))["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"the server lists no model (status {status}); give --model") from error
