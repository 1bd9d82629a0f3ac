"""Talk to the server with OpenAI's client; the adapter's name is the `model`.

Run: python examples/openai_client.py                                    (starts a server, then stops it)
Run: python examples/openai_client.py --base-url http://127.0.0.1:8000   (uses a server that runs)

Prints the models served, a completion of the base model, and one of an adapter as it streams. Needs `pip install openai`.
"""

import argparse
import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI

ADAPTERS = Path(__file__).parents[1] / "benchmarks" / "demo_adapters"
SETTINGS = "--grpc-port -1 --max-num-seqs 4 --max-model-len 128 --max-lora-rank 16 --compile-programs lazy"


@contextlib.contextmanager
def server(model: str, adapters: Path) -> Iterator[str]:
    """Start a server in a process of its own, yield its base URL once it is ready, and stop it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "chameleon_jax.serving.cli", "serve", model, "--adapter-dir", str(adapters)]
    with subprocess.Popen([*command, "--port", str(port), *SETTINGS.split()], stdout=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            while process.poll() is None:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health/ready"):
                    break
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()  # a graceful shutdown: running requests finish


def talk(base_url: str) -> None:
    """Ask the base model, then stream an answer of the first adapter."""
    with OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        names = [model.id for model in client.models.list()]
        print("models:", ", ".join(names))
        answer = client.completions.create(model=names[0], prompt="The heart of man is", max_tokens=16, temperature=0)
        print(f"{names[0]}: {answer.choices[0].text!r}")
        print(f"{names[1]}: ", end="")
        for event in client.completions.create(model=names[1], prompt="The heart of man is", max_tokens=16, stream=True):
            print(event.choices[0].text, end="", flush=True)
        print()


def main(model: str = "smollm2-135m", adapters: Path = ADAPTERS, base_url: str | None = None) -> None:
    """Talk to the server at `base_url`, or to one that is started for it."""
    with contextlib.nullcontext(base_url) if base_url else server(model, adapters) as url:
        talk(url)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", help="URL of a running server, without /v1 (default: start one).")
    main(base_url=parser.parse_args().base_url)
