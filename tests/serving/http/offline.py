"""Answers of the engine to which those of the servers are compared."""

from __future__ import annotations

import asyncio

from chameleon_jax import LoRARequest, SamplingParams

PROMPT = "love is"


def offline(llm, prompt, tokens: int, lora: str | None = None, **params):
    return offline_output(llm, prompt, tokens, lora, **params).outputs[0]


def offline_output(llm, prompt, tokens: int, lora: str | None = None, **params):
    async def main():
        request = None if lora is None else LoRARequest(lora)
        asked = SamplingParams(temperature=0, max_tokens=tokens, **params)
        return [output async for output in llm.generate(prompt, asked, request)][-1]

    return asyncio.run(main())
