"""Asking a served model of `text_models` in every way."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from chameleon_jax import SamplingParams
from tests.text_models import VARIANTS

NUM_TOKENS = 40
LLAMA2 = VARIANTS["llama2"]
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


def ask(served, prompt, params=GREEDY):
    async def main():
        return [output async for output in served.llm.generate(prompt, params)]

    return asyncio.run(main())


def complete(served, stream=False, **fields):
    """The choice, put together where it is streamed."""
    asked = {"model": "llama2", "max_tokens": NUM_TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = served.openai.completions.create(stream=stream, **(asked | fields))
    if not stream:
        return answer.choices[0]
    choices = [chunk.choices[0] for chunk in answer]
    parts = [choice.logprobs for choice in choices if choice.logprobs is not None]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    logprobs = {name: [value for part in parts for value in getattr(part, name)] for name in names}
    return SimpleNamespace(
        text="".join(choice.text for choice in choices),
        logprobs=SimpleNamespace(**logprobs),
        stop_reason=choices[-1].stop_reason,
    )
