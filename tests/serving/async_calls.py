"""What the tests of AsyncLLM ask, and who watches."""

from __future__ import annotations

import asyncio

from chameleon_jax import AsyncLLM, SamplingParams
from chameleon_jax.serving.observers import Observer

GREEDY = SamplingParams(temperature=0, max_tokens=24)
LONG = SamplingParams(temperature=0, max_tokens=80)
PROMPTS = ["The heart of man", "Love is", "0123456789" * 4]
TIMEOUT = 60


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT))


async def last(llm: AsyncLLM, prompt, params=GREEDY, lora=None, **kwargs):
    return [output async for output in llm.generate(prompt, params, lora, **kwargs)][-1]


async def settled(llm: AsyncLLM) -> None:
    """Until nothing runs."""
    while True:
        stats = await llm.stats(max_age=0)
        if stats.running == stats.waiting == 0 and stats.pool.kv == 0:
            return
        await asyncio.sleep(0.01)


class Watcher(Observer):
    """An observer that remembers."""

    def __init__(self):
        self.first_tokens: list[str] = []
        self.ends: list[str] = []
        self.lost_requests: list[int] = []

    def first_token(self, request):
        assert request.output_token_ids and request.metrics.first_token_time is not None
        self.first_tokens.append(request.request_id)

    def finished(self, request):
        self.ends.append(request.request_id)

    def loaded(self, result):
        raise RuntimeError("what an observer raises concerns nobody")

    def engine_died(self, error, loras):
        self.lost_requests.append(len(loras))
