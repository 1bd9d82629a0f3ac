"""Public load generator, guidellm, against the HTTP server.

guidellm lives in an environment of its own, made under `.cache/guidellm` the first time. It asks the demo model and each of its
adapters in turn, over streams of OpenAI's API as with any server. All figures are guidellm's own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.demo import ADAPTERS
from benchmarks.machine import Out, describe, publish

GUIDELLM = "guidellm==0.8.1"
HOME = Path(".cache/guidellm")
MODEL = "smollm2-135m"


def install() -> Path:
    """Install the program, unless it is installed, and return its path."""
    program = HOME / "bin" / "guidellm"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(HOME)], check=True)
        subprocess.run([str(HOME / "bin" / "python"), "-m", "pip", "install", "--quiet", GUIDELLM], check=True)
    return program.absolute()


def start_server() -> tuple[subprocess.Popen[str], str]:
    """Start the server as a user does, and return it with its address."""
    command = [sys.executable, "-m", "chameleon_jax.serving.cli", "serve", MODEL, "--adapter-dir", str(ADAPTERS)]
    options = ["--port", "0", "--grpc-port", "0", "--max-model-len", "256", "--max-num-batched-tokens", "128"]
    server = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"served at (http://\S+?):?( |$)", line):
            subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)  # so that the pipe is never full
            return server, found[1]
    raise RuntimeError("the server ended before it served")


def generate(program: Path, url: str, model: str, tokenizer: Path, shape: dict[str, int], folder: Path) -> dict[str, Any]:
    report = folder / f"{model}.json"
    options = {
        "backend": f"kind=openai_http,target={url},model={model}",
        "profile": f"kind=concurrent,streams={shape['streams']}",
        "constraint": f"kind=max_requests,count={shape['requests']}",
        "data": f"kind=synthetic_text,prompt_tokens={shape['prompt_tokens']},output_tokens={shape['output_tokens']}",
        "tokenizer": f"kind=hf_auto,model={tokenizer}",
        "output": f"kind=json,path={report}",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    subprocess.run([str(program), "run", *flags, "--disable-progress"], check=True, stdout=subprocess.DEVNULL)
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    return {
        "model": model,
        "requests": totals["successful"],
        "errors": totals["errored"],
        "cut off": totals["incomplete"],
        "output tokens/s": round(metrics["output_tokens_per_second"]["successful"]["mean"], 1),
        "TTFT P50, ms": round(metrics["time_to_first_token_ms"]["successful"]["median"]),
        "TTFT P99, ms": round(metrics["time_to_first_token_ms"]["successful"]["percentiles"]["p99"]),
        "between tokens P50, ms": round(metrics["inter_token_latency_ms"]["successful"]["median"]),
    }


def main(
    requests: Annotated[
        int, typer.Option(help="Requests to each of the five models: the base model and the demo's four adapters.")
    ] = 200,
    streams: Annotated[int, typer.Option(help="Requests in flight at once.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 48,
    output_tokens: Annotated[int, typer.Option(help="Tokens of each output.")] = 24,
    out: Out = None,
) -> None:
    """Put a public load generator, guidellm, on the HTTP server."""
    shape = {"requests": requests, "streams": streams, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    program = install()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "model"
        command = [sys.executable, "-m", "chameleon_jax.serving.cli", "convert", MODEL, str(tokenizer), "--to", "hf"]
        subprocess.run(command, check=True)
        server, url = start_server()
        try:
            names = [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]]
            rows = [generate(program, url, name, tokenizer, shape, Path(folder)) for name in names]
        finally:
            server.terminate()
            code = server.wait(120)
    publish(describe() | {"generator": GUIDELLM} | shape | {"server ended with": code, "table": rows}, out)
    if code != 0 or any(row["errors"] or row["requests"] != requests for row in rows):
        sys.exit("not every request was answered")
