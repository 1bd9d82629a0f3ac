"""Clients of both protocols in a process of their own, which check every text; some of them behave badly.

`benchmarks.soak.soak` starts it: `python -m benchmarks.soak.clients FOLDER`. It reads jobs.json and task.json there, and writes
result.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from benchmarks.soak.churn import Churn
from benchmarks.soak.jobs import BASE, Jobs
from chameleon_jax.errors import DeadlineExceeded, QueueFull
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.serving.client import AsyncClient

KINDS = ("stream", "unary", "grpc", "leave", "deadline")
WEIGHTS = (50, 20, 25, 3, 2)


class Clients:
    """Clients of one server; `fixed` has the names of adapters that stay, with their content."""

    def __init__(self, jobs: Jobs, http: httpx.AsyncClient, grpc: AsyncClient, churn: Churn, fixed: dict[str, str], model: str):
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.errors: list[str] = []
        self._jobs, self._http, self._rpc, self._churn, self._fixed, self._model = jobs, http, grpc, churn, fixed, model

    async def run(self, rng: random.Random, until: float) -> None:
        while time.monotonic() < until:
            number = rng.randrange(len(self._jobs.prompts))
            pick = rng.random()
            if pick < 0.25:
                await self._one(rng, self._model, number, {BASE})
            elif pick < 0.6:
                name = rng.choice(list(self._fixed))
                await self._one(rng, name, number, {self._fixed[name]})
            else:
                name = rng.choice(self._churn.names)
                seen = self._churn.watch(name)
                try:
                    await self._one(rng, name, number, seen)
                finally:
                    self._churn.unwatch(name, seen)

    async def _one(self, rng: random.Random, name: str, number: int, seen: set[str | None]) -> None:
        """Send one request, whose name may have had any of the contents `seen`."""
        kind = rng.choices(KINDS, WEIGHTS)[0]
        try:
            text = await getattr(self, f"_{kind}")(name, *self._jobs.prompts[number])
        except (QueueFull, KeyError, httpx.HTTPStatusError) as error:
            code = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else type(error).__name__
            allowed = code in (429, "QueueFull") or (code in (404, "KeyError") and None in seen)
            self.counts[f"refused: {code}"] += 1
            if not allowed:
                self.errors.append(f"{kind} {name}: {error}")
            return
        except Exception as error:
            self.errors.append(f"{kind} {name}: {type(error).__name__}: {error}")
            return
        self.counts[kind] += 1
        if text is not None and text not in {self._jobs.texts[content][number] for content in seen if content is not None}:
            self.wrong.append(f"{kind} {name}, prompt {number}: {text!r}; may have been {sorted(map(str, seen))}")

    def _body(self, name: str, prompt: str, tokens: int, stream: bool) -> dict:
        return {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream}

    async def _unary(self, name: str, prompt: str, tokens: int) -> str:
        response = await self._http.post("/v1/completions", json=self._body(name, prompt, tokens, False))
        response.raise_for_status()
        return response.json()["choices"][0]["text"]

    async def _stream(self, name: str, prompt: str, tokens: int, leave: bool = False) -> str | None:
        text, ended = "", False
        async with self._http.stream("POST", "/v1/completions", json=self._body(name, prompt, tokens, True)) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(event["error"]["message"])
                    text += event["choices"][0]["text"]
                    if leave:
                        return None
        if not ended:
            raise RuntimeError("the stream broke off")
        return text

    async def _leave(self, name: str, prompt: str, tokens: int) -> None:
        await self._stream(name, prompt, tokens, leave=True)

    async def _grpc_stream(self, name: str, prompt: str, tokens: int, timeout: float) -> str:
        lora = None if name == self._model else name
        params = SamplingParams(temperature=0, max_tokens=tokens)
        text = ""
        async with contextlib.aclosing(self._rpc.stream(prompt, params, lora_name=lora, timeout=timeout)) as stream:
            async for delta in stream:
                text += delta.text
        return text

    async def _grpc(self, name: str, prompt: str, tokens: int) -> str:
        return await self._grpc_stream(name, prompt, tokens, timeout=600)

    async def _deadline(self, name: str, prompt: str, tokens: int) -> str | None:
        with contextlib.suppress(DeadlineExceeded):
            return await self._grpc_stream(name, prompt, tokens, timeout=0.3)
        return None


async def main(jobs: Jobs, task: dict[str, Any]) -> dict[str, Any]:
    rng = random.Random(task["seed"])
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=task["clients"])
    async with (
        httpx.AsyncClient(base_url=task["url"], timeout=600, limits=limits) as http,
        AsyncClient(task["grpc"]) as grpc,
    ):
        model = next(m["id"] for m in (await http.get("/v1/models")).json()["data"] if m.get("parent") is None)
        fixed = {Path(content).name: content for content in jobs.fixed}
        churn = Churn(http, [f"live-{i}" for i in range(task["names"])], jobs.changing, rng)
        clients = Clients(jobs, http, grpc, churn, fixed, model)
        until = time.monotonic() + task["seconds"]
        asking = [clients.run(random.Random(rng.random()), until) for _ in range(task["clients"])]
        await asyncio.gather(churn.run(task["pause"], until), *asking)
        for name in churn.names:
            await http.post("/v1/unload_lora_adapter", json={"lora_name": name})
    return {
        "requests": dict(sorted(clients.counts.items())),
        "adapters": dict(sorted(churn.counts.items())),
        "wrong_texts": clients.wrong,
        "errors": clients.errors + churn.errors,
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    seen = asyncio.run(main(Jobs.load(folder / "jobs.json"), json.loads((folder / "task.json").read_text())))
    (folder / "result.json").write_text(json.dumps(seen, indent=1))
