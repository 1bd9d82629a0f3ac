"""A public load generator against the HTTP server: `python -m benchmarks.load_generator --out FILE`.

guidellm, in an environment of its own that is made under `.cache/guidellm` the first time, asks the demo model and each of its
adapters in turn, over streams of OpenAI's API as it does with any server. What is reported is guidellm's own count.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from benchmarks.demo import ADAPTERS
from benchmarks.machine import describe, publish

GUIDELLM = "guidellm==0.8.1"
HOME = Path(".cache/guidellm")
MODEL = "smollm2-135m"


def install() -> Path:
    """The program; installs it where it is not there."""
    program = HOME / "bin" / "guidellm"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(HOME)], check=True)
        subprocess.run([str(HOME / "bin" / "python"), "-m", "pip", "install", "--quiet", GUIDELLM], check=True)
    return program.absolute()


def start_server() -> tuple[subprocess.Popen[str], str]:
    """The server as a user starts it, and its address once it is served."""
    command = [sys.executable, "-m", "chameleon_jax.serving.cli", "serve", MODEL, "--adapter-dir", str(ADAPTERS)]
    options = ["--port", "0", "--grpc-port", "0", "--max-model-len", "256", "--max-num-batched-tokens", "128"]
    server = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"served at (http://\S+?):?( |$)", line):
            subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)  # so that it is never full
            return server, found[1]
    raise RuntimeError("the server ended before it served")


def generate(program: Path, url: str, model: str, tokenizer: Path, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    report = folder / f"{model}.json"
    options = {
        "backend": f"kind=openai_http,target={url},model={model}",
        "profile": f"kind=concurrent,streams={args.streams}",
        "constraint": f"kind=max_requests,count={args.requests}",
        "data": f"kind=synthetic_text,prompt_tokens={args.prompt_tokens},output_tokens={args.output_tokens}",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200, help="to each of the five models")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--output-tokens", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    program = install()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "model"
        command = [sys.executable, "-m", "chameleon_jax.serving.cli", "convert", MODEL, str(tokenizer), "--to", "hf"]
        subprocess.run(command, check=True)
        server, url = start_server()
        try:
            names = [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]]
            rows = [generate(program, url, name, tokenizer, args, Path(folder)) for name in names]
        finally:
            server.terminate()
            code = server.wait(120)
    shape = {"generator": GUIDELLM, **{name: value for name, value in vars(args).items() if name != "out"}}
    result = describe("python -m benchmarks.load_generator") | shape | {"server ended with": code, "table": rows}
    publish(result, args.out)
    if code != 0 or any(row["errors"] or row["requests"] != args.requests for row in rows):
        sys.exit("not every request was answered")


if __name__ == "__main__":
    main()
